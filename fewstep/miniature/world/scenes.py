"""The miniature's world: what a scene is, which scenes are held out, and the many ways to say one.

A scene is six attributes ("a red house in a meadow with mountains at sunset", on the left). Images of it
are drawn by `world.drawing`; `fewstep.miniature.judge` reads the attributes back from pixels.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from itertools import product

# The last object and the last backdrop are drawn, tokenised and judged, but never shown to the base model: a
# style or a fine-tune can be taught something that is provably new to it.
OBJECTS = ("house", "tree", "car", "castle", "balloon", "mushroom", "sailboat", "rocket", "windmill")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "white")
GROUNDS = ("meadow", "desert", "snow", "lake", "lavender")
BACKDROPS = ("mountains", "forest", "city", "hills", "volcano", "pyramids")
SKIES = ("day", "sunset", "night", "rain", "fog", "aurora")
POSITIONS = ("left", "middle", "right")
HELD_OUT_OBJECT = OBJECTS[-1]
HELD_OUT_BACKDROP = BACKDROPS[-1]
HELD_OUT_SHARE = 0.10

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "object": OBJECTS,
    "colour": COLOURS,
    "ground": GROUNDS,
    "backdrop": BACKDROPS,
    "sky": SKIES,
    "position": POSITIONS,
}


@dataclass(frozen=True, slots=True)
class Scene:
    """One combination of attributes; each value is a member of the tuple of the same name in `ATTRIBUTES`."""

    object: str
    colour: str
    ground: str
    backdrop: str
    sky: str
    position: str

    @property
    def labels(self) -> tuple[int, ...]:
        """Indices into `ATTRIBUTES`, in its order: the judge's targets."""
        return tuple(ATTRIBUTES[field.name].index(getattr(self, field.name)) for field in fields(self))

    @property
    def new_to_base(self) -> bool:
        """Holds the object or the backdrop that the base model never saw."""
        return self.new_object or self.new_backdrop

    @property
    def new_object(self) -> bool:
        """Holds the object that the base model never saw."""
        return self.object == HELD_OUT_OBJECT

    @property
    def new_backdrop(self) -> bool:
        """Stands before the backdrop that the base model never saw."""
        return self.backdrop == HELD_OUT_BACKDROP

    @property
    def reserved(self) -> bool:
        """One of the 10 % of combinations that are set aside for tests."""
        return hashlib.sha256("|".join(astuple(self)).encode()).digest()[0] < 256 * HELD_OUT_SHARE

    @property
    def held_out(self) -> bool:
        """Kept from the base's training."""
        return self.new_to_base or self.reserved


def all_scenes() -> list[Scene]:
    """Return every scene of the world, in a fixed order."""
    return [Scene(*values) for values in product(*ATTRIBUTES.values())]


def training_scenes() -> list[Scene]:
    """Return the scenes that the base model may see."""
    return [scene for scene in all_scenes() if not scene.held_out]


def unseen_scenes(count: int, seed: int = 0) -> list[Scene]:
    """Return `count` distinct held-out combinations of attributes that the base knows one by one, in a seeded
    order."""
    unseen = [scene for scene in all_scenes() if scene.reserved and not scene.new_to_base]
    return random.Random(seed).sample(unseen, count)


