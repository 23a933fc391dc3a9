"""The miniature's tiny VAE: a decoder of a few small convolutions that repeats what the VAE's decoder makes.

Its architecture is TAESD's, diffusers' `AutoencoderTiny`, which real SDXL has one of, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from fewstep.miniature.autoencoder import reconstruction_loss
from fewstep.models.device import autocast
from fewstep.training.trainer import Schedule, Shard, optimise, step_generator

CROP = 8  # in latent pixels
BATCH = 32


def make_tiny_vae() -> AutoencoderTiny:
    """Untrained. Its encoder is as small as can be and stays so: callers' images go through the VAE's."""
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(32, 32, 32, 32),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(3, 2, 1, 1),
    )


def train_tiny_vae(
    vae: AutoencoderKL, latents: Sequence[Tensor], steps: int, checkpoints: Path, device: torch.device
) -> AutoencoderTiny:
    """Distil the decoder of `vae` on crops of scaled `latents`, each (N, 4, H / 8, W / 8)."""
    torch.manual_seed(10)
    tiny = make_tiny_vae().to(device, memory_format=torch.channels_last)
    tiny.encoder.requires_grad_(False)

    def loss(step: int, share: Shard) -> Tensor:
        x = _crops(latents, step_generator(10, step)).to(device, memory_format=torch.channels_last)
        with autocast(device):
            with torch.no_grad():
                expected = vae.decode(x / vae.config.scaling_factor).sample
            generated = tiny.decode(x).sample
        return reconstruction_loss(generated.float(), expected.float())

    optimise("tiny VAE", tiny, loss, Schedule(steps, lr=2e-3, batch=BATCH, weight_decay=0.0), checkpoints)
    return tiny.eval().requires_grad_(False)


def _crops(latents: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """(BATCH, 4, CROP, CROP), out of sets of any shape; a larger set is drawn from more often."""
    ends = torch.tensor([len(one) for one in latents]).cumsum(0)
    rows = []
    for place in torch.randint(int(ends[-1]), (BATCH,), generator=generator).tolist():
        which = int(torch.searchsorted(ends, place, right=True))
        one = latents[which][place - int(ends[which])].float()
        top, left = (int(torch.randint(side - CROP + 1, (), generator=generator)) for side in one.shape[1:])
        rows.append(one[:, top : top + CROP, left : left + CROP])
    return torch.stack(rows)
