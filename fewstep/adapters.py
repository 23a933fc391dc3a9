"""LCM-LoRA arithmetic: read an adapter, check that all of it fits and is finite, fuse it for good."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TypeAlias

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

from fewstep.errors import WeightsError

logger = logging.getLogger(__name__)

Diffusion: TypeAlias = StableDiffusionXLPipeline | StableDiffusionPipeline

_UP_SUFFIXES = (".lora_up.weight", ".lora_B.weight", ".lora.up.weight")


def fuse_lcm_lora(
    diffusion: Diffusion,
    path: Path,
    remedy: str,
    scale: float = 1.0,
) -> int:
    """Add the LCM-LoRA in `path` to the UNet's own weights, W += scale * B A, and leave no adapter behind.

    Returns how many modules were changed: each of the file's. Loaders that skip convolutions merge only 515
    of the 788 modules of SDXL's LCM-LoRA and say nothing. Raises WeightsError, before the UNet is changed, if
    a module of the file finds no layer or a value is not finite.
    """
    shown = f"weights/{path.parent.name}/{path.name}"
    tensors = load_file(path)
    broken = next((key for key, value in tensors.items() if not torch.isfinite(value.float()).all()), None)
    if broken is not None:
        raise WeightsError(f"{shown} holds values that are not finite, first in {broken}; run: {remedy}")
    expected = sum(key.endswith(_UP_SUFFIXES) for key in tensors)
    try:
        # From the file, not from `tensors`: its metadata may hold the alpha.
        diffusion.load_lora_weights(
            path.parent,
            weight_name=path.name,
            adapter_name="lcm",
            use_safetensors=True,
            local_files_only=True,
        )
    except (KeyError, RuntimeError, ValueError):  # another model's shapes or names
        logger.exception("%s could not be loaded", shown)
        found = 0
    else:
        found = sum(isinstance(module, BaseTunerLayer) for module in diffusion.unet.modules())
    if not expected or found != expected:
        diffusion.unload_lora_weights()  # a failed load leaves its empty layers behind
        raise WeightsError(
            f"{shown} has {expected} modules, {found} of which found their layer; run: {remedy}"
        )
    diffusion.fuse_lora(components=["unet"], lora_scale=scale, safe_fusing=True)
    diffusion.unload_lora_weights()
    return expected
