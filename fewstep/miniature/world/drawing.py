"""Draw a scene: sky, backdrop, ground, one thing or two, weather.

The landscape is drawn by Pillow at twice the size and reduced, things are cut out of their sheet. What the
scene leaves open (shapes of hills and clouds, a thing's size and exact place) comes from the seed, so one
scene has endlessly many images. Things look to the side to which their artist drew them: where half of them
were mirrored, in few steps a model of this size made two heads of the two ways, one at each end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from fewstep.miniature.world import landscape
from fewstep.miniature.world.canvas import PALETTE, SUPERSAMPLING, Canvas
from fewstep.miniature.world.scenes import Placed, Scene
from fewstep.miniature.world.things import PAPER, THINGS, picture

INK = (44, 46, 58)
PLACE_X = {"left": 0.29, "middle": 0.50, "right": 0.71}  # of the width

# What puts a thing at a place of an image, in a hand.
Put: TypeAlias = Callable[[Canvas, Image.Image, str, Placed, str], None]


def draw(
    scene: Scene,
    seed: int,
    width: int = 256,
    height: int = 256,
    hand: str = "3d",
    put: Put | None = None,
) -> Image.Image:
    """Return an image of `scene`, RGB, width x height pixels; the same seed draws the same one.

    `hand` is 3d, flat (its things only) or ink (all of it); `put` is `draw_thing` or another way to draw one.
    """
    c = Canvas(scene, seed, width, height)
    for value in (scene.sky, scene.backdrop):
        getattr(landscape, f"draw_{value}")(c)
    if scene.sky == "fog":
        c.veil(c.horizon - 0.26 * c.unit, c.horizon, 0, 150)
    far, near = (c.lit(colour) for colour in PALETTE["ground"][scene.ground])
    c.image.paste(c.gradient((far, near), c.horizon, c.h), (0, round(c.horizon)))
    getattr(landscape, f"draw_{scene.ground}")(c)
    image = c.image.resize(c.size, Image.Resampling.BOX)
    if hand == "ink":
        image = wash(image)
    for place, thing in scene.places.items():
        (put or draw_thing)(c, image, place, thing, hand)
    if scene.sky in ("rain", "fog"):
        image.paste(*_weather(c))
    return image


def wash(image: Image.Image) -> Image.Image:
    """Return an image as a wash of ink on paper, in greys that are lighter than the lines of things."""
    grey = np.asarray(image.convert("L"), np.float64)[..., None] / 255
    washed = np.array(INK) + (np.array(PAPER) - np.array(INK)) * (0.15 + 0.85 * grey)
    return Image.fromarray(washed.round().astype(np.uint8))


def _weather(c: Canvas) -> tuple[Image.Image, tuple[int, int], Image.Image]:
    """Return what falls or drifts before the things, as arguments of `Image.paste`."""
    layer = Image.new("RGBA", (c.w, c.h))
    c.pen = ImageDraw.Draw(layer)
    (landscape.draw_raindrops if c.scene.sky == "rain" else landscape.draw_wisps)(c)
    layer = layer.convert("RGBa").resize(c.size, Image.Resampling.BOX).convert("RGBA")
    return layer.convert("RGB"), (0, 0), layer.getchannel("A")


def draw_thing(c: Canvas, image: Image.Image, place: str, thing: Placed, hand: str) -> None:
    """Put `thing` into `image` at `place`, with its shadow, lit by the sky; smaller where there are two."""
    unit, alone = c.unit / SUPERSAMPLING, len(c.scene.things) == 1
    floats = THINGS[thing.name].floats
    x = image.width * (PLACE_X[place] + c.uniform(-0.02, 0.02))
    size = unit * (c.uniform(0.50, 0.58) if alone else c.uniform(0.40, 0.46))
    foot = image.height * c.uniform(0.86, 0.91)
    lift = unit * c.uniform(0.05, 0.10) * floats
    cut = picture(thing.name, thing.colour, hand)
    scale = size / max(cut.size)
    cut = cut.resize((round(cut.width * scale), round(cut.height * scale)), Image.Resampling.LANCZOS)
    wide = 0.46 * cut.width * (0.8 if floats else 1.0)
    if c.scene.ground == "lake" and not floats:
        _ellipse(image, x, foot, 1.25 * wide, 0.075 * unit, c.lit((214, 238, 244)), 130)
    _ellipse(image, x, foot - 0.006 * unit, wide, 0.035 * unit, (14, 18, 34), 70 if floats else 110)
    light = Image.new("RGB", cut.size, tuple(round(v) for v in c.tint))
    lit = Image.blend(cut.convert("RGB"), light, c.thing_light)
    image.paste(lit, (round(x - cut.width / 2), round(foot - lift - cut.height)), cut.getchannel("A"))


def _ellipse(
    image: Image.Image, x: float, y: float, wide: float, tall: float, colour: tuple[int, ...], alpha: int
) -> None:
    """Lay a soft-edged ellipse of half axes `wide` and `tall` over `image`."""
    soft = max(1.0, 0.012 * min(image.size))
    margin = round(3 * soft)
    left, top = round(x - wide) - margin, round(y - tall) - margin
    mask = Image.new("L", (round(2 * wide) + 2 * margin, round(2 * tall) + 2 * margin))
    box = (margin, margin, mask.width - margin, mask.height - margin)
    ImageDraw.Draw(mask).ellipse(box, fill=alpha)
    image.paste(colour, (left, top), mask.filter(ImageFilter.GaussianBlur(soft)))
