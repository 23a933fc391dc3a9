"""What a file costs, in milliseconds and bytes of an image of 1024 px, and a start, in seconds."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from fewstep.benchmark.measure import in_turns, only, serving, spread
from fewstep.benchmark.systems import PROMPT, fewstep
from fewstep.benchmark.worker import generate_captions
from fewstep.coglet.server import ROOT
from fewstep.errors import ServerFailed
from fewstep.evaluation.figures import grid

SIDE = 1024
ENCODERS: tuple[tuple[str, dict[str, Any]], ...] = (
    *(("webp", {"quality": 90, "method": method}) for method in range(7)),
    *(("jpeg", {"quality": 90, "subsampling": kept}) for kept in ("4:4:4", "4:2:0")),
    ("jpeg", {"quality": 90, "subsampling": "4:4:4", "optimize": True}),
    *(("png", {"compress_level": level}) for level in (0, 1, 2, 3, 6, 9)),
)


def large_image(weights: Path) -> Image.Image:
    """Generate an image of 1024 px, tiled from the miniature's."""
    system, columns = fewstep("miniature", weights, 128), SIDE // 128
    return grid(generate_captions(system, columns**2), columns, gap=0)


def measure_encoders(image: Image.Image, repeats: int) -> list[dict[str, Any]]:
    """Return a row for each of ENCODERS: the format and the settings of its encoder."""
    sizes = [0] * len(ENCODERS)

    def encode_ms(i: int) -> float:
        file, (kind, options) = io.BytesIO(), ENCODERS[i]
        started = time.perf_counter()
        image.save(file, kind, **options)
        sizes[i] = len(file.getvalue())
        return 1000 * (time.perf_counter() - started)

    times, rows = in_turns({i: partial(encode_ms, i) for i in range(len(ENCODERS))}, repeats), []
    for i, (kind, options) in enumerate(ENCODERS):
        settings = " ".join(f"{name}={value}" for name, value in options.items())
        rows.append({"format": kind, "options": settings, **spread("ms", times[i], 1), "bytes": sizes[i]})
    return rows


def measure_starts(weights: Path, repeats: int) -> list[dict[str, Any]]:
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
