"""Which device is taken, in which dtype, and when it is lost."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fewstep.errors import SettingsError
from fewstep.models import device as placement
from fewstep.models.device import (
    autocast,
    device_and_dtype,
    fast_dtype,
    is_device_error,
    is_out_of_memory,
    to_device,
    to_host,
)
from fewstep.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
CPU, GPU = torch.device("cpu"), torch.device("cuda")
SAY = """
import torch
from fewstep.models.device import autocast, fast_dtype
cpu, ones = torch.device("cpu"), torch.ones(2, 2)
with autocast(cpu):
    print(fast_dtype(cpu), fast_dtype(cpu, training=True), (ones @ ones).dtype)
"""


def said(**variables: str) -> list[str]:
    """By a process of its own: torch reads the variable once."""
    environ = {name: value for name, value in os.environ.items() if name != "ATEN_CPU_CAPABILITY"}
    done = subprocess.run(
        [sys.executable, "-c", SAY], cwd=ROOT, env=environ | variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="AVX2 is of x86-64")
def test_a_cpu_that_is_held_to_avx2_computes_in_fp32():
    assert said(ATEN_CPU_CAPABILITY="avx2") == ["torch.float32"] * 3


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the kernel does not tell")
def test_a_cpu_computes_in_bf16_if_the_kernel_says_that_it_multiplies_it():
    flags = set(Path("/proc/cpuinfo").read_text().split())
    expected = "torch.bfloat16" if flags & {"avx512_bf16", "amx_bf16"} else "torch.float32"
    assert said() == [expected] * 3


@pytest.mark.parametrize("multiplies", [False, True])
def test_whatever_the_caller_has_on_autocast_is_to_the_devices_own(multiplies, monkeypatch):
    monkeypatch.setattr(placement, "_multiplies_bf16", lambda: multiplies)
    own, ones = torch.bfloat16 if multiplies else torch.float32, torch.ones(2, 2)
    assert fast_dtype(CPU) == fast_dtype(CPU, training=True) == own
    with torch.autocast("cpu", dtype=torch.float16):
        with autocast(CPU):
            assert (ones @ ones).dtype == own
        assert (ones @ ones).dtype == torch.float16
    assert (fast_dtype(GPU), fast_dtype(GPU, training=True)) == (torch.float16, torch.bfloat16)


@pytest.fixture
def card(monkeypatch):
    """A torch that was built for CUDA, and sees a card of a given compute capability, or none."""

    def set_card(capability: tuple[int, int] | None):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)

    return set_card


@pytest.mark.parametrize(
    ("capability", "problem"),
    [
        (None, "sees no CUDA device; CUDA 13.0 needs"),
        ((7, 0), "compute capability is 7.0, and fp16 wants 7.5"),
    ],
)
def test_a_gpu_that_cannot_be_used_ends_the_start_or_is_warned_of(
    card, monkeypatch, caplog, tmp_path, capability, problem
):
    card(capability)
    with pytest.raises(SettingsError, match=problem):
        device_and_dtype(Settings(device="cuda"))
    monkeypatch.setattr(placement, "NVIDIA_DRIVER", tmp_path / "no driver")
    assert device_and_dtype(Settings())[0] == CPU and not caplog.text
    monkeypatch.setattr(placement, "NVIDIA_DRIVER", tmp_path)  # a GPU that somebody counts on
    assert device_and_dtype(Settings())[0] == CPU and problem in caplog.text


def test_a_torch_for_cpus_says_so(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(
        SettingsError, match="FEWSTEP_DEVICE is cuda, but this torch was built for CPUs alone"
    ):
        device_and_dtype(Settings(device="cuda"))


@pytest.mark.parametrize("dtype", ["fp32", "auto"])
def test_fp32_on_a_gpu_keeps_all_its_bits(card, dtype):
    card((9, 0))
    backends = (torch.backends.cudnn, torch.backends.cuda.matmul)  # which monkeypatch cannot set
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = True
        expected = torch.float32 if dtype == "fp32" else torch.float16
        assert device_and_dtype(Settings(dtype=dtype)) == (GPU, expected)
        assert [backend.allow_tf32 for backend in backends] == [dtype != "fp32"] * 2
    finally:
        for backend, allowed in zip(backends, before, strict=True):
            backend.allow_tf32 = allowed


def test_what_says_that_a_device_is_lost():
    lost = (
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling cublasGemmEx"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    )
    assert all(map(is_device_error, lost))
    wrapped = RuntimeError("the encoder failed")
    wrapped.__cause__ = lost[0]
    assert is_device_error(wrapped)
    full = (
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"),
    )
    assert all(map(is_out_of_memory, full)) and not any(map(is_out_of_memory, lost))
    recording = torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture")
    unsupported = RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmul")
    others = (*full, recording, unsupported, RuntimeError("shapes differ"), ValueError("CUDA error"))
    assert not any(map(is_device_error, (None, *others)))


def test_copies_for_the_host_are_contiguous_and_as_they_were():
    rows = torch.arange(6).view(2, 3)
    found, other = to_host(rows.T, rows)
    assert found.is_contiguous() and torch.equal(found, rows.T) and torch.equal(other, rows)
    assert to_device(rows, CPU) is rows
