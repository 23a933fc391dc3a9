"""Where a model runs, in which dtype, and in which order its memory is."""

from __future__ import annotations

import torch

from fewstep.errors import SettingsError
from fewstep.settings import Settings

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def name_of(dtype: torch.dtype) -> str:
    """The name that settings and tables have for `dtype`."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def device_and_dtype(settings: Settings) -> tuple[torch.device, torch.dtype]:
    """What `settings` come to on this machine. Raises SettingsError for a device that is not there."""
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise SettingsError("FEWSTEP_DEVICE is cuda, but torch sees no CUDA device; set it to cpu or auto")
    device = torch.device(name)
    return device, fast_dtype(device) if settings.dtype == "auto" else DTYPES[settings.dtype]


def fast_dtype(device: torch.device, *, training: bool = False) -> torch.dtype:
    """The dtype that `device` generates or trains in when nobody names one.

    A GPU generates in fp16 and trains in bf16, whose range needs no scaled loss. A CPU does both in bf16 if
    it multiplies that itself, and else in fp32: bf16 that is emulated is four times slower than that.
    """
    if device.type == "cpu":
        return torch.bfloat16 if _multiplies_bf16() else torch.float32
    return torch.float16 if device.type == "cuda" and not training else torch.bfloat16


def autocast(device: torch.device) -> torch.autocast:
    """Autocast to what `device` trains in, whatever the caller's; off where that is fp32."""
    dtype = fast_dtype(device, training=True)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def _multiplies_bf16() -> bool:
    """Whether this CPU itself does, and torch's kernels for it may."""
    # ATEN_CPU_CAPABILITY can hold torch to less than the CPU is capable of.
    if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX", "AVX2"):
        return False
    able = torch.cpu.get_capabilities()
    return any(able.get(unit, False) for unit in ("avx512_bf16", "amx_bf16"))
