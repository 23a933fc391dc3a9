"""Where a model runs, in which dtype, and in which order its memory is."""

from __future__ import annotations

import torch

from fewstep.errors import SettingsError
from fewstep.models import ModelSpec
from fewstep.settings import Settings
from fewstep.text_encoding import Diffusion

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def name_of(dtype: torch.dtype) -> str:
    """As settings and tables write it."""
    return next(name for name, one in DTYPES.items() if one == dtype)


def device_and_dtype(settings: Settings) -> tuple[torch.device, torch.dtype]:
    """What `settings` come to on this machine. Raises SettingsError for a device that is not there."""
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise SettingsError("FEWSTEP_DEVICE is cuda, but torch sees no CUDA device; set it to cpu or auto")
    automatic = "fp16" if name == "cuda" else "bf16" if _multiplies_bf16() else "fp32"
    return torch.device(name), DTYPES[automatic if settings.dtype == "auto" else settings.dtype]


def _multiplies_bf16() -> bool:
    """Whether this CPU itself does; where it must be emulated, fp32 is faster."""
    able = torch.cpu.get_capabilities()
    return any(able.get(unit, False) for unit in ("avx512_bf16", "amx_bf16"))


def order_channels_last(diffusion: Diffusion, spec: ModelSpec) -> None:
    """As a CPU's convolutions want it: a VAE is a fifth to a third faster, SDXL's UNet a twentieth. The
    miniature's UNet, of few channels, is slower that way."""
    diffusion.vae.to(memory_format=torch.channels_last)
    if spec.native_size >= 512:
        diffusion.unet.to(memory_format=torch.channels_last)
