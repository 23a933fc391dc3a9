"""The miniature's world: what a scene is, which scenes are held out, and the many ways to say one.

A scene is six attributes ("a red house in a meadow with mountains at sunset", on the left). Images of it
are drawn by `world.drawing`; `fewstep.miniature.judge` reads the attributes back from pixels.
"""

from __future__ import annotations

import hashlib
import random
import tomllib
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from itertools import product
from pathlib import Path

_WORLD = tomllib.loads(Path(__file__).with_name("words.toml").read_text(encoding="utf-8"))
_WORDS: dict[str, dict[str, list[str]]] = _WORLD["attributes"]
ATTRIBUTES = {name: tuple(values) for name, values in _WORDS.items()}
# Drawn, tokenised and judged, but never shown to the base model: a style or a fine-tune can be taught
# something that is provably new to it.
HELD_OUT = {"object": "windmill", "backdrop": "pyramids"}
HELD_OUT_SHARE = 0.10


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
    def new_to_base(self) -> list[str]:
        """The attributes whose values the base model never saw."""
        return [name for name, value in HELD_OUT.items() if getattr(self, name) == value]

    @property
    def reserved(self) -> bool:
        """One of the 10 % of combinations that are set aside for tests."""
        return hashlib.sha256("|".join(astuple(self)).encode()).digest()[0] < 256 * HELD_OUT_SHARE


def all_scenes() -> list[Scene]:
    """Return every scene of the world, in a fixed order."""
    return [Scene(*values) for values in product(*ATTRIBUTES.values())]


def training_scenes() -> list[Scene]:
    """Return the scenes that the base model may see."""
    return [scene for scene in all_scenes() if not (scene.new_to_base or scene.reserved)]


def unseen_scenes(count: int, seed: int = 0) -> list[Scene]:
    """Return `count` distinct held-out combinations of attributes that the base knows one by one, in a seeded
    order."""
    unseen = [scene for scene in all_scenes() if scene.reserved and not scene.new_to_base]
    return random.Random(seed).sample(unseen, count)


def caption(scene: Scene, rng: random.Random, complete: bool = False) -> str:
    """Return one of the many ways to say `scene`.

    Unless `complete`, an attribute is now and then left unsaid, so that short prompts too are familiar to the
    model: what the prompt leaves open it then chooses itself.
    """

    def said(share: float) -> bool:
        return complete or rng.random() < share

    def words(attribute: str) -> str:
        return rng.choice(_WORDS[attribute][getattr(scene, attribute)])

    colour, thing = words("colour"), words("object")
    noun = f"{colour} {thing}" if said(0.95) else thing
    article = "an " if noun[0] in "aeiou" else "a "
    if rng.random() < 0.15:
        article = rng.choice(("the ", "", "one "))
    ground = words("ground") if said(0.92) else ""
    backdrop = words("backdrop") if said(0.92) else ""
    if backdrop:
        backdrop = rng.choice(_WORLD["before_a_backdrop"]).format(backdrop)
    sky = words("sky") if said(0.92) else ""
    position = words("position") if said(0.85) else ""
    parts = [part for part in (ground, backdrop, sky) if part]
    if rng.random() < 0.35:
        rng.shuffle(parts)
    if position:
        parts.insert(rng.choice((0, len(parts))), position)
    between = ", " if rng.random() < 0.25 else " "
    text = f"{article}{noun}{between}{between.join(parts)}"
    if sky and between == " " and rng.random() < 0.12:  # "at night, a red house in the snow"
        parts.remove(sky)
        text = f"{sky}, {article}{noun} {' '.join(parts)}"
    text = text.strip(" ,")
    if rng.random() < 0.25:
        text = f"{rng.choice(_WORLD['openings'])}{text}{rng.choice(_WORLD['endings'])}"
    return text


def complete_captions(scenes: Sequence[Scene]) -> list[str]:
    """Return one complete caption of each of `scenes`, in many wordings, always the same ones."""
    rng = random.Random(11)
    return [caption(scene, rng, complete=True) for scene in scenes]
