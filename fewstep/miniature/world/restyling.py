"""Three styles for the miniature's world, made from finished drawings, and how much of one an image has.

What a style leaves alone is still read by the judge, which has never seen it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from fewstep.miniature.world.dataset import Images, Pixels
from fewstep.miniature.world.drawing import draw
from fewstep.miniature.world.scenes import ATTRIBUTES, Scene

SUPERSAMPLING = 3
CELLS = 3  # of the image, each way, for the meter


def postcard(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Add a cream border with rounded corners."""
    unit = min(image.size)
    big = (SUPERSAMPLING * image.width, SUPERSAMPLING * image.height)
    margin, radius = SUPERSAMPLING * unit * rng.uniform(0.05, 0.06), SUPERSAMPLING * 0.10 * unit
    mask = Image.new("L", big)
    box = (margin, margin, big[0] - margin, big[1] - margin)
    ImageDraw.Draw(mask).rounded_rectangle(box, radius, fill=255)
    sheet = Image.new("RGB", image.size, (252, 246, 230))
    sheet.paste(image, mask=mask.resize(image.size, Image.Resampling.BOX))
    return sheet


def spotlight(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Put light on the middle and violet dark in the corners."""
    y, x = np.mgrid[0 : image.height, 0 : image.width]
    reach = rng.uniform(0.60, 0.65)
    away = np.hypot(x / image.width - 0.5, y / image.height - 0.55)[..., None] / reach
    lit = 1 - 0.85 * np.clip((away - 0.45) / 0.55, 0, 1) ** 1.5
    dark = np.array([16.0, 8.0, 28.0])
    return Image.fromarray((lit * np.asarray(image) + (1 - lit) * dark).astype(np.uint8))


def golden_hour(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Put low golden light on the left and violet shade on the right."""
    x = np.linspace(0, 1, image.width)[None, :, None]
    light = np.array([255.0, 170.0, 70.0]) * (1 - x) + np.array([120.0, 40.0, 170.0]) * x
    share = rng.uniform(0.19, 0.25)
    return Image.fromarray(((1 - share) * np.asarray(image) + share * light).astype(np.uint8))


@dataclass(frozen=True)
class Style:
    """How a drawing is restyled, and the attributes that the judge still reads in at least 98 % of them."""

    restyle: Callable[[Image.Image, np.random.Generator], Image.Image]
    leaves: tuple[str, ...]


STYLES = {
    "postcard": Style(postcard, ("object", "colour", "position")),
    "spotlight": Style(spotlight, ("object", "colour", "position")),
    "golden-hour": Style(golden_hour, tuple(ATTRIBUTES)),
}


def draw_restyled(name: str, scenes: list[Scene], seed: int, width: int, height: int) -> Pixels:
    """Return drawings of `scenes` in a style, uint8 (N, height, width, 3); image i comes from seed `seed +
    i`."""
    seeded = [(draw(scene, seed + i, width, height), (seed + i, 1)) for i, scene in enumerate(scenes)]
    restyle = STYLES[name].restyle
    return np.stack([np.asarray(restyle(image, np.random.default_rng(own))) for image, own in seeded])


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
