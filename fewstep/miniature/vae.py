"""The miniature's VAE: SDXL's `AutoencoderKL`, eight times smaller each way, four latent channels, trained on
crops of drawings, its decoder then made sharp by a patch discriminator; and its tiny VAE, a decoder of a few
small convolutions that repeats what the VAE's decoder makes.

The tiny one's architecture is TAESD's, diffusers' `AutoencoderTiny`, which real SDXL has one of, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn
from torch.func import functional_call

from fewstep.miniature.world.dataset import Pixels, to_tensor
from fewstep.models.device import autocast
from fewstep.training.trainer import Schedule, Shard, optimise, step_generator

CROP_PX, BATCH = 64, 16
KL_WEIGHT = 1e-4
FEATURES_WEIGHT, ADVERSARY_WEIGHT = 0.3, 0.02
TINY_CROP, TINY_BATCH = 8, 32  # the crop in latent pixels
PIXELS_AT_ONCE = 2**18  # of images that are encoded or decoded: more outgrow a CPU's cache, and take longer


def reconstruction_loss(generated: Tensor, drawn: Tensor) -> Tensor:
    """L1 + MSE + L1 of the image gradients, for flat colours with sharp edges; (N, 3, H, W) in [-1, 1]."""
    error = generated - drawn
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    total: Tensor = error.abs().mean() + error.square().mean() + edges
    return total


def random_crops(images: Pixels, generator: torch.Generator) -> Tensor:
    """Return (BATCH, 3, CROP_PX, CROP_PX) in [-1, 1] of uint8 `images` (N, H, W, 3)."""
    index = torch.randint(len(images), (BATCH,), generator=generator)
    corners = torch.randint(images.shape[1] - CROP_PX + 1, (BATCH, 2), generator=generator)
    places = zip(index.tolist(), corners.tolist(), strict=True)
    crops = np.stack([images[i, y : y + CROP_PX, x : x + CROP_PX] for i, (y, x) in places])
    return to_tensor(crops).to(memory_format=torch.channels_last)


def make_vae() -> AutoencoderKL:
    """Return a new one, of 3.1 M parameters."""
    torch.manual_seed(2)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 96, 128),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=256,
        mid_block_add_attention=False,  # so that it decodes any size in linear time
        force_upcast=False,
    )


def train_vae(vae: AutoencoderKL, images: Pixels, schedule: Schedule, checkpoints: Path) -> None:
    """Train `vae` in place; `config.scaling_factor` then gives latents unit variance."""
    vae.train().requires_grad_(True)

    def loss(step: int, share: Shard) -> Tensor:
        x = random_crops(images, step_generator(2, step)).to(vae.device)
        with autocast(x.device):
            posterior = vae.encode(x).latent_dist
            generated = vae.decode(posterior.sample()).sample
        kl: Tensor = posterior.kl().mean() / (CROP_PX // 8) ** 2  # per latent pixel
        return reconstruction_loss(generated.float(), x) + KL_WEIGHT * kl

    optimise("VAE", vae, loss, schedule, checkpoints)
    vae.eval().requires_grad_(False)
    vae.register_to_config(scaling_factor=float(1.0 / encode(vae, images[:512]).std()))


class Discriminator(nn.Module):
    """(N, 3, H, W) -> feature maps, the last of them logits (N, 1, H / 4, W / 4): above 0 looks drawn.

    A patch discriminator (pix2pix, arXiv 1611.07004), of 26 px.
    """

    def __init__(self) -> None:
        super().__init__()
        norm = nn.utils.parametrizations.spectral_norm
        plan = ((3, 32, 2), (32, 64, 2), (64, 96, 1), (96, 1, 1))
        self.layers = nn.ModuleList(norm(nn.Conv2d(a, b, 4 if s == 2 else 3, s, 1)) for a, b, s in plan)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            x = F.leaky_relu(x, 0.2) if i < len(self.layers) - 1 else x
            maps.append(x)
        return maps


def sharpen_decoder(vae: AutoencoderKL, images: Pixels, schedule: Schedule, checkpoints: Path) -> None:
    """Go on training the decoder of `vae` in place, its encoder frozen, against a discriminator that learns
    to tell its crops from drawn ones: by the hinge loss, and by what the discriminator sees in both (feature
    matching, pix2pixHD, arXiv 1711.11585), which is a feature loss without a foreign network."""
    vae.requires_grad_(False)
    trained = nn.ModuleList([vae.decoder.requires_grad_(True), vae.post_quant_conv.requires_grad_(True)])
    torch.manual_seed(3)
    adversary = Discriminator().to(vae.device)
    trained.append(adversary)

    def loss(step: int, share: Shard) -> Tensor:
        x = random_crops(images, step_generator(3, step)).to(vae.device)
        with autocast(x.device):
            with torch.no_grad():
                latents = vae.encode(x).latent_dist.mode()
            generated = vae.decode(latents).sample.float()
        real, fake = adversary(x), adversary(generated.detach())
        hinge = F.relu(1 - real[-1]).mean() + F.relu(1 + fake[-1]).mean()
        # The same network, frozen: the decoder's gradient passes through and leaves it alone.
        frozen = {name: value.detach() for name, value in adversary.state_dict().items()}
        seen = functional_call(adversary, frozen, (generated,))
        features = [F.l1_loss(a, b.detach()) for a, b in zip(seen[:-1], real[:-1], strict=True)]
        against = ADVERSARY_WEIGHT * -seen[-1].mean() + FEATURES_WEIGHT * torch.stack(features).sum()
        total: Tensor = reconstruction_loss(generated, x) + against + hinge
        return total

    optimise("sharp decoder", trained, loss, schedule, checkpoints)
    vae.eval().requires_grad_(False)


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
