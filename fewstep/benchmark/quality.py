"""What speed costs: each system's images beside those that plain diffusers generates in fp32, and, of the
miniature, what its judge reads in them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from fewstep.benchmark.systems import System, Wish
from fewstep.miniature.judge import load_judge, score
from fewstep.miniature.scoring import held_out_captions

EXACT = "diffusers"  # the system that the others are compared with
BATCH = 4


def generate_captions(system: System, count: int) -> list[Image.Image]:
    """One image in 4 steps of each of the judge's first `count` captions."""
    _, captions = held_out_captions(count)
    images: list[Image.Image] = []
    for start in range(0, count, BATCH):
        prompts = captions[start : start + BATCH]
        wish = Wish(128, batch=len(prompts))
        images += system.generate(wish, prompts, range(start, start + len(prompts)))
    return images


def all_right(pictures: Path, count: int, weights: Path) -> float:
    """Percent of the `count` captions whose image shows all that was asked, as the judge reads it."""
    scenes, _ = held_out_captions(count)
    judge = load_judge(weights / "miniature" / "judge" / "judge.safetensors")
    return float(100 * score(judge, load(pictures, "caption"), scenes).all(1).mean())


def psnr(found: Sequence[Image.Image], expected: Sequence[Image.Image]) -> float:
    """Peak signal-to-noise ratio in dB, the median of the images; inf where they are the same."""
    return statistics.median(_psnr(a, b) for a, b in zip(found, expected, strict=True))


def _psnr(found: Image.Image, expected: Image.Image) -> float:
    error = float(((np.asarray(found, float) - np.asarray(expected, float)) ** 2).mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


def save(images: Sequence[Image.Image], folder: Path, name: str) -> None:
    """As NAME-0.png and so on, in which no pixel is lost."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        image.save(folder / f"{name}-{i}.png", compress_level=1)


def load(folder: Path, name: str) -> list[Image.Image]:
    """What `save` wrote, in its order."""
    paths = sorted(folder.glob(f"{name}-*.png"), key=lambda path: int(path.stem.rpartition("-")[2]))
    return [Image.open(path) for path in paths]
