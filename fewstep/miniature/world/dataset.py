"""The drawn training set: scenes and their images, drawn once by all cores and kept on disk."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from fewstep.miniature.world.drawing import draw
from fewstep.miniature.world.scenes import Scene, caption, draw_scenes
from fewstep.training.data import write_captioned

logger = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]  # (N, H, W, 3)
Images: TypeAlias = Sequence[Image.Image] | Pixels
Draw: TypeAlias = Callable[[Scene, int, int, int], Image.Image]  # with a seed, a width and a height in px


def draw_many(scenes: list[Scene], seed: int, width: int, height: int, how: Draw = draw) -> Pixels:
    """Return images of `scenes`, uint8 (N, height, width, 3); image i is drawn with seed `seed + i`."""
    return np.stack([np.asarray(how(scene, seed + i, width, height)) for i, scene in enumerate(scenes)])


def to_tensor(pixels: Pixels) -> Tensor:
    """uint8 (N, H, W, 3) -> (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.array(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def cached_images(
    path: Path, scenes: list[Scene], seed: int, width: int, height: int, how: Draw = draw
) -> Pixels:
    """Return `draw_many` by all cores, kept in the .npy file `path` and memory-mapped from there."""
    if not path.exists():
        logger.info("drawing %d pictures of %d x %d", len(scenes), width, height)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npy")
        out = np.lib.format.open_memmap(part, "w+", np.uint8, (len(scenes), height, width, 3))
        starts = range(0, len(scenes), 256)
        with ProcessPoolExecutor() as pool:
            jobs = [pool.submit(draw_many, scenes[s : s + 256], seed + s, width, height, how) for s in starts]
            for start, job in zip(starts, jobs, strict=True):
                out[start : start + 256] = job.result()
        out.flush()
        part.replace(path)
    return np.load(path, mmap_mode="r")  # type: ignore[no-any-return]


def write_images(folder: Path, scenes: list[Scene], seed: int, side: int = 256) -> None:
    """Write drawings of `scenes`, `side` px square, into `folder`, with captions; once."""
    rng = random.Random(seed)
    captions = [caption(scene, rng) for scene in scenes]
    write_captioned(
        folder, captions, lambda: (draw(scene, seed + i, side, side) for i, scene in enumerate(scenes))
    )


def write_world(folder: Path, count: int, side: int = 256) -> None:
    """Write images of such scenes as the base was trained on, `side` px square."""
    write_images(folder, draw_scenes(count, 31), 90_000_000, side)


def training_captions(count: int) -> list[str]:
    """Return `count` captions of such scenes as the base was trained on, always the same ones."""
    rng = random.Random(17)
    return [caption(scene, rng) for scene in draw_scenes(count, 17)]
