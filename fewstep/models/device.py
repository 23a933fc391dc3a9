"""Where a model runs, in which dtype, and in which order its memory is."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from fewstep.errors import SettingsError
from fewstep.settings import Settings

logger = logging.getLogger(__name__)

NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
# Turing's, of the T4 and the 20 series: the oldest whose matrix units multiply fp16.
LEAST_CAPABILITY = (7, 5)
# What libraries say of a device that answers no more, torch's own errors having a type; of its memory; and of
# what cannot be recorded, in some form, or is not offered, which harms nothing else.
DEVICE_ERRORS = ("CUDA error", "cuDNN error")
NO_MEMORY = ("CUDA error: out of memory", "STATUS_ALLOC_FAILED")
HARMLESS = ("captur", "STATUS_NOT_SUPPORTED", "STATUS_INVALID_VALUE", "STATUS_BAD_PARAM")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def name_of(dtype: torch.dtype) -> str:
    """The name that settings and tables have for `dtype`."""
    return next(name for name, known in DTYPES.items() if known == dtype)


def device_and_dtype(settings: Settings) -> tuple[torch.device, torch.dtype]:
    """What `settings` come to on this machine. Raises SettingsError for a device that cannot be used.

    fp32 is fp32 on a GPU too: TF32, which keeps 10 of its 23 bits, is switched off for the process.
    """
    name = settings.device
    if name != "cpu":
        problem = _cuda_problem()
        if problem and name == "cuda":
            raise SettingsError(f"FEWSTEP_DEVICE is cuda, but {problem}; set it to cpu or auto")
        if problem and NVIDIA_DRIVER.exists():  # there is a GPU, which somebody counts on
            logger.warning("generating on the CPU, which is slow: %s", problem)
        name = "cpu" if problem else "cuda"
    device = torch.device(name)
    dtype = fast_dtype(device) if settings.dtype == "auto" else DTYPES[settings.dtype]
    if device.type == "cuda" and dtype == torch.float32:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return device, dtype


def _cuda_problem() -> str:
    """Why torch cannot use a GPU here; empty if it can."""
    if torch.version.cuda is None:
        return "this torch was built for CPUs alone"
    if not torch.cuda.is_available():
        return f"torch sees no CUDA device; CUDA {torch.version.cuda} needs a GPU and a driver that is as new"
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        found, least = (".".join(map(str, each)) for each in (capability, LEAST_CAPABILITY))
        return f"the GPU's compute capability is {found}, and fp16 wants {least}"
    return ""


def is_device_error(error: BaseException | None) -> bool:
    """Whether `error` says that the device is lost to this process: any of CUDA's but a lack of memory,
    what ends the recording of a graph, and what a library does not offer.

    After one, all that is asked of the device fails, until the process is started anew.
    """
    if error is None or is_out_of_memory(error) or any(text in str(error) for text in HARMLESS):
        return False
    lost = isinstance(error, RuntimeError) and any(text in str(error) for text in DEVICE_ERRORS)
    return lost or isinstance(error, torch.AcceleratorError) or is_device_error(error.__cause__)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that the GPU's memory does not do, by torch's own or a library's allocation."""
    by_others = isinstance(error, RuntimeError) and any(text in str(error) for text in NO_MEMORY)
    return by_others or isinstance(error, torch.OutOfMemoryError)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor`, of the host's memory, on `device`, without a wait for what is computed there."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(*tensors: Tensor) -> list[Tensor]:
    """Contiguous copies in the host's memory, after one wait for the device that computes `tensors`."""
    if tensors[0].device.type == "cpu":
        return [tensor.contiguous() for tensor in tensors]
    # Into pinned memory, which the device writes by itself.
    copies = [
        torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(
            tensor.contiguous(), non_blocking=True
        )
        for tensor in tensors
    ]
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return copies


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
