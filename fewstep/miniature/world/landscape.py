"""What surrounds the things: the sky and the weather before it, the backdrop on the horizon, the ground up to
our feet; for each value of these attributes the function draw_VALUE."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageFilter

from fewstep.miniature.world.canvas import Canvas, Colour, mix


def clouds(c: Canvas, colour: Colour, alpha: int, count: int, low: float = 0.06, high: float = 0.32) -> None:
    for _ in range(count):
        x, y = c.uniform(0, c.w), c.h * c.uniform(low, high)
        size = c.unit * c.uniform(0.035, 0.06)
        for dx, dy, scale in ((-1.5, 0.25, 0.8), (-0.5, -0.2, 1.15), (0.7, -0.05, 1.0), (1.7, 0.3, 0.7)):
            c.disc(x + dx * size, y + dy * size, size * scale, (*colour, alpha))
        base = (x - 1.9 * size, y + 0.3 * size, x + 2.1 * size, y + 1.0 * size)
        c.pen.rectangle(base, fill=(*colour, alpha))


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
    c.disc(c.w * c.uniform(0.15, 0.85), c.h * c.uniform(0.1, 0.2), c.unit * 0.06, (246, 246, 238, 170))


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
        x, y, long = c.uniform(0, c.w * 1.1), c.uniform(-0.05 * c.h, c.h), c.unit * c.uniform(0.09, 0.12)
        wide = max(1, round(c.unit * 0.009))
        c.pen.line((x, y, x - 0.3 * long, y + long), fill=(214, 226, 240, 190), width=wide)


def draw_mountains(c: Canvas) -> None:
    rock, shade, cap = c.lit((120, 128, 152)), c.lit((84, 92, 122)), c.lit((250, 250, 255))
    for top, jitter, count in ((0.30, 0.05, 3), (0.19, 0.04, 4)):
        for i in range(count):
            x = c.w * ((i + 0.5) / count + c.uniform(-0.4, 0.4) / count)
            tall = c.unit * (top + c.uniform(-jitter, jitter))
            wide, y = tall * c.uniform(0.85, 1.05), c.horizon - tall
            c.pen.polygon([(x - wide, c.horizon), (x, y), (x + wide, c.horizon)], fill=rock)
            c.pen.polygon([(x, y), (x + wide, c.horizon), (x + 0.15 * wide, c.horizon)], fill=shade)
            edge = ((-0.36, 0.36), (-0.14, 0.28), (0.0, 0.42), (0.16, 0.27), (0.36, 0.36))
            c.pen.polygon([(x, y), *((x + wide * dx, y + tall * dy) for dx, dy in edge)], fill=cap)


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
        c.disc(x + drift, y - c.unit * 0.045 * step, c.unit * (0.04 + 0.011 * step), (112, 104, 108, 190))
    cone = [(x - wide, c.horizon), (x - rim, y), (x + rim, y), (x + wide, c.horizon)]
    c.pen.polygon(cone, fill=c.lit((112, 78, 70)))
    shade = [(x, y), (x + rim, y), (x + wide, c.horizon), (x + 0.12 * wide, c.horizon)]
    c.pen.polygon(shade, fill=c.lit((80, 54, 54)))
    c.pen.ellipse((x - rim, y - rim * 0.4, x + rim, y + rim * 0.4), fill=(255, 150, 40))
    for side in (-0.7, 0.05, 0.8):
        foot = tall * c.uniform(0.4, 0.75)
        path = [(x + side * rim, y), (x + side * rim * 1.9, y + foot * 0.5), (x + side * rim * 3.2, y + foot)]
        c.pen.line(path, fill=(255, 92, 24), width=round(c.unit * 0.022), joint="curve")


def draw_pyramids(c: Canvas) -> None:
    places = [c.uniform(low, high) for low, high in ((0.12, 0.3), (0.42, 0.58), (0.74, 0.9))]
    for place, size in zip(places, (0.26, 0.34, 0.22), strict=True):
        x, tall = c.w * place, c.unit * size * c.uniform(0.9, 1.1)
        wide, y = tall * 0.95, c.horizon - tall
        c.pen.polygon([(x - wide, c.horizon), (x, y), (x + wide, c.horizon)], fill=c.lit((232, 190, 112)))
        shade = [(x, y), (x + wide, c.horizon), (x + 0.2 * wide, c.horizon)]
        c.pen.polygon(shade, fill=c.lit((176, 130, 72)))


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
    # The sky's light on the water.
    shine = {"sunset": (255, 196, 120, 90), "night": (120, 140, 220, 60), "aurora": (60, 200, 150, 70)}
    if c.scene.sky in shine:
        c.pen.rectangle((0, c.horizon, c.w, c.horizon + 0.05 * c.h), fill=shine[c.scene.sky])
    for x, y, depth in c.scatter(13):
        wide = c.unit * (0.05 + 0.09 * depth)
        ripple = c.lit(mix((170, 222, 238), (66, 146, 190), c.uniform(0, 1)))
        tall = max(1, round(c.unit * 0.009 * (0.6 + depth)))
        c.pen.line((x - wide, y, x + wide, y), fill=ripple, width=tall)


def draw_lavender(c: Canvas) -> None:
    vanishing = c.w * c.uniform(0.3, 0.7)
    for i in range(-8, 9):
        top, foot = vanishing + i * c.unit * 0.06, vanishing + i * c.unit * 0.26
        row = [(top, c.horizon), (foot - 0.07 * c.unit, c.h), (foot + 0.05 * c.unit, c.h)]
        c.pen.polygon(row, fill=c.lit((92, 124, 84)))
