"""What a network generates while it is trained: one row of images, always of the same prompts and seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from diffusers import LCMScheduler, UNet2DConditionModel
from PIL import Image

from fewstep.generation.reference import generate_images
from fewstep.generation.text_encoder import Diffusion

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
    return generate_images(
        diffusion,
        prompts,
        range(len(prompts)),
        steps=STEPS if few_steps else BASE_STEPS,
        guidance=guidance if few_steps else BASE_GUIDANCE,
        scheduler=LCMScheduler.from_config(diffusion.scheduler.config) if few_steps else None,
        batch=1,  # a training leaves little memory
        unet=unet,
    )


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
