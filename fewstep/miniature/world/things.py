"""The things that stand in the miniature's world: small pictures of them, in their own colours or in another.

They are emoji of Microsoft's Fluent set in three hands, MIT-licensed (see NOTICE); a committed sheet for each
hand, made by `sheets`, holds those that are used.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from fewstep.miniature.world.words import COLOURS

SHEETS = {hand: Path(__file__).with_name(f"things-{hand}.webp") for hand in ("3d", "flat", "ink")}
CELL, COLUMNS = 152, 10  # px; a thing fills its cell in one direction
PAPER = (250, 244, 230)  # what lines of ink enclose
OWN = "own"  # no colour but its own


@dataclass(frozen=True, slots=True)
class Thing:
    """One kind of thing: its code point, the words for it, the colours that it takes, and whether it
    hovers."""

    name: str
    code: str
    words: tuple[str, ...]
    hues: tuple[str, ...]
    like: str | None  # the hue that its own colours are called by
    floats: bool
    replaces_hue: float | None  # that another takes the place of, in degrees; None is its commonest


def _read() -> dict[str, Thing]:
    table = tomllib.loads(Path(__file__).with_name("things.toml").read_text(encoding="utf-8"))
    things = {}
    for name, row in table.items():
        hues = row.get("hues", ())
        hues = COLOURS if hues == "all" else tuple(hues)
        floats, replaced = row.get("floats", False), row.get("replaces_hue")
        things[name] = Thing(name, row["code"], tuple(row["words"]), hues, row.get("like"), floats, replaced)
    return things


THINGS = _read()


@cache
def picture(name: str, colour: str = OWN, hand: str = "3d") -> Image.Image:
    """Return the thing `name`, RGBA, cut out, in its own colours or in `colour`; ink has none."""
    place = list(THINGS).index(name)
    left, top = place % COLUMNS * CELL, place // COLUMNS * CELL
    cell = _sheet(hand).crop((left, top, left + CELL, top + CELL))
    box = cell.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox()
    return recolour(cell.crop(box), OWN if hand == "ink" else colour, THINGS[name].replaces_hue)


@cache
def _sheet(hand: str) -> Image.Image:
    with Image.open(SHEETS[hand]) as file:
        return file.convert("RGBA")


# Of each colour: hue in degrees, what saturation is multiplied by, and value's multiplier and least.
_TARGETS = {
    "red": (356, 1.15, 0.95, 0.0),
    "orange": (26, 1.15, 1.08, 0.05),
    "yellow": (48, 1.1, 1.15, 0.15),
    "green": (135, 1.0, 0.88, 0.0),
    "blue": (216, 1.1, 0.98, 0.0),
    "purple": (276, 0.95, 0.85, 0.05),
    "pink": (334, 0.62, 1.2, 0.2),
    "white": (220, 0.06, 0.45, 0.55),
    "black": (240, 0.18, 0.30, 0.02),
}


def recolour(image: Image.Image, colour: str, replaced: float | None = None) -> Image.Image:
    """Return RGBA `image` with the hue `replaced`, or its commonest, 40 degrees to both sides, turned into
    `colour`; what is grey or of another hue stays."""
    if colour == OWN:
        return image
    hsv = np.asarray(image.convert("RGB").convert("HSV"), np.float64) / 255
    hue, saturation, value = hsv[..., 0] * 360, hsv[..., 1], hsv[..., 2]
    alpha = np.asarray(image.getchannel("A"), np.float64) / 255
    weight = alpha * saturation * value
    counts, _ = np.histogram(hue, 72, (0, 360), weights=weight)
    smooth = sum(np.roll(counts, shift) for shift in range(-4, 5))
    main = 5 * int(np.argmax(smooth)) + 2.5 if replaced is None else replaced
    away = np.abs((hue - main + 180) % 360 - 180)
    share = np.clip((52 - away) / 12, 0, 1) * np.clip((saturation - 0.12) / 0.15, 0, 1)
    target, more, times, least = _TARGETS[colour]
    turned = (target + 0.25 * ((hue - main + 180) % 360 - 180)) % 360
    reference = float(np.average(value, weights=weight * share + 1e-9))
    value_new = np.clip(least + (1 - least) * times * value * (0.92 / max(reference, 0.3)), 0, 1)
    if colour in ("white", "black"):
        value_new = np.clip(least + times * value / max(reference, 0.3), 0, 1)
    new = np.stack([turned / 360, np.clip(saturation * more, 0, 1), value_new], -1)
    rgb = np.asarray(Image.fromarray((new * 255).round().astype(np.uint8), "HSV").convert("RGB"), np.float64)
    old = np.asarray(image.convert("RGB"), np.float64)
    mixed = old + (rgb - old) * share[..., None]
    pixels: npt.NDArray[np.uint8] = np.dstack([mixed, alpha * 255]).round().astype(np.uint8)
    return Image.fromarray(pixels, "RGBA")
