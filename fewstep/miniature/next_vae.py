"""The next miniature's VAE: today's, taken further on crops of the new world at 256 px, and then its decoder
made sharp by a patch discriminator, which leaves latents what they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.func import functional_call

from fewstep.miniature.vae import encode, reconstruction_loss
from fewstep.miniature.world.dataset import Pixels, to_tensor
from fewstep.models.device import autocast
from fewstep.training.trainer import Schedule, Shard, optimise, step_generator

CROP_PX, BATCH = 64, 16
KL_WEIGHT = 1e-4
FEATURES_WEIGHT, ADVERSARY_WEIGHT = 0.3, 0.02


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
