"""The things that stand in the miniature's world: small pictures of them, in their own colours or in another.

They are emoji of Microsoft's Fluent set in three hands, MIT-licensed (see NOTICE); a committed sheet for each
holds those that are used. `python -m fewstep.miniature.next_world.things PACKAGES` makes the sheets from a
folder in which the packages of NOTICE lie unpacked; it takes `pip install resvg-py==0.5.0` besides.
"""

from __future__ import annotations

import io
import json
import sys
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageDraw, ImageOps

from fewstep.miniature.next_world.words import COLOURS

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
    paint: float | None  # the hue that another takes the place of, in degrees; None is its commonest

    @property
    def colours(self) -> tuple[str, ...]:
        """Its own and others."""
        return (OWN, *self.hues)


def _read() -> dict[str, Thing]:
    table = tomllib.loads(Path(__file__).with_name("things.toml").read_text(encoding="utf-8"))
    things = {}
    for name, row in table.items():
        hues = row.get("hues", ())
        hues = COLOURS if hues == "all" else tuple(hues)
        floats, paint = row.get("floats", False), row.get("paint")
        things[name] = Thing(name, row["code"], tuple(row["words"]), hues, row.get("like"), floats, paint)
    return things


THINGS = _read()


@cache
def picture(name: str, colour: str = OWN, hand: str = "3d") -> Image.Image:
    """Return the thing `name`, RGBA, cut out, in its own colours or in `colour`; ink has none."""
    place = list(THINGS).index(name)
    left, top = place % COLUMNS * CELL, place // COLUMNS * CELL
    cell = _sheet(hand).crop((left, top, left + CELL, top + CELL))
    box = cell.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox()
    return recolour(cell.crop(box), OWN if hand == "ink" else colour, THINGS[name].paint)


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


def recolour(image: Image.Image, colour: str, paint: float | None = None) -> Image.Image:
    """Return RGBA `image` with the hue `paint`, or its commonest, 40 degrees to both sides, turned into
    `colour`; what is grey or of another hue stays."""
    if colour == OWN:
        return image
    hsv = np.asarray(image.convert("RGB").convert("HSV"), np.float64) / 255
    hue, saturation, value = hsv[..., 0] * 360, hsv[..., 1], hsv[..., 2]
    alpha = np.asarray(image.getchannel("A"), np.float64) / 255
    weight = alpha * saturation * value
    counts, _ = np.histogram(hue, 72, (0, 360), weights=weight)
    smooth = sum(np.roll(counts, shift) for shift in range(-4, 5))
    main = 5 * int(np.argmax(smooth)) + 2.5 if paint is None else paint
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


def make_sheet(images: list[Image.Image]) -> Image.Image:
    """Return a sheet of one RGBA image for each thing, cut out and made to fill its cell."""
    rows = -(-len(images) // COLUMNS)
    sheet = Image.new("RGBA", (COLUMNS * CELL, rows * CELL))
    for place, image in enumerate(images):
        cut = image.crop(image.getchannel("A").point(lambda a: 255 * (a > 8)).getbbox())
        scale = (CELL - 4) / max(cut.size)
        size = (round(cut.width * scale), round(cut.height * scale))
        # Premultiplied, so that what is transparent lends no colour to the edge.
        cut = cut.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
        left, top = place % COLUMNS * CELL, place // COLUMNS * CELL
        sheet.paste(cut, (left + (CELL - size[0]) // 2, top + (CELL - size[1]) // 2))
    return sheet


def _rendered(thing: Thing, assets: Path) -> Image.Image:
    [path] = [path for end in ("", "-fe0f") if (path := assets / f"{thing.code}{end}.webp").exists()]
    with Image.open(path) as file:
        return file.convert("RGBA")


def _drawn(thing: Thing, package: Path) -> Image.Image:
    """Return the icon of an Iconify package, whose chars.json names it by code point."""
    import resvg_py

    icons, names = (json.loads((package / f"{name}.json").read_text()) for name in ("icons", "chars"))
    name = names.get(thing.code) or names[f"{thing.code}-fe0f"]
    body = icons["icons"][icons.get("aliases", {}).get(name, {}).get("parent", name)]["body"]
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{body}</svg>'
    with Image.open(io.BytesIO(resvg_py.svg_to_bytes(svg_string=svg, width=256))) as file:
        return file.convert("RGBA")


def _on_paper(ink: Image.Image) -> Image.Image:
    """Return lines of ink with paper in what they enclose, which is not reached from the image's edge."""
    padded = ImageOps.expand(ink.getchannel("A").point(lambda a: 255 * (a > 100)), 1, 0)
    ImageDraw.floodfill(padded, (0, 0), 128)
    inside = padded.crop((1, 1, padded.width - 1, padded.height - 1)).point(lambda a: 255 * (a != 128))
    sheet = Image.new("RGBA", ink.size, (*PAPER, 0))
    sheet.putalpha(ImageChops.lighter(inside, ink.getchannel("A")))
    solid = Image.new("RGB", ink.size, PAPER)
    solid.paste((28, 26, 34), (0, 0), ink.getchannel("A"))
    solid.putalpha(sheet.getchannel("A"))
    return solid


def main() -> None:
    """Make the sheets."""
    packages = Path(sys.argv[1])

    def package(start: str) -> Path:
        [folder] = packages.glob(f"{start}*/package")
        return folder

    hands = {
        "3d": [_rendered(thing, package("lobehub-fluent-emoji-3d") / "assets") for thing in THINGS.values()],
        "flat": [_drawn(thing, package("iconify-json-fluent-emoji-flat")) for thing in THINGS.values()],
        "ink": [
            _on_paper(_drawn(thing, package("iconify-json-fluent-emoji-high-contrast")))
            for thing in THINGS.values()
        ],
    }
    for hand, images in hands.items():
        make_sheet(images).save(SHEETS[hand], quality=90, method=6)


if __name__ == "__main__":
    main()
