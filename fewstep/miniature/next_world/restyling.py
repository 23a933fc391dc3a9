"""Three styles for the world: its things flat, all of it in ink, and the light of a golden hour."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image

from fewstep.miniature.next_world.drawing import draw
from fewstep.miniature.next_world.scenes import NextScene


def golden_hour(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Put low golden light on the left and violet shade on the right."""
    x = np.linspace(0, 1, image.width)[None, :, None]
    light = np.array([255.0, 170.0, 70.0]) * (1 - x) + np.array([120.0, 40.0, 170.0]) * x
    share = rng.uniform(0.25, 0.32)
    return Image.fromarray(((1 - share) * np.asarray(image) + share * light).astype(np.uint8))


def _golden(scene: NextScene, seed: int, width: int, height: int) -> Image.Image:
    return golden_hour(draw(scene, seed, width, height), np.random.default_rng((seed, 1)))


STYLES: dict[str, Callable[[NextScene, int, int, int], Image.Image]] = {
    "flat": partial(draw, hand="flat"),
    "ink": partial(draw, hand="ink"),
    "golden-hour": _golden,
}
