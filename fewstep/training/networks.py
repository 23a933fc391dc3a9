"""The networks that a training begins with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel

from fewstep.errors import SettingsError
from fewstep.generation.load import load_pipeline
from fewstep.models.device import fast_dtype
from fewstep.models.load import PIPELINES, Diffusion
from fewstep.models.manifest import check_folder, check_hashes
from fewstep.models.specs import get_model
from fewstep.settings import Settings

# Parameters. SDXL's UNet has 2.6 billion, 10 GB in fp32: no room beside it for what a training needs.
LARGE_NETWORK = 10**9


def load_base(name: str, settings: Settings, device: torch.device) -> Diffusion:
    """Return the base in fp32 without its LCM-LoRA, to distil it or to teach it a style: one of our models by
    its name, or any diffusers folder of an SDXL or SD model.

    Raises WeightsError for damaged files, SettingsError for what is no such folder or a full LCM, which has
    no base any more.
    """
    folder = Path(name)
    if not folder.is_dir():
        spec, folder = get_model(name), settings.weights_root / name
        manifest = check_folder(folder, fix=spec.fix)
        if settings.verify != "size":
            check_hashes(folder, manifest, fix=spec.fix)
    families = {kind.__name__: family for family, kind in PIPELINES.items()}
    try:
        family = families[json.loads((folder / "model_index.json").read_text())["_class_name"]]
    except (OSError, ValueError, KeyError, TypeError):
        raise SettingsError("the folder of the model is no diffusers folder of SDXL or SD") from None
    options = {"add_watermarker": False} if family == "sdxl" else {"safety_checker": None}
    diffusion: Diffusion = PIPELINES[family].from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, **options
    )
    if diffusion.unet.config.time_cond_proj_dim:
        raise SettingsError("the model is a full LCM; its base cannot be had from it, so name the base")
    return _placed(diffusion, device)


def load_few_step(name: str, settings: Settings, device: torch.device) -> Diffusion:
    """Return a model that generates in few steps, its LCM-LoRA fused, in fp32. Raises as `load_pipeline`
    does."""
    plain = replace(settings, device=device.type, dtype="fp32", engine="torch", vae="full", safety="off")
    return _placed(load_pipeline(get_model(name), plain).diffusion, device)


def halve_if_large(unet: UNet2DConditionModel) -> None:
    """Put a frozen UNet of SDXL's size into the dtype in which it is used anyway; a smaller one stays in
    fp32."""
    if sum(parameter.numel() for parameter in unet.parameters()) > LARGE_NETWORK:
        unet.to(fast_dtype(unet.device, training=True))


def _placed(diffusion: Diffusion, device: torch.device) -> Diffusion:
    diffusion.to(device)
    diffusion.set_progress_bar_config(disable=True)
    for module in diffusion.components.values():
        if isinstance(module, torch.nn.Module):
            module.eval().requires_grad_(False)
    return diffusion
