"""The backdrops that stand on the horizon."""

from __future__ import annotations

from collections.abc import Callable

from fewstep.miniature.world.canvas import Canvas, mix


def draw_mountains(c: Canvas) -> None:
    rock, shade, cap = c.lit((120, 128, 152)), c.lit((84, 92, 122)), c.lit((250, 250, 255))
    for top, jitter, count in ((0.30, 0.05, 3), (0.19, 0.04, 4)):
        for i in range(count):
            x = c.w * ((i + 0.5) / count + c.uniform(-0.4, 0.4) / count)
            tall = c.unit * (top + c.uniform(-jitter, jitter))
            wide, y = tall * c.uniform(0.85, 1.05), c.horizon - tall
            c.pen.polygon([(x - wide, c.horizon), (x, y), (x + wide, c.horizon)], fill=rock)
            c.pen.polygon([(x, y), (x + wide, c.horizon), (x + 0.15 * wide, c.horizon)], fill=shade)
            snow = 0.36
            edge = [
                (x - wide * snow, y + tall * snow),
                (x - wide * 0.14, y + tall * 0.28),
                (x, y + tall * 0.42),
            ]
            edge += [(x + wide * 0.16, y + tall * 0.27), (x + wide * snow, y + tall * snow)]
            c.pen.polygon([(x, y), *edge], fill=cap)


def draw_forest(c: Canvas) -> None:
    for row, (tall, colour) in enumerate(((0.24, (44, 104, 74)), (0.17, (24, 76, 52)))):
        step = c.unit * 0.115
        for i in range(int(c.w / step) + 2):
            x = (i + 0.5 * row) * step - step / 2 + c.uniform(-0.2, 0.2) * step
            high = c.unit * tall * c.uniform(0.78, 1.2)
            paint = c.lit(mix(colour, (90, 150, 90), c.uniform(0, 0.3)))
            for level, wide in ((0.0, 0.42), (0.3, 0.58), (0.58, 0.74)):
                y = c.horizon - high * (1 - level)
                foot = y + high * 0.44
                c.pen.polygon([(x - step * wide, foot), (x, y), (x + step * wide, foot)], fill=paint)


def draw_city(c: Canvas) -> None:
    window = (255, 226, 130, 255) if c.dark or c.scene.sky == "sunset" else (206, 222, 236, 255)
    x = -c.unit * 0.03
    while x < c.w:
        wide, tall = c.unit * c.uniform(0.11, 0.16), c.unit * c.uniform(0.14, 0.36)
        grey = c.lit(mix((86, 96, 122), (140, 146, 166), c.uniform(0, 1)))
        top = c.horizon - tall
        c.pen.rectangle((x, top, x + wide, c.horizon), fill=grey)
        c.pen.rectangle((x + wide * 0.8, top, x + wide, c.horizon), fill=mix(grey, (20, 24, 50), 0.3))
        for row in range(int(tall / (c.unit * 0.062))):
            for column in (0.14, 0.46):
                left, y = x + wide * column, top + c.unit * (0.02 + 0.062 * row)
                c.pen.rectangle((left, y, left + wide * 0.2, y + c.unit * 0.028), fill=window)
        x += wide + c.unit * c.uniform(0.0, 0.012)


def draw_hills(c: Canvas) -> None:
    for top, colour in ((0.22, (126, 168, 138)), (0.13, (96, 152, 104))):
        for i in range(3):
            x = c.w * (i / 2 + c.uniform(-0.2, 0.2))
            wide, tall = c.w * c.uniform(0.36, 0.5), c.unit * top * c.uniform(0.8, 1.25)
            box = (x - wide, c.horizon - tall, x + wide, c.horizon + tall)
            c.pen.ellipse(box, fill=c.lit(mix(colour, (170, 200, 140), c.uniform(0, 0.35))))


def draw_volcano(c: Canvas) -> None:
    x, tall = c.w * c.uniform(0.2, 0.8), c.unit * c.uniform(0.34, 0.4)
    y, rim, wide = c.horizon - tall, c.unit * 0.055, c.unit * 0.46
    for step in range(6):
        drift = c.unit * 0.026 * step * (1 if c.uniform(0, 1) < 0.9 else -1)
        c.disc(
            x + drift,
            y - c.unit * 0.045 * step,
            c.unit * (0.04 + 0.011 * step),
            (112, 104, 108, 190),
        )
    cone = [(x - wide, c.horizon), (x - rim, y), (x + rim, y), (x + wide, c.horizon)]
    c.pen.polygon(cone, fill=c.lit((112, 78, 70)))
    c.pen.polygon(
        [(x, y), (x + rim, y), (x + wide, c.horizon), (x + 0.12 * wide, c.horizon)],
        fill=c.lit((80, 54, 54)),
    )
    c.pen.ellipse((x - rim, y - rim * 0.4, x + rim, y + rim * 0.4), fill=(255, 150, 40))
    for side in (-0.7, 0.05, 0.8):
        foot = tall * c.uniform(0.4, 0.75)
        path = [
            (x + side * rim, y),
            (x + side * rim * 1.9, y + foot * 0.5),
            (x + side * rim * 3.2, y + foot),
        ]
        c.pen.line(path, fill=(255, 92, 24), width=round(c.unit * 0.022), joint="curve")


def draw_pyramids(c: Canvas) -> None:
    for share, size in (
        (c.uniform(0.12, 0.3), 0.26),
        (c.uniform(0.42, 0.58), 0.34),
        (c.uniform(0.74, 0.9), 0.22),
    ):
        x, tall = c.w * share, c.unit * size * c.uniform(0.9, 1.1)
        wide, y = tall * 0.95, c.horizon - tall
        c.pen.polygon([(x - wide, c.horizon), (x, y), (x + wide, c.horizon)], fill=c.lit((232, 190, 112)))
        c.pen.polygon(
            [(x, y), (x + wide, c.horizon), (x + 0.2 * wide, c.horizon)],
            fill=c.lit((176, 130, 72)),
        )


BACKDROP_DRAWERS: dict[str, Callable[[Canvas], None]] = {
    "mountains": draw_mountains,
    "forest": draw_forest,
    "city": draw_city,
    "hills": draw_hills,
    "volcano": draw_volcano,
    "pyramids": draw_pyramids,
}
