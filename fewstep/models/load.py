"""The parts of a pipeline as they come from a weights folder, verified."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline, StableDiffusionXLPipeline

from fewstep.errors import InvalidRequest, LoraError, SettingsError, WeightsError
from fewstep.generation.text_encoder import Diffusion
from fewstep.lora.merge import WeightMerger
from fewstep.lora.types import Lora
from fewstep.models.manifest import Manifest, check_hashes
from fewstep.models.sources import LCM_LORA, TINY_VAE
from fewstep.models.specs import ModelSpec
from fewstep.request import Request
from fewstep.settings import OPENVINO, Settings

logger = logging.getLogger(__name__)

PIPELINES = {"sdxl": StableDiffusionXLPipeline, "sd": StableDiffusionPipeline}


def usual_size(spec: ModelSpec, settings: Settings) -> tuple[int, int]:
    """Of the images that the engine is made for, in px. Raises SettingsError for what cannot be generated."""
    native = (spec.native_size, spec.native_size)
    if settings.engine == "compiled":
        name, sizes = "FEWSTEP_COMPILED", [(shape.width, shape.height) for shape in settings.compiled]
    elif settings.engine in OPENVINO and settings.openvino_size:
        name, sizes = "FEWSTEP_OPENVINO_SIZE", [settings.openvino_size]
    else:
        return native
    for width, height in sizes:
        try:
            Request.create(spec, prompt="any", aspect_ratio="custom", width=width, height=height)
        except InvalidRequest as error:
            raise SettingsError(f"{name} has a size that cannot be painted: {error.sentence}") from None
    return sizes[0] if sizes else native


def load_tiny_vae(folder: Path, manifest: Manifest, fix: str) -> AutoencoderTiny:
    """Raises WeightsError where the folder has none."""
    if not any(file.path.startswith(f"{TINY_VAE}/") for file in manifest.files):
        # Saved by an earlier version.
        raise WeightsError(f"weights/{folder.name}/{TINY_VAE} is missing; run: {manifest.fix(fix)}")
    return AutoencoderTiny.from_pretrained(folder / TINY_VAE, use_safetensors=True, local_files_only=True)


def read_lcm_lora(adapters: WeightMerger, folder: Path, manifest: Manifest, fix: str) -> Lora:
    """The folder's. Raises WeightsError, with the reason, for one that does not fit."""
    (listed,) = (file for file in manifest.files if file.path == LCM_LORA)
    try:
        return adapters.read(folder / LCM_LORA, listed.sha256)
    except LoraError as error:
        shown = f"weights/{folder.name}/{LCM_LORA}"
        raise WeightsError(f"{shown} {error.sentence}; run: {manifest.fix(fix)}") from None


def load_verified(
    folder: Path,
    spec: ModelSpec,
    manifest: Manifest,
    verify: str,
    device: torch.device,
    dtype: torch.dtype,
) -> Diffusion:
    """Hash every file while it is loaded: both read the disk, and together no longer than either alone."""

    def load() -> Diffusion:
        return PIPELINES[spec.family].from_pretrained(
            folder,
            dtype=dtype,
            device_map=device.type,
            use_safetensors=True,
            local_files_only=True,
            **({"add_watermarker": False} if spec.family == "sdxl" else {"safety_checker": None}),
        )

    if verify == "size":
        logger.warning("FEWSTEP_VERIFY is size: a damaged file of the right length will not be noticed")
        return load()
    with ThreadPoolExecutor(1, "verify") as thread:
        hashed = thread.submit(check_hashes, folder, manifest, fix=spec.fix)
        try:
            diffusion = load()
        finally:
            hashed.result()  # when loading failed because of damaged bytes, this says so, and which
    return diffusion
