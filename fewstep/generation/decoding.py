"""From latents to finished images."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from PIL import Image, ImageFilter
from torch import Tensor

from fewstep.errors import FewstepError, GenerationError
from fewstep.generation.engines import Engine
from fewstep.request import Inputs

logger = logging.getLogger(__name__)

SEAM_PX = 2  # over which what is repainted and what is kept run into each other


def decode_latents(engine: Engine, decoder: Any, latents: Tensor) -> list[Image.Image | FewstepError]:
    """Scaled latents -> RGB images; an error where a value is not finite, which would come out black.

    What leaves the range of 16 bits is decoded once more in fp32, by `decoder`, which `engine` evaluates.
    """
    latents = latents / decoder.config.scaling_factor
    pixels = engine.decode(latents).float()
    again = _finite(latents) & ~_finite(pixels)
    if decoder.dtype != torch.float32 and again.any():
        logger.warning("%d of %d images are decoded again in fp32", again.sum(), len(again))
        pixels[again] = copy.deepcopy(decoder).float().decode(latents[again]).sample
    finite = _finite(pixels).tolist()
    rgb = (pixels / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    failed = "the model's numbers left their range, so there is no picture; try another seed"
    return [
        Image.fromarray(row) if sound else GenerationError(failed)
        for row, sound in zip(rgb, finite, strict=True)
    ]


def keep_unmasked(generated: Image.Image | FewstepError, inputs: Inputs) -> Image.Image | FewstepError:
    """`generated` with the caller's own pixels where the mask keeps them, which the VAE changes slightly."""
    if isinstance(generated, FewstepError) or inputs.image is None or inputs.mask is None:
        return generated
    return Image.composite(generated, inputs.image, inputs.mask.filter(ImageFilter.GaussianBlur(SEAM_PX)))


def _finite(values: Tensor) -> Tensor:
    """Of each image, bool (N,)."""
    return values.isfinite().flatten(1).all(1)
