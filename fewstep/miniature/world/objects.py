"""The things that stand in a scene: draw_NAME for each, with one brush whose paint is the scene's colour."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fewstep.miniature.world.canvas import Canvas, Colour, mix

Point = tuple[float, float]

WOOD = (116, 78, 50)
DARK = (52, 46, 58)
CREAM = (250, 240, 214)


@dataclass(frozen=True)
class Brush:
    """Draws in the object's own coordinates: x from -0.5 to 0.5, y from 0 (its foot) to 1 (its top), in units
    of `size`."""

    canvas: Canvas
    x: float
    y: float
    size: float
    paint: Colour

    @property
    def main(self) -> Colour:
        return self.lit(self.paint)

    @property
    def shadow(self) -> Colour:
        return mix(self.main, (24, 20, 56), 0.26)

    @property
    def highlight(self) -> Colour:
        return mix(self.main, (255, 255, 255), 0.34)

    @property
    def window(self) -> Colour:
        return (255, 226, 120) if self.canvas.dark else (196, 226, 244)

    def lit(self, colour: Sequence[float]) -> Colour:
        return mix(colour, self.canvas.tint, self.canvas.object_light)

    def at(self, points: Sequence[Point]) -> list[Point]:
        return [(self.x + px * self.size, self.y - py * self.size) for px, py in points]

    def polygon(self, points: Sequence[Point], fill: Colour) -> None:
        self.canvas.pen.polygon(self.at(points), fill=fill)

    def ellipse(self, left: float, bottom: float, right: float, top: float, fill: Colour) -> None:
        self.canvas.pen.ellipse(self.at([(left, top), (right, bottom)]), fill=fill)

    def box(self, left: float, bottom: float, right: float, top: float, fill: Colour) -> None:
        self.canvas.pen.rectangle(self.at([(left, top), (right, bottom)]), fill=fill)

    def line(self, points: Sequence[Point], fill: Colour, width: float) -> None:
        pixels = max(1, round(width * self.size))
        self.canvas.pen.line(self.at(points), fill=fill, width=pixels, joint="curve")


def draw_house(b: Brush) -> None:
    b.box(0.16, 0.66, 0.26, 0.96, b.lit((150, 96, 84)))  # chimney
    b.box(-0.4, 0.0, 0.4, 0.54, b.main)
    b.box(0.18, 0.0, 0.4, 0.54, b.shadow)
    b.polygon([(-0.5, 0.52), (0.0, 0.92), (0.5, 0.52)], b.lit((96, 66, 62)))
    b.polygon([(0.0, 0.92), (0.5, 0.52), (0.28, 0.52)], b.lit((70, 48, 52)))
    b.box(-0.09, 0.0, 0.09, 0.3, b.lit(WOOD))
    for left in (-0.3, 0.2):
        b.box(left, 0.2, left + 0.13, 0.38, b.window)


def draw_tree(b: Brush) -> None:
    b.polygon([(-0.07, 0.0), (-0.05, 0.42), (0.05, 0.42), (0.08, 0.0)], b.lit(WOOD))
    crown = [(-0.24, 0.5, 0.2), (0.24, 0.5, 0.2), (-0.16, 0.72, 0.21), (0.17, 0.72, 0.21)]
    crown += [(0.0, 0.62, 0.27), (0.0, 0.82, 0.18)]
    for dx, dy, radius in crown:
        b.ellipse(dx - radius + 0.02, dy - radius - 0.03, dx + radius + 0.02, dy + radius - 0.03, b.shadow)
    for dx, dy, radius in crown:
        b.ellipse(dx - radius * 0.9, dy - radius * 0.85, dx + radius * 0.9, dy + radius * 0.9, b.main)
    for dx, dy in ((-0.17, 0.78), (0.06, 0.88), (-0.26, 0.55), (0.14, 0.66)):
        b.ellipse(dx - 0.05, dy - 0.035, dx + 0.05, dy + 0.035, b.highlight)


def draw_car(b: Brush) -> None:
    b.polygon([(-0.3, 0.36), (-0.2, 0.62), (0.16, 0.62), (0.32, 0.36)], b.main)
    b.polygon([(-0.23, 0.38), (-0.16, 0.57), (-0.03, 0.57), (-0.03, 0.38)], b.window)
    b.polygon([(0.02, 0.38), (0.02, 0.57), (0.13, 0.57), (0.24, 0.38)], b.window)
    b.polygon([(-0.54, 0.1), (-0.54, 0.32), (-0.48, 0.39), (0.42, 0.39), (0.54, 0.3), (0.54, 0.1)], b.main)
    b.box(-0.54, 0.1, 0.54, 0.18, b.shadow)
    b.line([(-0.48, 0.34), (0.42, 0.34)], b.highlight, 0.025)
    b.ellipse(0.45, 0.22, 0.54, 0.31, (255, 244, 190))
    for dx in (-0.29, 0.3):
        b.ellipse(dx - 0.13, -0.02, dx + 0.13, 0.24, b.lit((34, 32, 40)))
        b.ellipse(dx - 0.06, 0.05, dx + 0.06, 0.17, b.lit((190, 194, 204)))


def draw_castle(b: Brush) -> None:
    b.box(-0.3, 0.0, 0.3, 0.46, b.main)
    for left in (-0.28, -0.12, 0.04, 0.2):
        b.box(left, 0.46, left + 0.09, 0.53, b.main)
    b.box(0.05, 0.0, 0.3, 0.46, b.shadow)
    for left, high in ((-0.46, 0.64), (0.24, 0.64), (-0.11, 0.74)):
        b.box(left, 0.0 if high < 0.7 else 0.4, left + 0.22, high, b.main)
        b.box(left + 0.14, 0.0 if high < 0.7 else 0.4, left + 0.22, high, b.shadow)
        roof = b.lit((78, 82, 116))
        b.polygon([(left - 0.03, high), (left + 0.11, high + 0.24), (left + 0.25, high)], roof)
        b.box(left + 0.07, high - 0.16, left + 0.14, high - 0.05, b.window)
    b.box(-0.08, 0.0, 0.08, 0.2, b.lit(DARK))
    b.ellipse(-0.08, 0.12, 0.08, 0.28, b.lit(DARK))


def draw_balloon(b: Brush) -> None:
    lift = 0.14  # it hovers above its shadow
    for dx in (-0.1, 0.1):
        b.line([(dx * 2.4, 0.4 + lift), (dx, 0.17 + lift)], b.lit(DARK), 0.015)
    b.ellipse(-0.42, 0.32 + lift, 0.42, 1.1 + lift, b.main)
    b.polygon([(-0.34, 0.5 + lift), (0.34, 0.5 + lift), (0.11, 0.27 + lift), (-0.11, 0.27 + lift)], b.main)
    b.polygon([(0.16, 0.4 + lift), (0.34, 0.5 + lift), (0.11, 0.27 + lift)], b.shadow)
    b.ellipse(0.1, 0.42 + lift, 0.41, 1.0 + lift, b.shadow)
    b.ellipse(-0.16, 0.34 + lift, 0.17, 1.1 + lift, b.highlight)
    b.ellipse(-0.3, 0.78 + lift, -0.18, 0.96 + lift, b.highlight)
    b.box(-0.1, 0.03 + lift, 0.1, 0.17 + lift, b.lit((166, 112, 62)))


def draw_mushroom(b: Brush) -> None:
    stem = b.lit(CREAM)
    b.polygon([(-0.15, 0.0), (-0.1, 0.5), (0.1, 0.5), (0.16, 0.0)], stem)
    b.polygon([(0.04, 0.0), (0.04, 0.5), (0.1, 0.5), (0.16, 0.0)], mix(stem, (90, 80, 110), 0.3))
    b.ellipse(-0.48, 0.36, 0.48, 0.54, mix(stem, (90, 70, 80), 0.35))
    (x0, y0), (x1, y1) = b.at([(-0.5, 0.94), (0.5, 0.06)])
    b.canvas.pen.pieslice((x0, y0, x1, y1), 180, 360, fill=b.main)
    b.canvas.pen.pieslice((x0 + 0.62 * (x1 - x0), y0 + 0.13 * (y1 - y0), x1, y1), 270, 360, fill=b.shadow)
    spot = b.lit((255, 252, 240) if b.paint[1] < 225 else (196, 96, 92))  # dark on white and yellow
    for dx, dy, r in ((-0.28, 0.6, 0.065), (-0.04, 0.76, 0.08), (0.2, 0.62, 0.07), (-0.06, 0.56, 0.045)):
        b.ellipse(dx - r, dy - r * 0.8, dx + r, dy + r * 0.8, spot)


def draw_sailboat(b: Brush) -> None:
    b.polygon([(-0.46, 0.2), (0.48, 0.2), (0.32, 0.0), (-0.32, 0.0)], b.lit((122, 74, 46)))
    b.line([(-0.46, 0.2), (0.48, 0.2)], b.lit((226, 196, 150)), 0.04)
    b.line([(0.0, 0.2), (0.0, 1.04)], b.lit((88, 62, 44)), 0.035)
    b.polygon([(0.04, 0.27), (0.04, 1.0), (0.46, 0.27)], b.main)
    b.polygon([(0.04, 0.27), (0.04, 0.45), (0.46, 0.27)], b.shadow)
    b.polygon([(-0.04, 0.27), (-0.04, 0.9), (-0.4, 0.27)], b.main)
    b.polygon([(-0.04, 0.5), (-0.04, 0.9), (-0.19, 0.63)], b.highlight)


def draw_rocket(b: Brush) -> None:
    b.polygon([(-0.1, 0.14), (0.0, -0.04), (0.1, 0.14)], (255, 176, 40))
    b.polygon([(-0.18, 0.46), (-0.36, 0.08), (-0.14, 0.18)], b.lit((72, 78, 100)))
    b.polygon([(0.18, 0.46), (0.36, 0.08), (0.14, 0.18)], b.lit((56, 60, 82)))
    b.ellipse(-0.23, -0.02, 0.23, 1.1, b.main)
    b.box(-0.26, -0.04, 0.26, 0.12, b.lit((104, 108, 124)))
    b.polygon([(-0.21, 0.12), (0.21, 0.12), (0.23, 0.3), (-0.23, 0.3)], b.main)
    b.polygon([(0.1, 0.12), (0.21, 0.12), (0.23, 0.5), (0.16, 0.84), (0.1, 0.96)], b.shadow)
    b.line([(-0.14, 0.28), (-0.15, 0.7)], b.highlight, 0.045)
    b.ellipse(-0.11, 0.55, 0.11, 0.77, b.lit((228, 232, 240)))
    b.ellipse(-0.075, 0.585, 0.075, 0.735, b.lit((60, 120, 170)))


def draw_windmill(b: Brush) -> None:
    b.polygon([(-0.24, 0.0), (-0.14, 0.62), (0.14, 0.62), (0.24, 0.0)], b.main)
    b.polygon([(0.06, 0.0), (0.04, 0.62), (0.14, 0.62), (0.24, 0.0)], b.shadow)
    b.polygon([(-0.18, 0.6), (0.0, 0.8), (0.18, 0.6)], b.lit((84, 62, 60)))
    b.box(-0.06, 0.0, 0.06, 0.18, b.lit(WOOD))
    for dx, dy in ((0.34, 0.3), (-0.3, 0.34), (-0.34, -0.3), (0.3, -0.34)):
        tip, side = (dx, 0.66 + dy), (-dy * 0.28, dx * 0.28)
        near = (dx * 0.25, 0.66 + dy * 0.25)
        sail = [near, tip, (tip[0] + side[0], tip[1] + side[1]), (near[0] + side[0], near[1] + side[1])]
        b.polygon(sail, b.lit((246, 238, 220)))
        b.line([(0.0, 0.66), tip], b.lit(DARK), 0.025)
    b.ellipse(-0.04, 0.62, 0.04, 0.7, b.lit(DARK))
