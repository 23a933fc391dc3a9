"""How long a start takes, of the miniature: the shell's command to its image, and a server to READY."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fewstep.benchmark.suites import serving
from fewstep.benchmark.systems import PROMPT
from fewstep.coglet.server import ROOT, ServerFailed


def measure(weights: Path, repeats: int) -> list[dict[str, Any]]:
    """The medians, with the spread, in seconds; what is measured goes in turns, after one of each."""
    measured = {
        "scripts/predict": predict_s,
        "server to READY": lambda: ready_s(weights),
        "imports": import_s,
    }
    seconds: dict[str, list[float]] = {what: [] for what in measured}
    for repeat in range(1 + repeats):
        for what, once in measured.items():
            spent = once()
            if repeat:
                seconds[what].append(round(spent, 2))
    return [
        {"what": what, "seconds": round(statistics.median(one), 2), "least": min(one), "most": max(one)}
        for what, one in seconds.items()
    ]


def predict_s() -> float:
    """Of scripts/predict, from the shell's call to the written image."""
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
    """Of the container's server, from its start to READY; the first image has been generated then."""
    started = time.perf_counter()
    with serving(weights, ROOT):
        return time.perf_counter() - started


def import_s() -> float:
    """Of what the model thread imports: torch, transformers, diffusers and our own, in a bare interpreter."""
    command = [sys.executable, "-P", "-c", "import fewstep.generation.pipeline"]
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    return time.perf_counter() - started
