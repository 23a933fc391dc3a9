"""The modules that must start in a blink load none of the heavy libraries, not even through each other."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate", "numpy")
LIGHT = [
    f"fewstep.{name}"
    for name in (
        "errors",
        "settings",
        "models.specs",
        "models.sources",
        "models.manifest",
        "prompts",
        "request",
        "images.codec",
        "images.metadata",
        "images.outputs",
        "lora.fetch",
        "lora.resolve",
        "generation.batcher",
        "coglet.server",
        "coglet.adapter",
        "web.app",
        "cli.web",
    )
]


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_module_loads_nothing_heavy(module):
    # A fresh process, in which nothing else has loaded anything.
    script = f"import sys, {module}; print(*sorted(set({HEAVY}) & set(sys.modules)))"
    command = [sys.executable, "-c", script]

    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)

    assert (result.returncode, result.stdout.split(), result.stderr) == (0, [], "")
