"""Three styles for the miniature's world, and how much of one an image has: things drawn flat, all of it in
ink, and the light of a golden hour.

What a style leaves alone the judge reads in it, too, since it has learnt from drawings in every style.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from fewstep.miniature.world.dataset import Draw, Images, Pixels
from fewstep.miniature.world.drawing import draw
from fewstep.miniature.world.scenes import Scene
from fewstep.miniature.world.words import ATTRIBUTES

CELLS = 3  # of the image, each way, for the meter


def golden_hour(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Put low golden light on the left and violet shade on the right."""
    x = np.linspace(0, 1, image.width)[None, :, None]
    light = np.array([255.0, 170.0, 70.0]) * (1 - x) + np.array([120.0, 40.0, 170.0]) * x
    share = rng.uniform(0.25, 0.32)
    return Image.fromarray(((1 - share) * np.asarray(image) + share * light).astype(np.uint8))


def _golden(scene: Scene, seed: int, width: int, height: int) -> Image.Image:
    return golden_hour(draw(scene, seed, width, height), np.random.default_rng((seed, 1)))


@dataclass(frozen=True)
class Style:
    """How a scene is drawn in a style, and the attributes that it leaves alone."""

    draw: Draw
    leaves: tuple[str, ...]


UNCOLOURED = ("things", *ATTRIBUTES)
STYLES = {
    "flat": Style(partial(draw, hand="flat"), (*UNCOLOURED, "colours")),
    # A wash leaves little between a desert and snow.
    "ink": Style(partial(draw, hand="ink"), tuple(one for one in UNCOLOURED if one != "ground")),
    "golden-hour": Style(_golden, (*UNCOLOURED, "colours")),
}


class StyleMeter:
    """How much of a style images have: 0 as plain ones, 1 as restyled ones.

    Fisher's linear discriminant (1936) on means, spreads and fine detail of colour in 3 x 3 cells, fitted to
    `plain` and `styled`, both uint8 (N, H, W, 3).
    """

    def __init__(self, plain: Pixels, styled: Pixels) -> None:
        low, high = describe_cells(plain), describe_cells(styled)
        within = np.cov(low, rowvar=False) + np.cov(high, rowvar=False)
        # A little of every feature's own size, since some hardly vary.
        within += 1e-3 * np.trace(within) / len(within) * np.eye(len(within))
        self.direction = np.linalg.solve(within, high.mean(0) - low.mean(0))
        self.zero, self.one = float((low @ self.direction).mean()), float((high @ self.direction).mean())

    def __call__(self, images: Images) -> npt.NDArray[np.float64]:
        """Return one number for each image."""
        along: npt.NDArray[np.float64] = describe_cells(images) @ self.direction
        return (along - self.zero) / (self.one - self.zero)


def describe_cells(images: Images) -> npt.NDArray[np.float64]:
    """Return (N, 81): of each channel in each cell the mean, the spread, and how far it is from its blurred
    self."""
    rows = []
    for pixels in images:
        image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
        sharp = np.asarray(image, dtype=np.float64) / 255
        detail = np.abs(sharp - np.asarray(image.filter(ImageFilter.GaussianBlur(2)), dtype=np.float64) / 255)
        for cell, within in zip(_cells(sharp), _cells(detail), strict=True):
            rows += [cell.mean((0, 1)), cell.std((0, 1)), within.mean((0, 1))]
    return np.concatenate(rows).reshape(len(images), -1)


def _cells(image: npt.NDArray[np.float64]) -> list[npt.NDArray[np.float64]]:
    return [cell for band in np.array_split(image, CELLS) for cell in np.array_split(band, CELLS, 1)]
