"""What a network generates while it is trained: one row of images, always of the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image

from fewstep.models.device import autocast
from fewstep.models.load import Diffusion

STEPS = 4
# For a LoRA on the base alone, which knows nothing of few steps.
BASE_STEPS, BASE_GUIDANCE = 20, 5.0


def generate(
    diffusion: Diffusion,
    unet: UNet2DConditionModel,
    prompts: Sequence[str],
    *,
    few_steps: bool = True,
    guidance: float = 1.0,
) -> Iterator[Image.Image]:
    """One image of each of `prompts` by `unet`, with what else `diffusion` has; image i has seed i."""
    kept: dict[str, Any] = diffusion.components | {"unet": unet}
    options: dict[str, Any] = {"requires_safety_checker": False, "safety_checker": None}
    if isinstance(diffusion, StableDiffusionXLPipeline):
        zeros = diffusion.config.force_zeros_for_empty_prompt
        options = {"force_zeros_for_empty_prompt": zeros, "add_watermarker": False}
    if few_steps:
        kept["scheduler"] = LCMScheduler.from_config(diffusion.scheduler.config)
    painter = type(diffusion)(**(kept | options))
    painter.set_progress_bar_config(disable=True)
    for i, prompt in enumerate(prompts):  # one by one: a training leaves little memory
        with autocast(diffusion.device):
            image = painter(
                prompt,
                num_inference_steps=STEPS if few_steps else BASE_STEPS,
                guidance_scale=guidance if few_steps else BASE_GUIDANCE,
                generator=torch.Generator().manual_seed(i),
            ).images[0]
        yield image  # with autocast off again, which is not the caller's


def generate_samples(
    diffusion: Diffusion,
    unet: UNet2DConditionModel,
    prompts: Sequence[str],
    *,
    few_steps: bool = True,
    guidance: float = 1.0,
) -> Image.Image:
    """What `generate` generates, side by side."""
    images = list(generate(diffusion, unet, prompts, few_steps=few_steps, guidance=guidance))
    width, height = images[0].size
    row = Image.new("RGB", (width * len(images), height))
    for i, image in enumerate(images):
        row.paste(image, (i * width, 0))
    return row
