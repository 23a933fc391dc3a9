"""What a start takes, in seconds: of the shell's command, of a server, and of the imports in both."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from fewstep.benchmark.measure import in_turns, only, serving, spread
from fewstep.benchmark.systems import PROMPT
from fewstep.coglet.server import ROOT
from fewstep.errors import ServerFailed


def measure(weights: Path, repeats: int) -> list[dict[str, Any]]:
    """Return a row for the shell's command, to its image; for a server, to READY; and for the imports."""
    ready = partial(ready_s, weights)
    taken = in_turns({"scripts/predict": predict_s, "server to READY": ready, "imports": import_s}, repeats)
    return [{"what": what, **spread("seconds", seconds, 2)} for what, seconds in taken.items()]


def predict_s() -> float:
    """Measure scripts/predict, from the shell's call to the written image."""
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "out.webp")
        command = [str(ROOT / "scripts" / "predict"), "-i", f"prompt={PROMPT}", "-o", str(image)]
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True)
        seconds = time.perf_counter() - started
        if done.returncode or not image.exists():
            raise ServerFailed(f"scripts/predict painted nothing: {done.stderr.strip()[-200:]}")
    return seconds


def ready_s(weights: Path) -> float:
    """Measure the container's server, from its start to READY; the first image has been generated then."""
    started = time.perf_counter()
    with serving(only(weights)):
        return time.perf_counter() - started


def import_s() -> float:
    """Measure what the model thread imports, torch and diffusers among it, in a bare interpreter."""
    command = [sys.executable, "-P", "-c", "import fewstep.generation.pipeline"]
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return time.perf_counter() - started
