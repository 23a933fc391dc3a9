"""Draw a scene with Pillow: sky, backdrop, ground, one object, weather; about 4 ms for 128 px.

Everything is drawn at twice the size and reduced. What the scene leaves open (shapes of hills, clouds,
flowers, the object's size and exact place) comes from the seed, so one scene has endlessly many pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from fewstep.miniature.objects import OBJECT_DRAWERS, Brush
from fewstep.miniature.scenes import Scene

Colour = tuple[int, int, int]
Point = tuple[float, float]

SUPERSAMPLING = 2
HORIZON = 0.60  # of the height, before jitter
PLACES = {"left": 0.28, "middle": 0.50, "right": 0.72}

PAINTS: dict[str, Colour] = {
    "red": (214, 36, 42),
    "orange": (246, 132, 22),
    "yellow": (250, 212, 36),
    "green": (34, 158, 66),
    "blue": (38, 92, 214),
    "purple": (128, 50, 184),
    "pink": (250, 120, 178),
    "white": (246, 244, 240),
}

# Sky: three colours from the zenith to the horizon; light: what it does to land (tint, strength) and to the
# object.
_SKIES: dict[str, tuple[Colour, Colour, Colour]] = {
    "day": ((48, 128, 222), (120, 186, 242), (206, 232, 250)),
    "sunset": ((86, 58, 138), (238, 110, 92), (255, 206, 112)),
    "night": ((8, 12, 40), (18, 28, 74), (44, 58, 112)),
    "rain": ((88, 98, 112), (116, 126, 138), (150, 158, 166)),
    "fog": ((206, 212, 214), (218, 222, 222), (228, 230, 228)),
    "aurora": ((8, 16, 44), (12, 42, 66), (26, 78, 88)),
}
_LIGHT: dict[str, tuple[Colour, float, float]] = {
    "day": ((255, 250, 235), 0.05, 0.0),
    "sunset": ((226, 96, 70), 0.27, 0.10),
    "night": ((12, 18, 62), 0.46, 0.18),
    "rain": ((92, 102, 116), 0.28, 0.12),
    "fog": ((222, 226, 226), 0.34, 0.12),
    "aurora": ((8, 44, 62), 0.42, 0.16),
}
_GROUNDS: dict[str, tuple[Colour, Colour]] = {  # far, near
    "meadow": ((132, 190, 84), (62, 140, 52)),
    "desert": ((240, 208, 140), (214, 162, 88)),
    "snow": ((236, 242, 250), (206, 220, 240)),
    "lake": ((96, 178, 206), (28, 104, 152)),
    "lavender": ((168, 128, 208), (112, 72, 168)),
}


def draw(scene: Scene, seed: int, width: int = 128, height: int = 128) -> Image.Image:
    """One picture of `scene`, RGB, width x height pixels; the same seed draws the same picture."""
    return _Painter(scene, seed, width, height).paint()


def mix(a: Sequence[float], b: Sequence[float], t: float) -> Colour:
    """From colour a (t = 0) to colour b (t = 1)."""
    return tuple(round(x + (y - x) * t) for x, y in zip(a, b, strict=True))  # type: ignore[return-value]


class _Painter:
    """The state of one picture: its canvas, its random numbers, its light."""

    def __init__(self, scene: Scene, seed: int, width: int, height: int) -> None:
        self.scene = scene
        self.rng = np.random.default_rng([seed, *scene.labels])
        self.size = (width, height)
        self.w, self.h = width * SUPERSAMPLING, height * SUPERSAMPLING
        self.unit = min(self.w, self.h)
        self.horizon = self.h * (HORIZON + self.uniform(-0.03, 0.03))
        self.tint, self.land_light, self.object_light = _LIGHT[scene.sky]
        self.dark = scene.sky in ("night", "aurora")

    def uniform(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def lit(self, colour: Sequence[float]) -> Colour:
        return mix(colour, self.tint, self.land_light)

    def paint(self) -> Image.Image:
        self.canvas = self.gradient(_SKIES[self.scene.sky], 0, self.h)
        self.pen = ImageDraw.Draw(self.canvas, "RGBA")
        getattr(self, f"sky_{self.scene.sky}")()
        getattr(self, f"backdrop_{self.scene.backdrop}")()
        if self.scene.sky == "fog":
            self.veil(self.horizon - 0.26 * self.unit, self.horizon, 0, 150)
        self.ground()
        self.object()
        if self.scene.sky == "rain":
            self.raindrops()
        if self.scene.sky == "fog":
            self.wisps()
        return self.canvas.resize(self.size, Image.Resampling.BOX)

    def gradient(self, colours: Sequence[Colour], top: float, bottom: float) -> Image.Image:
        """A vertical gradient through `colours`, as wide as the canvas."""
        rows = max(1, round(bottom) - round(top))
        stops = np.linspace(0, rows - 1, len(colours))
        strip = np.stack(
            [np.interp(np.arange(rows), stops, channel) for channel in zip(*colours, strict=True)], 1
        )
        column = Image.fromarray(strip.astype(np.uint8)[:, None, :])
        return column.resize((self.w, rows), Image.Resampling.NEAREST)

    # -- skies
    # ---------------------------------------------------------------------------------------------------

    def glow(self, x: float, y: float, radius: float, colour: Colour, strength: int = 14) -> None:
        for step in range(12, 0, -1):
            self.disc(x, y, radius * (1 + 0.22 * step), (*colour, strength))

    def disc(self, x: float, y: float, radius: float, colour: tuple[int, ...]) -> None:
        self.pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)

    def clouds(self, colour: Colour, alpha: int, count: int, low: float = 0.06, high: float = 0.32) -> None:
        for _ in range(count):
            x, y = self.uniform(0, self.w), self.h * self.uniform(low, high)
            size = self.unit * self.uniform(0.035, 0.06)
            for dx, dy, scale in ((-1.5, 0.25, 0.8), (-0.5, -0.2, 1.15), (0.7, -0.05, 1.0), (1.7, 0.3, 0.7)):
                self.disc(x + dx * size, y + dy * size, size * scale, (*colour, alpha))
            self.pen.rectangle(
                (x - 1.9 * size, y + 0.3 * size, x + 2.1 * size, y + 1.0 * size), fill=(*colour, alpha)
            )

    def stars(self, count: int) -> None:
        for _ in range(count):
            x, y = self.uniform(0, self.w), self.uniform(0, self.horizon * 0.85)
            self.disc(
                x, y, self.unit * self.uniform(0.003, 0.008), (255, 255, 236, int(self.uniform(130, 255)))
            )

    def sky_day(self) -> None:
        x, y = self.w * self.uniform(0.1, 0.9), self.h * self.uniform(0.09, 0.18)
        self.glow(x, y, self.unit * 0.055, (255, 248, 200))
        self.disc(x, y, self.unit * 0.062, (255, 240, 150))
        self.clouds((255, 255, 255), 225, 3)

    def sky_sunset(self) -> None:
        x, y = self.w * self.uniform(0.12, 0.88), self.horizon - self.unit * self.uniform(0.10, 0.22)
        self.glow(x, y, self.unit * 0.08, (255, 226, 120), 16)
        self.disc(x, y, self.unit * 0.085, (255, 236, 160))
        self.clouds((255, 150, 120), 120, 3, 0.05, 0.25)

    def sky_night(self) -> None:
        self.stars(46)
        x, y = self.w * self.uniform(0.12, 0.88), self.h * self.uniform(0.11, 0.2)
        self.glow(x, y, self.unit * 0.055, (190, 200, 255), 6)
        self.disc(x, y, self.unit * 0.062, (250, 246, 214))
        self.disc(x + self.unit * 0.02, y - self.unit * 0.015, self.unit * 0.012, (224, 218, 186))

    def sky_rain(self) -> None:
        self.clouds((78, 86, 98), 235, 5, 0.02, 0.16)
        self.clouds((104, 112, 124), 200, 3, 0.02, 0.2)

    def sky_fog(self) -> None:
        self.disc(
            self.w * self.uniform(0.15, 0.85),
            self.h * self.uniform(0.1, 0.2),
            self.unit * 0.06,
            (246, 246, 238, 170),
        )

    def sky_aurora(self) -> None:
        self.stars(26)
        xs = np.arange(self.w)
        layer = np.zeros((self.h, self.w, 4), np.float32)
        ys = np.arange(self.h)[:, None]
        for colour, base in (((60, 250, 160), 0.36), ((150, 90, 240), 0.22)):
            phase, waves = self.uniform(0, 6.28), self.uniform(1.2, 2.2)
            foot = self.h * (base + 0.07 * np.sin(phase + waves * 2 * math.pi * xs / self.w))
            rays = 0.72 + 0.28 * np.sin(phase * 3 + xs / self.unit * self.uniform(38, 52))
            fade = np.clip((ys - (foot - 0.32 * self.h)) / (0.32 * self.h), 0, 1) ** 1.6 * (
                ys < foot + 0.02 * self.h
            )
            alpha = (fade * rays)[..., None] * 0.85
            layer[..., :3] = layer[..., :3] * (1 - alpha) + np.array(colour) * alpha
            layer[..., 3:] = np.maximum(layer[..., 3:], alpha * 255)
        curtain = Image.fromarray(layer.astype(np.uint8), "RGBA").filter(ImageFilter.BoxBlur(self.unit / 100))
        self.canvas.paste(curtain, (0, 0), curtain)

    # -- backdrops
    # -----------------------------------------------------------------------------------------------

    def ridge(self, top: float, rough: float, count: int) -> list[Point]:
        """A rugged skyline of `count` peaks, `top` units above the horizon."""
        points = [(-0.1 * self.w, self.horizon)]
        for i in range(count + 1):
            x = self.w * (i / count + self.uniform(-0.25, 0.25) / count)
            points.append((x, self.horizon - self.unit * (top + self.uniform(-rough, rough))))
            points.append(
                (x + 0.5 * self.w / count, self.horizon - self.unit * top * self.uniform(0.25, 0.5))
            )
        return [*points, (1.1 * self.w, self.horizon)]

    def backdrop_mountains(self) -> None:
        rock, shade, cap = self.lit((120, 128, 152)), self.lit((84, 92, 122)), self.lit((250, 250, 255))
        for top, jitter, count in ((0.30, 0.05, 3), (0.19, 0.04, 4)):
            for i in range(count):
                x = self.w * ((i + 0.5) / count + self.uniform(-0.4, 0.4) / count)
                tall = self.unit * (top + self.uniform(-jitter, jitter))
                wide, y = tall * self.uniform(0.85, 1.05), self.horizon - tall
                self.pen.polygon([(x - wide, self.horizon), (x, y), (x + wide, self.horizon)], fill=rock)
                self.pen.polygon(
                    [(x, y), (x + wide, self.horizon), (x + 0.15 * wide, self.horizon)], fill=shade
                )
                snow = 0.36
                edge = [
                    (x - wide * snow, y + tall * snow),
                    (x - wide * 0.14, y + tall * 0.28),
                    (x, y + tall * 0.42),
                ]
                edge += [(x + wide * 0.16, y + tall * 0.27), (x + wide * snow, y + tall * snow)]
                self.pen.polygon([(x, y), *edge], fill=cap)

    def backdrop_forest(self) -> None:
        for row, (tall, colour) in enumerate(((0.24, (44, 104, 74)), (0.17, (24, 76, 52)))):
            step = self.unit * 0.085
            for i in range(int(self.w / step) + 2):
                x = (i + 0.5 * row) * step - step / 2 + self.uniform(-0.2, 0.2) * step
                high = self.unit * tall * self.uniform(0.78, 1.2)
                paint = self.lit(mix(colour, (90, 150, 90), self.uniform(0, 0.3)))
                for level, wide in ((0.0, 0.42), (0.3, 0.58), (0.58, 0.74)):
                    y = self.horizon - high * (1 - level)
                    foot = y + high * 0.44
                    self.pen.polygon([(x - step * wide, foot), (x, y), (x + step * wide, foot)], fill=paint)

    def backdrop_city(self) -> None:
        window = (255, 226, 130, 255) if self.dark or self.scene.sky == "sunset" else (206, 222, 236, 255)
        x = -self.unit * 0.03
        while x < self.w:
            wide, tall = self.unit * self.uniform(0.075, 0.13), self.unit * self.uniform(0.12, 0.36)
            grey = self.lit(mix((86, 96, 122), (140, 146, 166), self.uniform(0, 1)))
            top = self.horizon - tall
            self.pen.rectangle((x, top, x + wide, self.horizon), fill=grey)
            self.pen.rectangle(
                (x + wide * 0.8, top, x + wide, self.horizon), fill=mix(grey, (20, 24, 50), 0.3)
            )
            for row in range(int(tall / (self.unit * 0.045))):
                for column in (0.14, 0.46):
                    if self.rng.random() < 0.75:
                        left, y = x + wide * column, top + self.unit * (0.016 + 0.045 * row)
                        self.pen.rectangle((left, y, left + wide * 0.2, y + self.unit * 0.02), fill=window)
            x += wide + self.unit * self.uniform(0.0, 0.012)

    def backdrop_hills(self) -> None:
        for top, colour in ((0.22, (126, 168, 138)), (0.13, (96, 152, 104))):
            for i in range(3):
                x = self.w * (i / 2 + self.uniform(-0.2, 0.2))
                wide, tall = self.w * self.uniform(0.36, 0.5), self.unit * top * self.uniform(0.8, 1.25)
                box = (x - wide, self.horizon - tall, x + wide, self.horizon + tall)
                self.pen.ellipse(box, fill=self.lit(mix(colour, (170, 200, 140), self.uniform(0, 0.35))))

    def backdrop_volcano(self) -> None:
        x, tall = self.w * self.uniform(0.2, 0.8), self.unit * self.uniform(0.34, 0.4)
        y, rim, wide = self.horizon - tall, self.unit * 0.055, self.unit * 0.46
        for step in range(6):
            drift = self.unit * 0.026 * step * (1 if self.uniform(0, 1) < 0.9 else -1)
            self.disc(
                x + drift,
                y - self.unit * 0.045 * step,
                self.unit * (0.04 + 0.011 * step),
                (112, 104, 108, 190),
            )
        cone = [(x - wide, self.horizon), (x - rim, y), (x + rim, y), (x + wide, self.horizon)]
        self.pen.polygon(cone, fill=self.lit((112, 78, 70)))
        self.pen.polygon(
            [(x, y), (x + rim, y), (x + wide, self.horizon), (x + 0.12 * wide, self.horizon)],
            fill=self.lit((80, 54, 54)),
        )
        self.pen.ellipse((x - rim, y - rim * 0.4, x + rim, y + rim * 0.4), fill=(255, 150, 40))
        for side in (-0.7, 0.05, 0.8):
            foot = tall * self.uniform(0.4, 0.75)
            path = [
                (x + side * rim, y),
                (x + side * rim * 1.9, y + foot * 0.5),
                (x + side * rim * 3.2, y + foot),
            ]
            self.pen.line(path, fill=(255, 92, 24), width=round(self.unit * 0.022), joint="curve")

    def backdrop_pyramids(self) -> None:
        for share, size in (
            (self.uniform(0.12, 0.3), 0.26),
            (self.uniform(0.42, 0.58), 0.34),
            (self.uniform(0.74, 0.9), 0.22),
        ):
            x, tall = self.w * share, self.unit * size * self.uniform(0.9, 1.1)
            wide, y = tall * 0.95, self.horizon - tall
            self.pen.polygon(
                [(x - wide, self.horizon), (x, y), (x + wide, self.horizon)], fill=self.lit((232, 190, 112))
            )
            self.pen.polygon(
                [(x, y), (x + wide, self.horizon), (x + 0.2 * wide, self.horizon)],
                fill=self.lit((176, 130, 72)),
            )

    # -- ground
    # --------------------------------------------------------------------------------------------------

    def ground(self) -> None:
        far, near = (self.lit(colour) for colour in _GROUNDS[self.scene.ground])
        self.canvas.paste(self.gradient((far, near), self.horizon, self.h), (0, round(self.horizon)))
        getattr(self, f"ground_{self.scene.ground}")()

    def scatter(self, count: int) -> list[tuple[float, float, float]]:
        """(x, y, depth) of `count` things on the ground, far to near; depth is 0 at the horizon and 1 at our
        feet."""
        depths = np.sort(self.rng.random(count) ** 0.8)
        return [
            (self.uniform(0, self.w), self.horizon + d * (self.h - self.horizon), float(d)) for d in depths
        ]

    def ground_meadow(self) -> None:
        blade = self.lit((40, 112, 44))
        for x, y, depth in self.scatter(46):
            tall = self.unit * (0.008 + 0.024 * depth)
            self.pen.line((x, y, x + self.uniform(-0.4, 0.4) * tall, y - tall), fill=blade, width=2)
        for x, y, depth in self.scatter(16):
            petal = self.lit(((255, 250, 250), (255, 224, 90), (244, 130, 170))[int(self.uniform(0, 3))])
            self.disc(x, y, self.unit * (0.004 + 0.009 * depth), petal)

    def ground_desert(self) -> None:
        for i, share in enumerate((0.16, 0.42, 0.72)):
            y, swell = self.horizon + share * (self.h - self.horizon), self.unit * (0.014 + 0.014 * i)
            phase = self.uniform(0, 6.28)
            crest = [(x, y + swell * math.sin(phase + x / self.w * 5)) for x in range(0, self.w + 9, 8)]
            shade = mix(self.lit((196, 142, 76)), self.lit((240, 208, 140)), 0.2 + 0.2 * i)
            self.pen.line(crest, fill=shade, width=round(self.unit * (0.010 + 0.006 * i)), joint="curve")

    def ground_snow(self) -> None:
        for _ in range(4):
            x, y = self.uniform(0, self.w), self.uniform(self.horizon + 0.08 * self.h, self.h)
            wide = self.unit * self.uniform(0.2, 0.36)
            self.pen.ellipse((x - wide, y, x + wide, y + 0.3 * wide), fill=self.lit((224, 234, 248)))
        for x, y, depth in self.scatter(20):
            self.disc(x, y, self.unit * (0.002 + 0.004 * depth), self.lit((255, 255, 255)))

    def ground_lake(self) -> None:
        if self.scene.sky in ("sunset", "night", "aurora"):  # the sky's light on the water
            shine = {
                "sunset": (255, 196, 120, 90),
                "night": (120, 140, 220, 60),
                "aurora": (60, 200, 150, 70),
            }[self.scene.sky]
            self.pen.rectangle((0, self.horizon, self.w, self.horizon + 0.05 * self.h), fill=shine)
        for x, y, depth in self.scatter(34):
            wide = self.unit * (0.02 + 0.07 * depth)
            ripple = self.lit(mix((170, 222, 238), (66, 146, 190), self.uniform(0, 1)))
            self.pen.line(
                (x - wide, y, x + wide, y),
                fill=ripple,
                width=max(1, round(self.unit * 0.007 * (0.4 + depth))),
            )

    def ground_lavender(self) -> None:
        vanishing = self.w * self.uniform(0.3, 0.7)
        for i in range(-9, 10):
            foot = vanishing + i * self.unit * 0.16
            row = [
                (vanishing + i * self.unit * 0.035, self.horizon),
                (foot - 0.05 * self.unit, self.h),
                (foot + 0.03 * self.unit, self.h),
            ]
            self.pen.polygon(row, fill=self.lit((92, 124, 84)))
        for x, y, depth in self.scatter(60):
            self.disc(
                x,
                y,
                self.unit * (0.004 + 0.011 * depth),
                self.lit(mix((196, 160, 236), (134, 84, 200), self.uniform(0, 1))),
            )

    # -- object and weather
    # --------------------------------------------------------------------------------------

    def object(self) -> None:
        x = self.w * (PLACES[self.scene.position] + self.uniform(-0.03, 0.03))
        size = self.unit * self.uniform(0.46, 0.55)
        y = self.h * self.uniform(0.855, 0.905)
        if self.scene.ground == "lake" and self.scene.object != "balloon":
            self.pen.ellipse(
                (x - 0.52 * size, y - 0.07 * size, x + 0.52 * size, y + 0.09 * size),
                fill=(*self.lit((214, 238, 244)), 150),
            )
        self.pen.ellipse(
            (x - 0.46 * size, y - 0.05 * size, x + 0.46 * size, y + 0.06 * size), fill=(16, 20, 36, 84)
        )
        paint = PAINTS[self.scene.colour]
        brush = Brush(self.pen, x, y, size, paint, self.tint, self.object_light, self.dark)
        OBJECT_DRAWERS[self.scene.object](brush)

    def veil(self, top: float, bottom: float, alpha_top: int, alpha_bottom: int) -> None:
        rows = max(1, round(bottom) - round(top))
        alpha = np.linspace(alpha_top, alpha_bottom, rows).astype(np.uint8)[:, None]
        mask = Image.fromarray(alpha).resize((self.w, rows), Image.Resampling.NEAREST)
        self.canvas.paste((226, 229, 228), (0, round(top)), mask)

    def wisps(self) -> None:
        for _ in range(4):
            x, y = self.uniform(0, self.w), self.horizon + self.unit * self.uniform(-0.1, 0.34)
            wide, tall = self.unit * self.uniform(0.3, 0.5), self.unit * self.uniform(0.02, 0.035)
            self.pen.ellipse((x - wide, y - tall, x + wide, y + tall), fill=(236, 238, 238, 105))

    def raindrops(self) -> None:
        for _ in range(85):
            x, y, long = (
                self.uniform(0, self.w * 1.1),
                self.uniform(-0.05 * self.h, self.h),
                self.unit * self.uniform(0.05, 0.09),
            )
            self.pen.line(
                (x, y, x - 0.3 * long, y + long),
                fill=(214, 226, 240, 150),
                width=max(1, round(self.unit * 0.006)),
            )
