"""The miniature's VAE: SDXL's `AutoencoderKL`, eight times smaller each way, four latent channels."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from fewstep.miniature.world.dataset import Pixels
from fewstep.models.device import autocast
from fewstep.training.trainer import Schedule, Shard, optimise, step_generator

CROP_PX = 64
BATCH = 16
KL_WEIGHT = 1e-4


def make_vae() -> AutoencoderKL:
    """An untrained VAE of 3.1 M parameters; no attention, so it decodes any size in linear time."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 96, 128),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=128,
        mid_block_add_attention=False,
        force_upcast=False,
    )


def reconstruction_loss(generated: Tensor, drawn: Tensor) -> Tensor:
    """L1 + MSE + L1 of the image gradients, for flat colours with sharp edges; (N, 3, H, W) in [-1, 1]."""
    error = generated - drawn
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    total: Tensor = error.abs().mean() + error.square().mean() + edges
    return total


def train_vae(images: Pixels, steps: int, checkpoints: Path, device: torch.device) -> AutoencoderKL:
    """Train on random crops of drawn `images`; `config.scaling_factor` then gives latents unit variance."""
    torch.manual_seed(2)
    vae = make_vae().to(device, memory_format=torch.channels_last)

    def loss(step: int, share: Shard) -> Tensor:
        x = _crops(images, step_generator(2, step), device)
        with autocast(device):
            posterior = vae.encode(x).latent_dist
            generated = vae.decode(posterior.sample()).sample
        kl: Tensor = posterior.kl().mean() / (CROP_PX // 8) ** 2  # per latent pixel
        return reconstruction_loss(generated.float(), x) + KL_WEIGHT * kl

    optimise("VAE", vae, loss, Schedule(steps, lr=2e-3, batch=BATCH, weight_decay=1e-4), checkpoints)
    vae.eval().requires_grad_(False)
    vae.register_to_config(scaling_factor=float(1.0 / encode(vae, images[:1024]).std()))
    return vae


def _crops(images: Pixels, generator: torch.Generator, device: torch.device) -> Tensor:
    """(BATCH, 3, CROP_PX, CROP_PX) in [-1, 1]."""
    index = torch.randint(len(images), (BATCH,), generator=generator)
    corners = torch.randint(images.shape[1] - CROP_PX + 1, (BATCH, 2), generator=generator)
    rows = [
        torch.from_numpy(images[i, y : y + CROP_PX, x : x + CROP_PX].copy())
        for i, (y, x) in zip(index.tolist(), corners.tolist(), strict=True)
    ]
    x = torch.stack(rows).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    return x.to(device, memory_format=torch.channels_last)


@torch.inference_mode()
def encode(vae: AutoencoderKL, images: Pixels) -> Tensor:
    """uint8 (N, H, W, 3) -> unscaled latents (N, 4, H / 8, W / 8), fp32 on the CPU."""
    latents = []
    for start in range(0, len(images), 64):
        x = torch.from_numpy(images[start : start + 64].copy()).permute(0, 3, 1, 2).float() / 127.5 - 1.0
        x = x.to(vae.device, memory_format=torch.channels_last)
        with autocast(vae.device):
            latents.append(vae.encode(x).latent_dist.mean.float().cpu())
    return torch.cat(latents)


@torch.inference_mode()
def decode(vae: AutoencoderKL, latents: Tensor) -> Pixels:
    """Unscaled latents -> uint8 (N, H, W, 3)."""
    images = []
    for part in torch.split(latents.to(vae.device), 64):
        x = vae.decode(part.to(vae.dtype)).sample.float() * 127.5 + 127.5
        images.append(x.clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu())
    return torch.cat(images).numpy()
