"""Three styles for the world: its things flat, all of it in ink, and the light of a golden hour."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image

from fewstep.miniature.next_world.drawing import draw, draw_thing
from fewstep.miniature.next_world.scenes import NextScene, Placed
from fewstep.miniature.next_world.things import PAPER
from fewstep.miniature.world.canvas import Canvas

INK = (44, 46, 58)


def put_ink(c: Canvas, image: Image.Image, place: str, thing: Placed) -> None:
    """Turn what is drawn so far into a wash of ink on paper, and put `thing` into it as lines."""
    if place == c.scene.position:  # the first
        grey = np.asarray(image.convert("L"), np.float64)[..., None] / 255
        # Four tones and what lies between, as a brush has them.
        tones = 0.55 * grey + 0.45 * np.round(grey * 4) / 4
        washed = np.array(INK) + (np.array(PAPER) - np.array(INK)) * (0.25 + 0.75 * tones)
        image.paste(Image.fromarray(washed.round().astype(np.uint8)))
    draw_thing(c, image, place, thing, "ink")


def golden_hour(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Put low golden light on the left and violet shade on the right."""
    x = np.linspace(0, 1, image.width)[None, :, None]
    light = np.array([255.0, 170.0, 70.0]) * (1 - x) + np.array([120.0, 40.0, 170.0]) * x
    share = rng.uniform(0.25, 0.32)
    return Image.fromarray(((1 - share) * np.asarray(image) + share * light).astype(np.uint8))


def _golden(scene: NextScene, seed: int, width: int, height: int) -> Image.Image:
    return golden_hour(draw(scene, seed, width, height), np.random.default_rng((seed, 1)))


STYLES: dict[str, Callable[[NextScene, int, int, int], Image.Image]] = {
    "flat": partial(draw, put=partial(draw_thing, hand="flat")),
    "ink": partial(draw, put=put_ink),
    "golden-hour": _golden,
}