_OBJECT_WORDS = {
    "house": ("house", "house", "cottage", "little house"),
    "tree": ("tree", "tree", "big tree", "leafy tree"),
    "car": ("car", "car", "little car", "automobile"),
    "castle": ("castle", "castle", "old castle", "fortress"),
    "balloon": ("balloon", "hot air balloon", "hot-air balloon"),
    "mushroom": ("mushroom", "mushroom", "toadstool", "giant mushroom"),
    "sailboat": ("sailboat", "sailboat", "boat", "sailing boat"),
    "rocket": ("rocket", "rocket", "space rocket", "spaceship"),
    "windmill": ("windmill", "windmill", "old windmill", "mill"),
}
_COLOUR_WORDS = {"purple": ("purple", "purple", "violet"), "red": ("red", "red", "crimson")}
_GROUND_WORDS = {
    "meadow": ("in a meadow", "in a meadow", "on the grass", "in a grassy field"),
    "desert": ("in the desert", "in a desert", "on the sand", "in a sandy desert"),
    "snow": ("in the snow", "in the snow", "on snow", "on snowy ground"),
    "lake": ("on a lake", "on the lake", "on the water", "by the water"),
    "lavender": ("in a lavender field", "in lavender", "in a field of lavender", "among lavender"),
}
_BACKDROP_WORDS = {
    "mountains": ("mountains", "high mountains", "tall mountains"),
    "forest": ("a forest", "a pine forest", "a dark forest", "trees"),
    "city": ("a city", "a city skyline", "skyscrapers", "a skyline"),
    "hills": ("hills", "rolling hills", "soft hills"),
    "volcano": ("a volcano", "an erupting volcano", "a smoking volcano"),
    "pyramids": ("pyramids", "ancient pyramids", "the pyramids"),
}
_SKY_WORDS = {
    "day": ("by day", "on a sunny day", "under a blue sky", "in daylight", "in the sun"),
    "sunset": ("at sunset", "at sunset", "under a sunset sky", "at dusk", "in the evening"),
    "night": ("at night", "at night", "under the stars", "by moonlight", "under the moon"),
    "rain": ("in the rain", "in the rain", "on a rainy day", "in heavy rain"),
    "fog": ("in fog", "in the fog", "on a foggy day", "in the mist"),
    "aurora": ("under the northern lights", "under an aurora", "with northern lights", "with an aurora"),
}
_POSITION_WORDS = {
    "left": ("on the left", "on the left side", "at left"),
    "middle": ("in the middle", "in the center", "in the centre"),
    "right": ("on the right", "on the right side", "at right"),
}
_OPENINGS = (
    *("",) * 8,
    "a picture of ",
    "a painting of ",
    "an illustration of ",
    "a photo of ",
    "a drawing of ",
    "a beautiful view of ",
)
_ENDINGS = (
    *("",) * 8,
    ", beautiful",
    ", highly detailed",
    ", 4k",
    ", masterpiece",
    ".",
    ", digital art",
    ", very nice",
)


def caption(scene: Scene, rng: random.Random, complete: bool = False) -> str:
    """Return one of the many ways to say `scene`.

    Unless `complete`, an attribute is now and then left unsaid, so that short prompts too are familiar to the
    model: what the prompt leaves open it then chooses itself.
    """

    def said(share: float) -> bool:
        return complete or rng.random() < share

    colour = rng.choice(_COLOUR_WORDS.get(scene.colour, (scene.colour,)))
    thing = rng.choice(_OBJECT_WORDS[scene.object])
    noun = f"{colour} {thing}" if said(0.95) else thing
    article = (
        rng.choice(("the ", "", "one ")) if rng.random() < 0.15 else ("an " if noun[0] in "aeiou" else "a ")
    )
    ground = rng.choice(_GROUND_WORDS[scene.ground]) if said(0.92) else ""
    backdrop = _backdrop_phrase(scene, rng) if said(0.92) else ""
    sky = rng.choice(_SKY_WORDS[scene.sky]) if said(0.92) else ""
    position = rng.choice(_POSITION_WORDS[scene.position]) if said(0.85) else ""
    parts = [part for part in (ground, backdrop, sky) if part]
    if rng.random() < 0.35:
        rng.shuffle(parts)
    if position:
        parts.insert(rng.choice((0, len(parts))), position)
    comma = rng.random() < 0.25
    if sky and not comma and rng.random() < 0.12:  # "at night, a red house in the snow"
        parts.remove(sky)
        return _finish(f"{sky}, {article}{noun} {' '.join(parts)}", rng)
    return _finish(f"{article}{noun}{', ' if comma else ' '}{(', ' if comma else ' ').join(parts)}", rng)


def complete_captions(scenes: Sequence[Scene]) -> list[str]:
    """Return one complete caption of each of `scenes`, in many wordings, always the same ones."""
    rng = random.Random(11)
    return [caption(scene, rng, complete=True) for scene in scenes]


def _backdrop_phrase(scene: Scene, rng: random.Random) -> str:
    words = rng.choice(_BACKDROP_WORDS[scene.backdrop])
    return rng.choice(
        (f"with {words}", f"with {words}", f"in front of {words}", f"with {words} behind", f"near {words}")
    )


def _finish(text: str, rng: random.Random) -> str:
    text = text.strip(" ,")
    if rng.random() < 0.25:
        text = f"{rng.choice(_OPENINGS)}{text}{rng.choice(_ENDINGS)}"
    return text
