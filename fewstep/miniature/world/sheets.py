"""The sheets of the things and the list of words that are near to theirs, made from published packages:

    python -m fewstep.miniature.world.sheets PACKAGES

PACKAGES is a folder in which those of NOTICE lie unpacked, each in a folder that begins with its name, as
iconify-json-fluent-emoji-flat-1.2.6/package. It takes `pip install resvg-py==0.5.0` besides. What it makes is
committed.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

from PIL import Image, ImageChops, ImageDraw, ImageOps

from fewstep.miniature.vocabulary import NEIGHBOURS, neighbours
from fewstep.miniature.world.scenes import HELD_OUT_THINGS
from fewstep.miniature.world.things import CELL, COLUMNS, PAPER, SHEETS, THINGS, Thing


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
    """Make the sheets and the list of neighbours."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("packages", type=Path)
    packages: Path = parser.parse_args().packages

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
    emoji = json.loads((package("emojibase-data") / "en" / "data.json").read_text(encoding="utf-8"))
    known = [thing for name, thing in THINGS.items() if name not in HELD_OUT_THINGS]
    near = neighbours(emoji, {thing.code: thing.words for thing in known})
    NEIGHBOURS.write_text(json.dumps(near, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
