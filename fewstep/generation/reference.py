"""Images by diffusers' own pipeline: the reference that samplers and trained networks are measured by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from tqdm import tqdm

from fewstep.models.device import autocast
from fewstep.models.load import Diffusion

BATCH, BATCH_SIDE = 25, 128  # images of so many px a side at once, or as many pixels of other sizes


def native_size(diffusion: Diffusion) -> int:
    """Return the side in px of the squares that a diffusers pipeline was made for."""
    return int(diffusion.unet.config.sample_size * diffusion.vae_scale_factor)


def generate_images(
    diffusion: Diffusion,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    guidance: float,
    scheduler: Any = None,
    batch: int | None = None,
    unet: UNet2DConditionModel | None = None,
    progress: str | None = None,
) -> Iterator[Image.Image]:
    """Yield an image of the native size for each of `prompts`, seeded with its number of `seeds`.

    `scheduler` (any of diffusers', as an object) and `unet` take the place of those of `diffusion`, which
    itself stays as it is. `batch` images are generated at once, or as many as memory for BATCH of BATCH_SIDE
    px holds. `guidance` is diffusers' scale: 1 is none, and of a full LCM it is 1 + w. With `progress`, a
    bar of that title counts the batches.
    """
    others = {"scheduler": scheduler, "unet": unet}
    components = diffusion.components | {name: part for name, part in others.items() if part is not None}
    options: dict[str, Any] = {"requires_safety_checker": False, "safety_checker": None}
    if isinstance(diffusion, StableDiffusionXLPipeline):
        zeros = diffusion.config.force_zeros_for_empty_prompt
        options = {"force_zeros_for_empty_prompt": zeros, "add_watermarker": False}
    pipeline = type(diffusion)(**(components | options))
    pipeline.set_progress_bar_config(disable=True)
    batch = batch or max(1, round(BATCH * (BATCH_SIDE / native_size(diffusion)) ** 2))
    starts = range(0, len(prompts), batch)
    for start in tqdm(starts, progress, mininterval=5.0, disable=progress is None):
        part = slice(start, start + batch)
        # Latents and scheduler stay in fp32; the networks need not.
        with autocast(diffusion.device):
            images = pipeline(
                list(prompts[part]),
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
            ).images
        yield from images  # with autocast off again, which is not the caller's
