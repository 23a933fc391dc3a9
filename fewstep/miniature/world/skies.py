"""What stands in the sky: sun, moon, clouds, stars, an aurora; and the weather in front of everything."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageFilter

from fewstep.miniature.world.canvas import Canvas, Colour

# Three colours from the zenith to the horizon.
SKY_COLOURS: dict[str, tuple[Colour, Colour, Colour]] = {
    "day": ((48, 128, 222), (120, 186, 242), (206, 232, 250)),
    "sunset": ((86, 58, 138), (238, 110, 92), (255, 206, 112)),
    "night": ((8, 12, 40), (18, 28, 74), (44, 58, 112)),
    "rain": ((88, 98, 112), (116, 126, 138), (150, 158, 166)),
    "fog": ((206, 212, 214), (218, 222, 222), (228, 230, 228)),
    "aurora": ((8, 16, 44), (12, 42, 66), (26, 78, 88)),
}


def clouds(c: Canvas, colour: Colour, alpha: int, count: int, low: float = 0.06, high: float = 0.32) -> None:
    for _ in range(count):
        x, y = c.uniform(0, c.w), c.h * c.uniform(low, high)
        size = c.unit * c.uniform(0.035, 0.06)
        for dx, dy, scale in ((-1.5, 0.25, 0.8), (-0.5, -0.2, 1.15), (0.7, -0.05, 1.0), (1.7, 0.3, 0.7)):
            c.disc(x + dx * size, y + dy * size, size * scale, (*colour, alpha))
        c.pen.rectangle(
            (x - 1.9 * size, y + 0.3 * size, x + 2.1 * size, y + 1.0 * size), fill=(*colour, alpha)
        )


def stars(c: Canvas, count: int) -> None:
    for _ in range(count):
        x, y = c.uniform(0, c.w), c.uniform(0, c.horizon * 0.85)
        c.disc(x, y, c.unit * c.uniform(0.006, 0.010), (255, 255, 236, 255))


def draw_day(c: Canvas) -> None:
    x, y = c.w * c.uniform(0.1, 0.9), c.h * c.uniform(0.09, 0.18)
    c.glow(x, y, c.unit * 0.055, (255, 248, 200))
    c.disc(x, y, c.unit * 0.062, (255, 240, 150))
    clouds(c, (255, 255, 255), 225, 3)


def draw_sunset(c: Canvas) -> None:
    x, y = c.w * c.uniform(0.12, 0.88), c.horizon - c.unit * c.uniform(0.10, 0.22)
    c.glow(x, y, c.unit * 0.08, (255, 226, 120), 16)
    c.disc(x, y, c.unit * 0.085, (255, 236, 160))
    clouds(c, (255, 150, 120), 120, 3, 0.05, 0.25)


def draw_night(c: Canvas) -> None:
    stars(c, 16)
    x, y = c.w * c.uniform(0.12, 0.88), c.h * c.uniform(0.11, 0.2)
    c.glow(x, y, c.unit * 0.055, (190, 200, 255), 6)
    c.disc(x, y, c.unit * 0.062, (250, 246, 214))
    c.disc(x + c.unit * 0.02, y - c.unit * 0.015, c.unit * 0.012, (224, 218, 186))


def draw_rain(c: Canvas) -> None:
    clouds(c, (78, 86, 98), 235, 5, 0.02, 0.16)
    clouds(c, (104, 112, 124), 200, 3, 0.02, 0.2)


def draw_fog(c: Canvas) -> None:
    c.disc(
        c.w * c.uniform(0.15, 0.85),
        c.h * c.uniform(0.1, 0.2),
        c.unit * 0.06,
        (246, 246, 238, 170),
    )


def draw_aurora(c: Canvas) -> None:
    stars(c, 8)
    xs = np.arange(c.w)
    layer = np.zeros((c.h, c.w, 4), np.float32)
    ys = np.arange(c.h)[:, None]
    for colour, base in (((60, 250, 160), 0.36), ((150, 90, 240), 0.22)):
        phase, waves = c.uniform(0, 6.28), c.uniform(1.2, 2.2)
        foot = c.h * (base + 0.07 * np.sin(phase + waves * 2 * math.pi * xs / c.w))
        rays = 0.8 + 0.2 * np.sin(phase * 3 + xs / c.unit * c.uniform(22, 28))
        fade = np.clip((ys - (foot - 0.32 * c.h)) / (0.32 * c.h), 0, 1) ** 1.6 * (ys < foot + 0.02 * c.h)
        alpha = (fade * rays)[..., None] * 0.85
        layer[..., :3] = layer[..., :3] * (1 - alpha) + np.array(colour) * alpha
        layer[..., 3:] = np.maximum(layer[..., 3:], alpha * 255)
    curtain = Image.fromarray(layer.astype(np.uint8), "RGBA").filter(ImageFilter.BoxBlur(c.unit / 100))
    c.image.paste(curtain, (0, 0), curtain)


def draw_wisps(c: Canvas) -> None:
    for _ in range(4):
        x, y = c.uniform(0, c.w), c.horizon + c.unit * c.uniform(-0.1, 0.34)
        wide, tall = c.unit * c.uniform(0.3, 0.5), c.unit * c.uniform(0.02, 0.035)
        c.pen.ellipse((x - wide, y - tall, x + wide, y + tall), fill=(236, 238, 238, 105))


def draw_raindrops(c: Canvas) -> None:
    for _ in range(22):
        x, y, long = (
            c.uniform(0, c.w * 1.1),
            c.uniform(-0.05 * c.h, c.h),
            c.unit * c.uniform(0.09, 0.12),
        )
        c.pen.line(
            (x, y, x - 0.3 * long, y + long),
            fill=(214, 226, 240, 190),
            width=max(1, round(c.unit * 0.009)),
        )


SKY_DRAWERS: dict[str, Callable[[Canvas], None]] = {
    "day": draw_day,
    "sunset": draw_sunset,
    "night": draw_night,
    "rain": draw_rain,
    "fog": draw_fog,
    "aurora": draw_aurora,
}
