"""The dtype that a device generates and trains in."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fewstep.models import device as placement
from fewstep.models.device import autocast, fast_dtype

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
