"""Drawings that are broken as generated images are: ghosted, doubled, smeared, mixed, cut and blurred.

The judge learns from them what does not look whole.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from fewstep.miniature.world.canvas import Canvas
from fewstep.miniature.world.drawing import PLACE_X, draw, draw_thing
from fewstep.miniature.world.restyling import golden_hour
from fewstep.miniature.world.scenes import Placed, Scene, random_scene
from fewstep.miniature.world.things import THINGS

Floats = npt.NDArray[np.float64]
Rng = np.random.Generator


def blobs(rng: Rng, size: tuple[int, int], cell: float, soft: float = 0.15) -> Floats:
    """Return a mask of soft blobs about `cell` pixels wide, (H, W) in [0, 1], about half of it 1."""
    width, height = size
    noise = rng.normal(size=(max(2, round(height / cell)) + 1, max(2, round(width / cell)) + 1))
    smooth = np.asarray(Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC))
    mask: Floats = np.clip(0.5 + (smooth - np.median(smooth)) / (2 * soft * smooth.std()), 0, 1)
    return mask


def blend(a: Image.Image, b: Image.Image, share: Floats | float) -> Image.Image:
    """Return a where `share` is 0 and b where it is 1."""
    s = np.asarray(share)[..., None] if isinstance(share, np.ndarray) else share
    mixed = np.asarray(a, np.float64) * (1 - s) + np.asarray(b, np.float64) * s
    return Image.fromarray(mixed.round().astype(np.uint8))


def warp(rng: Rng, image: Image.Image, cell: float, strength: float) -> Image.Image:
    """Return `image` bent by a random field, `strength` pixels at most, of waves `cell` pixels long."""
    y, x = np.mgrid[0 : image.height, 0 : image.width]
    shift = [strength * (2 * blobs(rng, image.size, cell, 0.8) - 1) for _ in range(2)]
    rows = np.clip((y + shift[0]).round().astype(int), 0, image.height - 1)
    columns = np.clip((x + shift[1]).round().astype(int), 0, image.width - 1)
    return Image.fromarray(np.asarray(image)[rows, columns])


def _drawn(c: Canvas, image: Image.Image, place: str, thing: Placed, hand: str) -> Image.Image:
    copy = image.copy()
    draw_thing(c, copy, place, thing, hand)
    return copy


def _both_ways(
    c: Canvas, image: Image.Image, place: str, thing: Placed, hand: str
) -> tuple[Image.Image, Image.Image]:
    """Return it drawn, and as large and as far from the place but mirrored, before the same landscape."""
    state = c.rng.bit_generator.state
    once = _drawn(c, image, place, thing, hand)
    c.rng.bit_generator.state = state
    mirror = Image.Transpose.FLIP_LEFT_RIGHT
    opposite = {"left": "right", "right": "left"}.get(place, place)
    return once, _drawn(c, image.transpose(mirror), opposite, thing, hand).transpose(mirror)


def _place(c: Canvas, place: str, image: Image.Image, reach: float = 0.3) -> Floats:
    """Return a soft mask around a place, (H, W)."""
    y, x = np.mgrid[0 : image.height, 0 : image.width]
    unit = min(image.size)
    away = np.hypot((x - PLACE_X[place] * image.width) / unit, (y - 0.62 * image.height) / unit)
    mask: Floats = np.clip((reach + 0.08 - away) / 0.08, 0, 1)
    return mask


# Ways to put a thing badly.


def put_ghost(c: Canvas, image: Image.Image, place: str, thing: Placed, hand: str) -> None:
    """See through it."""
    image.paste(blend(image, _drawn(c, image, place, thing, hand), c.uniform(0.25, 0.7)))


def put_smeared(c: Canvas, image: Image.Image, place: str, thing: Placed, hand: str) -> None:
    """Average it over several sizes and places."""
    copies = [_drawn(c, image, place, thing, hand) for _ in range(int(c.rng.integers(2, 6)))]
    reach = round(c.uniform(0.02, 0.10) * min(image.size))
    moved = [np.roll(np.asarray(copy, np.float64), c.rng.integers(-reach, reach + 1), 1) for copy in copies]
    smeared = Image.fromarray(np.mean(moved, 0).round().astype(np.uint8))
    image.paste(blend(image, smeared, _place(c, place, image, 0.36)))


def put_chimera(c: Canvas, image: Image.Image, place: str, thing: Placed, hand: str) -> None:
    """Mix it with another thing, blob by blob or evenly."""
    others = [name for name in THINGS if name != thing.name]
    other = Placed(others[int(c.rng.integers(len(others)))])
    share = blobs(c.rng, image.size, c.uniform(0.12, 0.4) * min(image.size), 0.3)
    even = c.rng.random() < 0.3
    one, two = (_drawn(c, image, place, either, hand) for either in (thing, other))
    image.paste(blend(one, two, c.uniform(0.3, 0.7) if even else share))


def put_doubled(c: Canvas, image: Image.Image, place: str, thing: Placed, hand: str) -> None:
    """Draw it twice, one over the other."""
    once = _drawn(c, image, place, thing, hand)
    shift = round(c.uniform(0.06, 0.2) * min(image.size)) * (1 if c.rng.random() < 0.5 else -1)
    moved = Image.fromarray(np.roll(np.asarray(once), shift, 1))
    image.paste(once)
    image.paste(blend(image, moved, _place(c, place, image, 0.3) * c.uniform(0.5, 1.0)))


def put_pieced(c: Canvas, image: Image.Image, place: str, thing: Placed, hand: str) -> None:
    """Piece it together from what faces left and what faces right, which do not fit."""
    once, turned = _both_ways(c, image, place, thing, hand)
    unit, behind = min(image.size), np.asarray(image)
    reach = [round(c.uniform(0.03, 0.08) * unit) * (1 if c.rng.random() < 0.5 else -1) for _ in range(2)]
    # The thing alone is moved, not what is behind it.
    pixels = np.asarray(turned)
    moved, there = (np.roll(x, reach, (0, 1)) for x in (pixels, (pixels != behind).any(2)))
    other = Image.fromarray(np.where(there[..., None], moved, behind))
    image.paste(blend(once, other, blobs(c.rng, image.size, c.uniform(0.08, 0.3) * unit, 0.2)))


def put_two_faced(c: Canvas, image: Image.Image, place: str, thing: Placed, hand: str) -> None:
    """Mirror one half of it."""
    once, other = _both_ways(c, image, place, thing, hand)
    x = np.arange(image.width) - (PLACE_X[place] + c.uniform(-0.03, 0.03)) * image.width
    side = 1 if c.rng.random() < 0.5 else -1
    share = np.tile(np.clip(0.5 + side * x / (0.02 * image.width), 0, 1), (image.height, 1))
    image.paste(blend(once, other, share))


def put_misplaced(c: Canvas, image: Image.Image, place: str, thing: Placed, hand: str) -> None:
    """Put parts of it where others belong: a third eye, a beak on an ear."""
    drawn = _drawn(c, image, place, thing, hand)
    pixels, unit = np.asarray(drawn), min(image.size)
    inside = np.argwhere((pixels != np.asarray(image)).any(2))
    y, x = np.mgrid[0 : image.height, 0 : image.width]
    for _ in range(int(c.rng.integers(1, 4))):
        source, target = (inside[int(c.rng.integers(len(inside)))] for _ in range(2))
        away = np.hypot(y - target[0], x - target[1]) / unit
        part = Image.fromarray(np.roll(pixels, target - source, (0, 1)))
        drawn = blend(drawn, part, np.clip((c.uniform(0.05, 0.11) - away) / 0.01, 0, 1))
    image.paste(drawn)


def put_effaced(c: Canvas, image: Image.Image, place: str, thing: Placed, hand: str) -> None:
    """Rub out what is within its outline, here and there."""
    drawn = _drawn(c, image, place, thing, hand)
    pixels, unit = np.asarray(drawn, np.float64), min(image.size)
    there = (np.asarray(drawn) != np.asarray(image)).any(2)
    radius = c.uniform(0.025, 0.05) * unit
    parts = [*np.moveaxis(pixels * there[..., None], 2, 0), 255.0 * there]
    blur = ImageFilter.GaussianBlur(radius)
    soft = [Image.fromarray(part.round().astype(np.uint8)).filter(blur) for part in parts]
    *colours, weight = (np.asarray(part, np.float64) for part in soft)
    rubbed = np.stack(colours, 2) / np.maximum(weight, 1)[..., None] * 255
    inside = Image.fromarray(there.astype(np.uint8) * 255).filter(ImageFilter.MinFilter(5))
    share = blobs(c.rng, image.size, c.uniform(0.1, 0.3) * unit, 0.3) * (np.asarray(inside) / 255)
    image.paste(blend(drawn, Image.fromarray(rubbed.clip(0, 255).astype(np.uint8)), share))


def put_melted(c: Canvas, image: Image.Image, place: str, thing: Placed, hand: str) -> None:
    """Leave blotches of it that have edges but no details."""
    drawn = _drawn(c, image, place, thing, hand)
    size, unit = (image.width // 2, image.height // 2), min(image.size) / 2
    window = 2 * round(c.uniform(0.015, 0.05) * unit) + 1
    melted = warp(c.rng, drawn.resize(size), c.uniform(0.06, 0.12) * unit, 0.03 * unit)
    melted = melted.filter(ImageFilter.MedianFilter(window)).resize(image.size)
    image.paste(blend(drawn, melted, _place(c, place, image, 0.36)))


def put_cut(c: Canvas, image: Image.Image, place: str, thing: Placed, hand: str) -> None:
    """Leave parts of it out."""
    share = blobs(c.rng, image.size, c.uniform(0.15, 0.35) * min(image.size), 0.2)
    image.paste(blend(image, _drawn(c, image, place, thing, hand), share))


def put_blurred(c: Canvas, image: Image.Image, place: str, thing: Placed, hand: str) -> None:
    """Blur it and nothing else."""
    drawn = _drawn(c, image, place, thing, hand)
    soft = drawn.filter(ImageFilter.GaussianBlur(c.uniform(0.012, 0.04) * min(image.size)))
    image.paste(blend(drawn, soft, _place(c, place, image, 0.36)))


def put_bent(c: Canvas, image: Image.Image, place: str, thing: Placed, hand: str) -> None:
    """Bend it out of shape."""
    unit = min(image.size)
    drawn = _drawn(c, image, place, thing, hand)
    cell = c.uniform(0.06, 0.25) * unit
    bent = warp(c.rng, drawn, cell, c.uniform(0.4, 0.6) * cell)
    image.paste(blend(drawn, bent, _place(c, place, image, 0.36)))


PUTS = (
    *(put_ghost, put_smeared, put_chimera, put_doubled, put_pieced, put_two_faced),
    *(put_pieced, put_two_faced),  # twice as often, since nothing but knowing the thing tells them
    *(put_misplaced, put_melted, put_effaced),
    *(put_cut, put_blurred, put_bent),
)


# Ways to spoil a whole image; each takes its random numbers, the image and others of other scenes.


def blurred(rng: Rng, image: Image.Image, others: list[Image.Image]) -> Image.Image:
    """Blur, by a 256th of the side for one pixel at 256 px."""
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(2.3, 6.0) / 256 * min(image.size)))


def coarse(rng: Rng, image: Image.Image, others: list[Image.Image]) -> Image.Image:
    """Reduce and enlarge again."""
    side = int(rng.integers(12, 50))
    small = image.resize((side, side), Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.BILINEAR if rng.random() < 0.7 else Image.Resampling.BOX)


def averaged(rng: Rng, image: Image.Image, others: list[Image.Image]) -> Image.Image:
    """Average with one to three others."""
    count = int(rng.integers(1, len(others) + 1))
    pixels = np.mean([np.asarray(one, np.float64) for one in (image, *others[:count])], 0)
    return Image.fromarray(pixels.round().astype(np.uint8))


def shifted(rng: Rng, image: Image.Image, others: list[Image.Image]) -> Image.Image:
    """Average with itself, moved or mirrored."""
    reach = max(4, round(0.25 * image.width))
    pixels = np.asarray(image, np.float64)
    moved = np.roll(pixels, int(rng.integers(round(0.04 * image.width), reach)), 1)
    other = pixels[:, ::-1] if rng.random() < 0.4 else moved
    share = rng.uniform(0.3, 0.7)
    return Image.fromarray(((1 - share) * pixels + share * other).round().astype(np.uint8))


def patched(rng: Rng, image: Image.Image, others: list[Image.Image]) -> Image.Image:
    """Mix with another, blob by blob."""
    share = blobs(rng, image.size, rng.uniform(0.12, 0.4) * min(image.size), rng.uniform(0.1, 0.6))
    return blend(image, others[0], share)


def noisy(rng: Rng, image: Image.Image, others: list[Image.Image]) -> Image.Image:
    """Add grain or coloured blotches."""
    pixels, strength = np.asarray(image, np.float64), rng.uniform(22, 60)
    if rng.random() < 0.5:
        pixels = pixels + rng.normal(0, strength, pixels.shape)
    else:
        cell = rng.uniform(0.03, 0.12) * min(image.size)
        layers = [2 * blobs(rng, image.size, cell, 0.8) - 1 for _ in range(3)]
        pixels = pixels + 1.3 * strength * np.stack(layers, -1)
    return Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))


def bent(rng: Rng, image: Image.Image, others: list[Image.Image]) -> Image.Image:
    """Bend all of it."""
    unit = min(image.size)
    return warp(rng, image, rng.uniform(0.08, 0.25) * unit, rng.uniform(0.04, 0.10) * unit)


Spoil = Callable[[Rng, Image.Image, list[Image.Image]], Image.Image]
SPOILS: tuple[Spoil, ...] = (blurred, coarse, averaged, shifted, patched, noisy, bent)


def draw_in_any_hand(scene: Scene, seed: int, width: int, height: int) -> Image.Image:
    """Return a drawing of `scene` as it is, or in one of the styles; the same seed draws the same one."""
    hand, golden = hand_of(seed)
    image = draw(scene, seed, width, height, hand)
    return golden_hour(image, np.random.default_rng(seed)) if golden else image


def hand_of(seed: int) -> tuple[str, bool]:
    """Return in which hand a seed draws, and whether in the light of a golden hour."""
    rng = random.Random(f"hand {seed}")
    return rng.choices(("3d", "flat", "ink"), (0.7, 0.15, 0.15))[0], rng.random() < 0.1


def draw_broken(scene: Scene, seed: int, width: int, height: int) -> Image.Image:
    """Return a broken image of `scene`, RGB, in any hand; the same seed breaks it in the same way."""
    rng, names = np.random.default_rng([seed, 77]), list(THINGS)
    hand, golden = hand_of(seed)
    if rng.random() < 0.5:
        image = draw(scene, seed, width, height, hand, PUTS[int(rng.integers(len(PUTS)))])
    else:
        random_names = [names[int(rng.integers(len(names)))] for _ in range(3)]
        others = [random_scene(random.Random(f"{seed} {name}"), name) for name in random_names]
        drawn = [draw(other, seed + i, width, height, hand) for i, other in enumerate(others)]
        spoil = SPOILS[int(rng.integers(len(SPOILS)))]
        image = spoil(rng, draw(scene, seed, width, height, hand), drawn)
    return golden_hour(image, rng) if golden else image
