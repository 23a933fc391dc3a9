"""The miniature's world: what a scene is, which scenes are held out, and the many ways to say one.

A scene is one thing or two on a ground, before a backdrop, under a sky ("a fox and a red mushroom in the snow
with mountains at night"). Images of it are drawn by `drawing`; the judge reads back from pixels what stands
on the left, in the middle and on the right, and the rest.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fewstep.miniature.world.things import OWN, THINGS
from fewstep.miniature.world.words import ATTRIBUTES, COLOURS, WORDS

# Drawn, tokenised and judged, but never shown to the base model: a style or a fine-tune can be taught
# something that is provably new to it.
HELD_OUT_THINGS, HELD_OUT_BACKDROP = ("flamingo", "tractor"), "pyramids"
HELD_OUT_SHARE = 0.10
TWO_THINGS_SHARE = 0.2
OWN_COLOURS_SHARE = 0.45  # of what takes others
POSITIONS = ATTRIBUTES["position"]
NOTHING = 0  # the label of an empty place; things and colours come after it
# How often an attribute is said; the sky less often by day, so that where nothing is said of it, it often is.
SAID = {"ground": 0.55, "backdrop": 0.5, "sky": 0.7, "day": 0.4, "position": 0.4}
OWN_COLOUR_SAID = 0.3  # and how often a thing's own colour


@dataclass(frozen=True, slots=True)
class Placed:
    """A thing in a colour, OWN or one of its hues."""

    name: str
    colour: str = OWN

    @property
    def hue(self) -> str:
        """What its colour is called: where it is its own, the hue that this is like, or OWN."""
        return (THINGS[self.name].like or OWN) if self.colour == OWN else self.colour


@dataclass(frozen=True, slots=True)
class Scene:
    """One thing at `position`, or two: then the first stands on the left or right and the second opposite."""

    things: tuple[Placed, ...]
    ground: str
    backdrop: str
    sky: str
    position: str

    @property
    def places(self) -> dict[str, Placed]:
        """What stands where."""
        others = [place for place in ("left", "right") if place != self.position]
        return dict(zip([self.position, *others], self.things, strict=False))

    @property
    def labels(self) -> tuple[int, ...]:
        """What the judge reads: of each place the thing, then of each place the colour (0: nothing), then
        ground, backdrop and sky."""
        names, colours = list(THINGS), (OWN, *COLOURS)
        stands = [self.places.get(place) for place in POSITIONS]
        return (
            *(1 + names.index(one.name) if one else NOTHING for one in stands),
            *(1 + colours.index(one.hue) if one else NOTHING for one in stands),
            *(ATTRIBUTES[name].index(getattr(self, name)) for name in ("ground", "backdrop", "sky")),
        )

    @property
    def new_to_base(self) -> list[str]:
        """What the base model never saw."""
        new = [thing.name for thing in self.things if thing.name in HELD_OUT_THINGS]
        return new + [self.backdrop] * (self.backdrop == HELD_OUT_BACKDROP)

    @property
    def reserved(self) -> bool:
        """One of the 10 % of combinations that are set aside for tests."""
        return hashlib.sha256(repr(self.labels).encode()).digest()[0] < 256 * HELD_OUT_SHARE


def random_scene(rng: random.Random, name: str) -> Scene:
    """Return a scene with the thing `name` in it, and in every fifth another."""
    names = [name]
    if rng.random() < TWO_THINGS_SHARE:
        names.append(rng.choice([other for other in THINGS if other != name]))
    return Scene(
        tuple(Placed(name, _colour(rng, name)) for name in names),
        rng.choice(ATTRIBUTES["ground"]),
        rng.choice(ATTRIBUTES["backdrop"]),
        rng.choice((*ATTRIBUTES["sky"], "day")),
        rng.choice(POSITIONS if len(names) == 1 else ("left", "right")),
    )


def _colour(rng: random.Random, name: str) -> str:
    hues = THINGS[name].hues
    share = OWN_COLOURS_SHARE if len(hues) > 3 else 0.6
    return rng.choice(hues) if hues and rng.random() >= share else OWN


def draw_scenes(count: int, seed: int, reserved: bool | None = False, new: bool = False) -> list[Scene]:
    """Return `count` scenes, every thing about as often as any other, always the same ones.

    `reserved` combinations only, none of them, or with None both; what is `new` to the base is left out
    unless it is asked for.
    """
    rng, scenes, names = random.Random(f"scenes {seed}"), list[Scene](), list[str]()
    while len(scenes) < count:
        names = names or rng.sample(list(THINGS), len(THINGS))
        scene = random_scene(rng, names[-1])
        if scene.new_to_base and not new:
            if names[-1] in HELD_OUT_THINGS:
                names.pop()
            continue
        if reserved is None or scene.reserved == reserved:
            scenes.append(scene)
            names.pop()
    return scenes


def unseen_scenes(count: int, seed: int = 0) -> list[Scene]:
    """Return `count` combinations that the base never saw of what it knows, always the same ones."""
    return draw_scenes(count, seed, reserved=True)


def scenes_with(new: str, count: int, seed: int, reserved: bool = False) -> list[Scene]:
    """Return `count` scenes in which a held-out thing or the held-out backdrop is all that is new to the
    base, always the same ones."""
    rng, scenes, names = random.Random(f"{new} {seed}"), list[Scene](), [*THINGS]
    while len(scenes) < count:
        scene = random_scene(rng, new if new in THINGS else rng.choice(names))
        scene = scene if new in THINGS else replace(scene, backdrop=new)
        if scene.new_to_base == [new] and scene.reserved == reserved:
            scenes.append(scene)
    return scenes


@dataclass(frozen=True, slots=True)
class Said:
    """A caption, and which attributes of the scene it names."""

    text: str
    attributes: frozenset[str]


def say(scene: Scene, rng: random.Random, complete: bool = False) -> Said:
    """Return one of the many ways to say `scene`.

    Unless `complete`, about half of the attributes are left unsaid: what a prompt leaves open the model then
    chooses itself, by its noise. A colour that is not the thing's own is always said.
    """
    named = [
        name for name in ATTRIBUTES if complete or rng.random() < SAID.get(getattr(scene, name), SAID[name])
    ]

    def words(attribute: str) -> str:
        return rng.choice(WORDS[attribute][getattr(scene, attribute)]) if attribute in named else ""

    nouns = [_noun(thing, rng) for thing in scene.things]
    ground, backdrop, sky, position = (words(name) for name in ("ground", "backdrop", "sky", "position"))
    if backdrop:
        backdrop = rng.choice(WORDS["before_a_backdrop"]).format(backdrop)
    if position and len(nouns) == 2:  # of the first
        nouns[0], position = f"{nouns[0]} {position}", ""
        if rng.random() < 0.5:
            [other] = [place for place in ("left", "right") if place != scene.position]
            nouns[1] = f"{nouns[1]} {rng.choice(WORDS['position'][other])}"
    noun = f" {rng.choice(WORDS['between_things'])} ".join(nouns)
    parts = [part for part in (ground, backdrop, sky) if part]
    if rng.random() < 0.35:
        rng.shuffle(parts)
    if position:
        parts.insert(rng.choice((0, len(parts))), position)
    between = ", " if rng.random() < 0.25 else " "
    text = between.join([noun, *parts])
    if sky and between == " " and rng.random() < 0.12:  # "at night, a red car in the snow"
        parts.remove(sky)
        text = f"{sky}, {' '.join([noun, *parts])}"
    if rng.random() < 0.25:
        text = f"{rng.choice(WORDS['openings'])}{text}{rng.choice(WORDS['endings'])}"
    return Said(text, frozenset(named))


def caption(scene: Scene, rng: random.Random) -> str:
    """Return the text of `say`."""
    return say(scene, rng).text


def _noun(thing: Placed, rng: random.Random) -> str:
    word = rng.choice(THINGS[thing.name].words)
    said = thing.hue != OWN and (thing.colour != OWN or rng.random() < OWN_COLOUR_SAID)
    text = f"{rng.choice(WORDS['colour'][thing.hue])} {word}" if said else word
    article = "an" if text[0] in "aeio" else "a"
    if rng.random() < 0.2:
        article = rng.choice(("the", "", "one"))
    return f"{article} {text}".strip()


def say_half(scenes: Sequence[Scene], seed: int = 0) -> list[Said]:
    """Return one caption of each of `scenes`, in many wordings, always the same ones: of every other one that
    is complete, of the rest one that leaves about half open."""
    rng = random.Random(seed)
    return [say(scene, rng, complete=i % 2 == 0) for i, scene in enumerate(scenes)]
