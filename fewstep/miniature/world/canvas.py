"""One image in the making: its pixels, its random numbers, its light, and the strokes that all drawers
share."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from fewstep.miniature.world.scenes import Scene

Colour = tuple[int, int, int]

SUPERSAMPLING = 2
HORIZON = 0.60  # of the height, before jitter

PALETTE = tomllib.loads(Path(__file__).with_name("palette.toml").read_text(encoding="utf-8"))


def mix(a: Sequence[float], b: Sequence[float], t: float) -> Colour:
    """Return a mixture, from colour a (t = 0) to colour b (t = 1)."""
    return tuple(round(x + (y - x) * t) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


class Canvas:
    """Lengths are in pixels of the enlarged canvas; `unit` is its shorter side."""

    def __init__(self, scene: Scene, seed: int, width: int, height: int) -> None:
        self.scene = scene
        self.rng = np.random.default_rng([seed, *scene.labels])
        self.size = (width, height)
        self.w, self.h = width * SUPERSAMPLING, height * SUPERSAMPLING
        self.unit = min(self.w, self.h)
        self.horizon = self.h * (HORIZON + self.uniform(-0.03, 0.03))
        self.tint, self.land_light, self.thing_light = PALETTE["light"][scene.sky].values()
        self.dark = scene.sky in ("night", "aurora")
        self.image = self.gradient(PALETTE["sky"][scene.sky], 0, self.h)
        self.pen = ImageDraw.Draw(self.image, "RGBA")

    def uniform(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def lit(self, colour: Sequence[float]) -> Colour:
        return mix(colour, self.tint, self.land_light)

    def gradient(self, colours: Sequence[Colour], top: float, bottom: float) -> Image.Image:
        """Return a vertical gradient through `colours`, as wide as the canvas."""
        rows = max(1, round(bottom) - round(top))
        stops = np.linspace(0, rows - 1, len(colours))
        strip = [np.interp(np.arange(rows), stops, channel) for channel in zip(*colours, strict=True)]
        column = Image.fromarray(np.stack(strip, 1).astype(np.uint8)[:, None, :])
        return column.resize((self.w, rows), Image.Resampling.NEAREST)

    def glow(self, x: float, y: float, radius: float, colour: Colour, strength: int = 14) -> None:
        for step in range(12, 0, -1):
            self.disc(x, y, radius * (1 + 0.22 * step), (*colour, strength))

    def disc(self, x: float, y: float, radius: float, colour: tuple[int, ...]) -> None:
        self.pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)

    def scatter(self, count: int) -> list[tuple[float, float, float]]:
        """Return (x, y, depth) of `count` things on the ground, far to near; depth is 0 at the horizon and 1
        at our feet."""
        depths, ground = np.sort(self.rng.random(count) ** 0.8), self.h - self.horizon
        return [(self.uniform(0, self.w), self.horizon + d * ground, float(d)) for d in depths]

    def veil(self, top: float, bottom: float, alpha_top: int, alpha_bottom: int) -> None:
        rows = max(1, round(bottom) - round(top))
        alpha = np.linspace(alpha_top, alpha_bottom, rows).astype(np.uint8)[:, None]
        mask = Image.fromarray(alpha).resize((self.w, rows), Image.Resampling.NEAREST)
        self.image.paste((226, 229, 228), (0, round(top)), mask)
