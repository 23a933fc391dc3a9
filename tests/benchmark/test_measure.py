"""What is said of the machine."""

import pytest

from fewstep.benchmark.measure import nvidia_smi

# Answers for the ids that it knows, and leaves the one that was asked for.
NVIDIA_SMI = """#!/bin/sh
for last; do :; done
id="${last#--id=}"
case "$id" in 0 | 2 | GPU-7f) ;; *) echo "No devices were found"; exit 6 ;; esac
case "$*" in *memory.total*) echo 143771 ;; *) echo "NVIDIA H200" ;; esac
echo "$id" > "$(dirname "$0")/id"
"""


@pytest.fixture
def asked(tmp_path, monkeypatch):
    (tmp_path / "nvidia-smi").write_text(NVIDIA_SMI)
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path / "id"


@pytest.mark.parametrize(
    ("visible", "first"), [(None, "0"), ("2", "2"), ("2,0", "2"), (" GPU-7f, 0", "GPU-7f")]
)
def test_the_gpu_is_the_one_that_cuda_takes_first(asked, monkeypatch, visible, first):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert nvidia_smi("name") == "NVIDIA H200"
    assert asked.read_text() == f"{first}\n"


@pytest.mark.parametrize("visible", ["", "-1", "5"])
def test_of_none_that_may_be_used_nothing_is_said(asked, monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert nvidia_smi("name") == ""
    assert not asked.exists()


def test_memory_is_in_gigabytes(asked):
    assert nvidia_smi("memory.total") == "150.75"


def test_without_a_driver_nothing_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert nvidia_smi("name") == ""
