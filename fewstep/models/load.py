"""The parts of a pipeline as they come from a weights folder, verified."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import nn

from fewstep.errors import LoraError, WeightsError
from fewstep.lora.merge import NETWORKS, WeightMerger
from fewstep.lora.types import Mix
from fewstep.models.fp8 import to_fp8
from fewstep.models.manifest import Manifest, check_hashes
from fewstep.models.memory import MemoryPlan
from fewstep.models.sources import LCM_LORA, TINY_VAE
from fewstep.models.specs import ModelSpec
from fewstep.models.upsampling import fold_upsamplers
from fewstep.settings import Settings

logger = logging.getLogger(__name__)

Diffusion: TypeAlias = StableDiffusionXLPipeline | StableDiffusionPipeline
PIPELINES: dict[str, type[Diffusion]] = {"sdxl": StableDiffusionXLPipeline, "sd": StableDiffusionPipeline}


def load_merged(
    spec: ModelSpec,
    settings: Settings,
    manifest: Manifest,
    device: torch.device,
    dtype: torch.dtype,
    plan: MemoryPlan | None = None,
) -> tuple[Diffusion, WeightMerger]:
    """The model of `spec` on `device`, and what adds LoRAs to it; the LCM-LoRA is added, if it has one.

    By a small `plan`, the UNet keeps 8 bits, and the text encoders are on the device while they encode alone.
    Raises WeightsError for damaged files and for an LCM-LoRA that does not fit, with the reason.
    """
    folder, small = settings.weights_root / spec.name, plan is not None and plan.small
    first = torch.device("cpu") if small else device
    diffusion = _load_verified(folder, spec, manifest, settings.verify, first, dtype)
    for module in diffusion.components.values():
        if isinstance(module, nn.Module):
            module.eval().requires_grad_(False)
    if device.type == "cpu":
        fold_upsamplers(diffusion.vae)  # the decoder's; on a GPU it has not been measured
        # As a CPU's convolutions want it: a VAE is a fifth to a third faster, SDXL's UNet a twentieth. The
        # miniature's UNet, of few channels, is slower that way.
        diffusion.vae.to(memory_format=torch.channels_last)
        if spec.native_size >= 512:
            diffusion.unet.to(memory_format=torch.channels_last)
    networks = {name: diffusion.components[name] for name in NETWORKS[spec.family]}
    merger = WeightMerger(folder, networks, keep=plan is not None and plan.keep_pristine)
    if small:
        to_fp8(diffusion.unet, multiply=False, device=device)
        for name in ("unet", "vae"):
            diffusion.components[name].to(device)
        for name in NETWORKS[spec.family][1:]:
            use_only_while_called(networks[name], device)
    if spec.lcm_lora:
        [listed] = (file for file in manifest.files if file.path == LCM_LORA)
        try:
            merger.lcm_lora = merger.read(folder / LCM_LORA, listed.sha256)
        except LoraError as error:
            shown = f"weights/{folder.name}/{LCM_LORA}"
            raise WeightsError(f"{shown} {error.sentence}; run: {manifest.fix(spec.fix)}") from None
        logger.info("fused the LCM-LoRA into %d layers", merger.apply(Mix()))
    return diffusion, merger


def load_tiny_vae(
    folder: Path, manifest: Manifest, fix: str, device: torch.device, dtype: torch.dtype
) -> AutoencoderTiny:
    """The small VAE in `folder`. Raises WeightsError where there is none."""
    if not any(file.path.startswith(f"{TINY_VAE}/") for file in manifest.files):
        # Saved by an earlier version.
        raise WeightsError(f"weights/{folder.name}/{TINY_VAE} is missing; run: {manifest.fix(fix)}")
    vae = AutoencoderTiny.from_pretrained(folder / TINY_VAE, use_safetensors=True, local_files_only=True)
    vae.to(device, dtype).eval().requires_grad_(False)
    if device.type == "cpu":
        vae.to(memory_format=torch.channels_last)
    return vae


def use_only_while_called(network: nn.Module, device: torch.device) -> None:
    """Keep a network in the host's memory, but for its calls: each moves it to `device` and back."""

    def fetch(module: nn.Module, *_: object) -> None:
        module.to(device)

    def give_back(module: nn.Module, *_: object) -> None:
        module.to("cpu")

    network.to("cpu")
    network.register_forward_pre_hook(fetch)
    network.register_forward_hook(give_back, always_call=True)  # after a failure, too


def _load_verified(
    folder: Path, spec: ModelSpec, manifest: Manifest, verify: str, device: torch.device, dtype: torch.dtype
) -> Diffusion:
    """Hash every file while it is loaded: both read the disk, and together no longer than either alone."""

    def load() -> Diffusion:
        only = {"use_safetensors": True, "local_files_only": True}
        plain = {"add_watermarker": False} if spec.family == "sdxl" else {"safety_checker": None}
        kind = PIPELINES[spec.family]
        return kind.from_pretrained(folder, dtype=dtype, device_map=device.type, **only, **plain)

    if verify == "size":
        logger.warning("FEWSTEP_VERIFY is size: a damaged file of the right length will not be noticed")
        return load()
    with ThreadPoolExecutor(1, "verify") as thread:
        hashed = thread.submit(check_hashes, folder, manifest, fix=spec.fix)
        try:
            return load()
        finally:
            hashed.result()  # when loading failed because of damaged bytes, this says so, and which
