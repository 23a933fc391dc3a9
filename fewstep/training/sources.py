"""The networks that a training begins with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import diffusers
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from fewstep.errors import SettingsError
from fewstep.models import MODELS, ModelSpec
from fewstep.pipeline import PIPELINES, load_pipeline
from fewstep.settings import Settings
from fewstep.text_encoding import Diffusion
from fewstep.weights import check_hashes, verify_weights

# SDXL's UNet does not fit into a usual GPU's memory in 32 bits beside what its training needs.
LARGE_NETWORK = 2 * 10**9


def load_base(name: str, settings: Settings, device: torch.device) -> Diffusion:
    """The base without its LCM-LoRA, to distil it or to teach it a style: one of our models by its name, or
    any diffusers folder of an SDXL or SD model.

    Raises WeightsError for damaged files, SettingsError for what is no such folder.
    """
    if name in MODELS:
        spec, folder = MODELS[name], settings.weights_root / name
        manifest = verify_weights(folder, remedy=spec.remedy, mode="size")
        if settings.verify != "size":
            check_hashes(folder, manifest, remedy=spec.remedy)
        kind = PIPELINES[spec.family]
    else:
        folder = Path(name)
        kind = _kind_of(folder)
    options = {"add_watermarker": False} if kind is StableDiffusionXLPipeline else {"safety_checker": None}
    diffusion: Diffusion = kind.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, **options
    )
    return _placed(diffusion, device)


def load_few_step(spec: ModelSpec, settings: Settings, device: torch.device) -> Diffusion:
    """A model that paints in few steps, its LCM-LoRA fused. Raises as `load_pipeline` does."""
    plain = replace(settings, device=device.type, dtype="fp32", engine="torch", vae="full", safety="off")
    return _placed(load_pipeline(spec, plain).diffusion, device)


def _placed(diffusion: Diffusion, device: torch.device) -> Diffusion:
    """On the device, without gradients; a large UNet in bf16, which a training's arithmetic is done in."""
    unet = diffusion.unet
    if sum(parameter.numel() for parameter in unet.parameters()) > LARGE_NETWORK:
        unet.to(torch.bfloat16)
    diffusion.to(device)
    diffusion.set_progress_bar_config(disable=True)
    for module in diffusion.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval().requires_grad_(False)
    return diffusion


def _kind_of(folder: Path) -> type[Diffusion]:
    try:
        name = json.loads((folder / "model_index.json").read_text())["_class_name"]
        kind = getattr(diffusers, name)
    except (OSError, ValueError, KeyError, AttributeError):
        kind = None
    if kind not in (StableDiffusionXLPipeline, StableDiffusionPipeline):
        raise SettingsError(
            f"the model is neither one of {', '.join(MODELS)} nor a diffusers folder of SDXL or SD"
        )
    return kind  # type: ignore[no-any-return]
