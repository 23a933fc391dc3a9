"""The grounds between the horizon and our feet."""

from __future__ import annotations

import math
from collections.abc import Callable

from fewstep.miniature.world.canvas import Canvas, Colour, mix

# Far and near.
GROUND_COLOURS: dict[str, tuple[Colour, Colour]] = {
    "meadow": ((132, 190, 84), (62, 140, 52)),
    "desert": ((240, 208, 140), (214, 162, 88)),
    "snow": ((236, 242, 250), (206, 220, 240)),
    "lake": ((96, 178, 206), (28, 104, 152)),
    "lavender": ((168, 128, 208), (112, 72, 168)),
}


def draw_meadow(c: Canvas) -> None:
    blade = c.lit((40, 112, 44))
    for x, y, depth in c.scatter(9):
        tall = c.unit * (0.02 + 0.03 * depth)
        for lean in (-0.5, 0.0, 0.5):
            c.pen.line((x, y, x + lean * tall, y - tall), fill=blade, width=3)
    for x, y, depth in c.scatter(8):
        petal = c.lit(((255, 250, 250), (255, 224, 90), (244, 130, 170))[int(c.uniform(0, 3))])
        c.disc(x, y, c.unit * (0.009 + 0.009 * depth), petal)


def draw_desert(c: Canvas) -> None:
    for i, share in enumerate((0.16, 0.42, 0.72)):
        y, swell = c.horizon + share * (c.h - c.horizon), c.unit * (0.014 + 0.014 * i)
        phase = c.uniform(0, 6.28)
        crest = [(x, y + swell * math.sin(phase + x / c.w * 5)) for x in range(0, c.w + 9, 8)]
        shade = mix(c.lit((196, 142, 76)), c.lit((240, 208, 140)), 0.2 + 0.2 * i)
        c.pen.line(crest, fill=shade, width=round(c.unit * (0.010 + 0.006 * i)), joint="curve")


def draw_snow(c: Canvas) -> None:
    for _ in range(4):
        x, y = c.uniform(0, c.w), c.uniform(c.horizon + 0.08 * c.h, c.h)
        wide = c.unit * c.uniform(0.2, 0.36)
        c.pen.ellipse((x - wide, y, x + wide, y + 0.3 * wide), fill=c.lit((224, 234, 248)))


def draw_lake(c: Canvas) -> None:
    if c.scene.sky in ("sunset", "night", "aurora"):  # the sky's light on the water
        shine = {
            "sunset": (255, 196, 120, 90),
            "night": (120, 140, 220, 60),
            "aurora": (60, 200, 150, 70),
        }[c.scene.sky]
        c.pen.rectangle((0, c.horizon, c.w, c.horizon + 0.05 * c.h), fill=shine)
    for x, y, depth in c.scatter(13):
        wide = c.unit * (0.05 + 0.09 * depth)
        ripple = c.lit(mix((170, 222, 238), (66, 146, 190), c.uniform(0, 1)))
        c.pen.line(
            (x - wide, y, x + wide, y),
            fill=ripple,
            width=max(1, round(c.unit * 0.009 * (0.6 + depth))),
        )


def draw_lavender(c: Canvas) -> None:
    vanishing = c.w * c.uniform(0.3, 0.7)
    for i in range(-8, 9):
        foot = vanishing + i * c.unit * 0.26
        row = [
            (vanishing + i * c.unit * 0.06, c.horizon),
            (foot - 0.07 * c.unit, c.h),
            (foot + 0.05 * c.unit, c.h),
        ]
        c.pen.polygon(row, fill=c.lit((92, 124, 84)))


GROUND_DRAWERS: dict[str, Callable[[Canvas], None]] = {
    "meadow": draw_meadow,
    "desert": draw_desert,
    "snow": draw_snow,
    "lake": draw_lake,
    "lavender": draw_lavender,
}
