"""What a file costs: milliseconds and bytes of an image of 1024 px, by format and encoder's settings."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Sequence
from typing import Any

from PIL import Image

SIDE = 1024
OPTIONS: tuple[tuple[str, dict[str, Any]], ...] = (
    *(("webp", {"quality": 90, "method": method}) for method in range(7)),
    *(("jpeg", {"quality": 90, "subsampling": kept}) for kept in ("4:4:4", "4:2:0")),
    ("jpeg", {"quality": 90, "subsampling": "4:4:4", "optimize": True}),
    *(("png", {"compress_level": level}) for level in (0, 1, 2, 3, 6, 9)),
)


def tiled(images: Sequence[Image.Image]) -> Image.Image:
    """One image of SIDE x SIDE px out of as many small ones as it takes."""
    width, height = images[0].size
    columns = SIDE // width
    whole = Image.new("RGB", (SIDE, SIDE))
    for i, image in enumerate(images):
        whole.paste(image, (i % columns * width, i // columns * height))
    return whole


def measure(image: Image.Image, repeats: int) -> list[dict[str, Any]]:
    """A row for each of OPTIONS; the settings are tried in turns, `repeats` times."""
    seconds: list[list[float]] = [[] for _ in OPTIONS]
    sizes = [0] * len(OPTIONS)
    for _ in range(repeats):
        for i, (kind, options) in enumerate(OPTIONS):
            file = io.BytesIO()
            started = time.perf_counter()
            image.save(file, kind, **options)
            seconds[i].append(time.perf_counter() - started)
            sizes[i] = len(file.getvalue())
    return [
        {
            "format": kind,
            "options": " ".join(f"{name}={value}" for name, value in options.items()),
            "ms": round(1000 * statistics.median(spent), 1),
            "least": round(1000 * min(spent), 1),
            "most": round(1000 * max(spent), 1),
            "bytes": size,
        }
        for (kind, options), spent, size in zip(OPTIONS, seconds, sizes, strict=True)
    ]
