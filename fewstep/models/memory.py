"""What a model takes of a GPU's memory, and what is done where that is little.

The figures of activations were counted at SDXL's shapes in fp16, by torch's fake tensors, not measured on a
card (docs/gpu.md); they grow with the number of pixels.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch

from fewstep.errors import SettingsError
from fewstep.models.manifest import Manifest
from fewstep.models.sources import LCM_LORA, SAFETY_FOLDERS, TINY_VAE
from fewstep.models.specs import ModelSpec
from fewstep.settings import FP8, GIGABYTE, Settings

logger = logging.getLogger(__name__)

# In GB: what CUDA and its libraries hold, and for one image of 1024 x 1024 px a UNet's pass, without
# guidance, and the decoder's.
CONTEXT_GB = 0.5
UNET_GB, DECODER_GB, TINY_DECODER_GB = 0.17, 1.61, 0.40
QUANTIZING_GB = 0.3  # the largest layer, while it is written into 8 bits or read out of them
MEGAPIXEL = 1024 * 1024
# Of what is free, for what lies scattered between the tensors.
USABLE = 0.95


@dataclass(frozen=True)
class MemoryPlan:
    """How a model uses its device: images at once, and what is given up, or spent, for memory."""

    max_batch: int
    small: bool = False  # text encoders and the safety checker leave the card after use, the UNet has 8 bits
    keep_pristine: bool = False  # weights without LoRAs stay on the card, which makes a change of style quick
    needed_gb: float = 0.0  # for `max_batch` images


@dataclass(frozen=True)
class Footprint:
    """What the parts of a model take on a device, in GB."""

    unet: float
    encoders: float
    vae: float
    checker: float
    lora: float

    @classmethod
    def of(cls, manifest: Manifest, settings: Settings, dtype: torch.dtype) -> Footprint:
        """By the files, which are of 16 bits."""
        parts = {"unet": "unet", "text_encoder": "encoders", "text_encoder_2": "encoders", "vae": "vae"}
        parts |= {TINY_VAE: "vae", LCM_LORA: "lora", SAFETY_FOLDERS.get(settings.safety, "none"): "checker"}
        total = dict.fromkeys(("unet", "encoders", "vae", "checker", "lora"), 0.0)
        for file in manifest.files:
            part = parts.get(file.path.partition("/")[0])
            if part and file.path.endswith(".safetensors"):
                total[part] += file.size * dtype.itemsize / 2 / GIGABYTE
        return cls(**total)


def plan_memory(
    spec: ModelSpec, sizes: Footprint, settings: Settings, device: torch.device, dtype: torch.dtype
) -> MemoryPlan:
    """How `spec` is to use `device`, whose memory `settings` may limit; a CPU has no such limits.

    Raises SettingsError when not even one image would fit.
    """
    if device.type == "cpu":
        return MemoryPlan(settings.max_batch)
    free, total = (size / GIGABYTE for size in torch.cuda.mem_get_info(device))
    if settings.memory_gb:
        # So that it holds, whatever the plan forgets: what is above it is out of memory. It is of the current
        # device; one without an index would be refused.
        torch.cuda.set_per_process_memory_fraction(min(1.0, (settings.memory_gb - CONTEXT_GB) / total))
    return plan_for(spec, sizes, settings, min(free, settings.memory_gb or free), dtype)


def plan_for(
    spec: ModelSpec, sizes: Footprint, settings: Settings, memory_gb: float, dtype: torch.dtype
) -> MemoryPlan:
    """`plan_memory` for a card with `memory_gb` left. Raises as that."""
    scale = spec.native_size**2 / MEGAPIXEL * dtype.itemsize / 2
    decoder = scale * (TINY_DECODER_GB if settings.vae == "tiny" else DECODER_GB)
    image = scale * UNET_GB
    fp8 = QUANTIZING_GB if settings.engine == FP8 else 0.0
    weights = sizes.unet + fp8 + sizes.encoders + sizes.vae + sizes.checker
    budget = memory_gb * USABLE - CONTEXT_GB

    def planned(held: float, **how: bool) -> MemoryPlan:
        """The plan with as many images at once as there is room for beside `held` GB: a power of two, as
        batches are padded."""
        room = int((budget - held) / image)
        most = min(settings.max_batch, 1 << room.bit_length() - 1 if room > 0 else 0)
        return MemoryPlan(most, needed_gb=held + most * image + CONTEXT_GB, **how)

    weights += decoder
    whole, pristine = planned(weights), sizes.unet + sizes.encoders + sizes.lora
    rich = planned(weights + pristine, keep_pristine=True)
    if rich.max_batch == settings.max_batch:
        return rich
    if whole.max_batch >= min(settings.max_batch, 4):
        return whole
    # The text encoders are gone when the decoder begins.
    in_8_bits = sizes.unet / dtype.itemsize + QUANTIZING_GB
    small = planned(in_8_bits + sizes.vae + max(decoder, sizes.encoders), small=True)
    best = max((whole, small), key=lambda plan: plan.max_batch)
    if best.max_batch == 0:
        least = small.needed_gb + image
        raise SettingsError(
            f"{spec.name} needs {least:.1f} GB of the GPU's memory, and {memory_gb:.1f} GB are free or "
            "allowed by FEWSTEP_MEMORY; free some, or take a smaller model"
        )
    return best
