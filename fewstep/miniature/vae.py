"""The miniature's VAE: SDXL's `AutoencoderKL`, eight times smaller each way, four latent channels; and its
tiny VAE, a decoder of a few small convolutions that repeats what the VAE's decoder makes.

The tiny one's architecture is TAESD's, diffusers' `AutoencoderTiny`, which real SDXL has one of, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from fewstep.miniature.world.dataset import Pixels, to_tensor
from fewstep.models.device import autocast
from fewstep.training.trainer import Schedule, Shard, optimise, step_generator

CROP_PX, BATCH = 64, 16
TINY_CROP, TINY_BATCH = 8, 32  # the crop in latent pixels
KL_WEIGHT = 1e-4
PIXELS_AT_ONCE = 2**18  # of images that are encoded or decoded: more outgrow a CPU's cache, and take longer


def reconstruction_loss(generated: Tensor, drawn: Tensor) -> Tensor:
    """L1 + MSE + L1 of the image gradients, for flat colours with sharp edges; (N, 3, H, W) in [-1, 1]."""
    error = generated - drawn
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    total: Tensor = error.abs().mean() + error.square().mean() + edges
    return total


def train_vae(images: Pixels, steps: int, checkpoints: Path, device: torch.device) -> AutoencoderKL:
    """Train on random crops of drawn `images`; `config.scaling_factor` then gives latents unit variance."""
    torch.manual_seed(2)
    vae = AutoencoderKL(  # of 3.1 M parameters
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 96, 128),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=128,
        mid_block_add_attention=False,  # so that it decodes any size in linear time
        force_upcast=False,
    ).to(device, memory_format=torch.channels_last)

    def loss(step: int, share: Shard) -> Tensor:
        generator = step_generator(2, step)
        index = torch.randint(len(images), (BATCH,), generator=generator)
        corners = torch.randint(images.shape[1] - CROP_PX + 1, (BATCH, 2), generator=generator)
        places = zip(index.tolist(), corners.tolist(), strict=True)
        crops = np.stack([images[i, y : y + CROP_PX, x : x + CROP_PX] for i, (y, x) in places])
        x = to_tensor(crops).to(device, memory_format=torch.channels_last)
        with autocast(device):
            posterior = vae.encode(x).latent_dist
            generated = vae.decode(posterior.sample()).sample
        kl: Tensor = posterior.kl().mean() / (CROP_PX // 8) ** 2  # per latent pixel
        return reconstruction_loss(generated.float(), x) + KL_WEIGHT * kl

    optimise("VAE", vae, loss, Schedule(steps, lr=2e-3, batch=BATCH, weight_decay=1e-4), checkpoints)
    vae.eval().requires_grad_(False)
    vae.register_to_config(scaling_factor=float(1.0 / encode(vae, images[:1024]).std()))
    return vae


@torch.inference_mode()
def encode(vae: AutoencoderKL, images: Pixels) -> Tensor:
    """uint8 (N, H, W, 3) -> unscaled latents (N, 4, H / 8, W / 8), fp32 on the CPU."""
    latents, count = [], max(1, PIXELS_AT_ONCE // (images.shape[1] * images.shape[2]))
    for start in range(0, len(images), count):
        x = to_tensor(images[start : start + count]).to(vae.device, memory_format=torch.channels_last)
        with autocast(vae.device):
            latents.append(vae.encode(x).latent_dist.mean.float().cpu())
    return torch.cat(latents)


@torch.inference_mode()
def decode(vae: AutoencoderKL, latents: Tensor) -> Pixels:
    """Unscaled latents -> uint8 (N, H, W, 3)."""
    images, count = [], max(1, PIXELS_AT_ONCE // (64 * latents.shape[2] * latents.shape[3]))
    for part in torch.split(latents.to(vae.device), count):
        x = vae.decode(part.to(vae.dtype)).sample.float() * 127.5 + 127.5
        images.append(x.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu())
    return torch.cat(images).numpy()


def reconstruct(vae: AutoencoderKL, images: Pixels) -> Pixels:
    """uint8 (N, H, W, 3) through the VAE and back."""
    return decode(vae, encode(vae, images))


def train_tiny_vae(
    vae: AutoencoderKL, latents: Sequence[Tensor], steps: int, checkpoints: Path, device: torch.device
) -> AutoencoderTiny:
    """Distil the decoder of `vae` on crops of scaled `latents`, each (N, 4, H / 8, W / 8)."""
    torch.manual_seed(10)
    # The encoder is as small as can be and stays so: callers' images go through the VAE's.
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(32, 32, 32, 32),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(3, 2, 1, 1),
    ).to(device, memory_format=torch.channels_last)
    tiny.encoder.requires_grad_(False)

    def loss(step: int, share: Shard) -> Tensor:
        x = _latent_crops(latents, step_generator(10, step)).to(device, memory_format=torch.channels_last)
        with autocast(device):
            with torch.no_grad():
                expected = vae.decode(x / vae.config.scaling_factor).sample
            generated = tiny.decode(x).sample
        return reconstruction_loss(generated.float(), expected.float())

    schedule = Schedule(steps, lr=2e-3, batch=TINY_BATCH, weight_decay=0.0)
    optimise("tiny VAE", tiny, loss, schedule, checkpoints)
    return tiny.eval().requires_grad_(False)


def _latent_crops(latents: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """(TINY_BATCH, 4, TINY_CROP, TINY_CROP), of sets of any shape; a larger one is drawn from more often."""
    ends = torch.tensor([len(part) for part in latents]).cumsum(0)
    rows = []
    for place in torch.randint(int(ends[-1]), (TINY_BATCH,), generator=generator).tolist():
        which = int(torch.searchsorted(ends, place, right=True))
        latent = latents[which][place - int(ends[which])].float()
        room = (side - TINY_CROP + 1 for side in latent.shape[1:])
        top, left = (int(torch.randint(high, (), generator=generator)) for high in room)
        rows.append(latent[:, top : top + TINY_CROP, left : left + TINY_CROP])
    return torch.stack(rows)
