"""The list of the words that the miniature knows, which lies beside its weights."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.miniature.world.scenes import HELD_OUT_BACKDROP, HELD_OUT_THINGS
from fewstep.miniature.world.things import THINGS
from fewstep.miniature.world.words import ATTRIBUTES, WORDS

FILE = "vocabulary.json"
NEIGHBOURS = Path(__file__).with_name("world") / "neighbours.json"
# What a prompt holds besides names: a model that ignores these loses nothing.
PLAIN = """\
a about all also an and are as at be big both but by can very do each few for from go good has have he
her here his how i if in into is it its just like little look looking lot lots make many me more most my
new nice no not now of off old on one only or other our out over own please really same see she show
small so some stand standing sit sitting such sweet than that the their them then there these they this
those through tiny to too two under up us view was we what when where which while who will with without
you your very huge large beautiful cute pretty lovely awesome amazing great best high quality detailed
highly ultra hd 4k 8k masterpiece digital art artwork picture image photo photograph painting drawing
illustration render style scene background foreground color colour colored coloured realistic cinematic
dramatic lighting sharp focus trending artstation"""


def known_words(wordings: Iterable[str]) -> set[str]:
    """Return the single words of `wordings` and those that need no meaning."""
    words = {word for wording in wordings for word in re.findall(r"[\w-]+", wording.lower())}
    return words | {part for word in words for part in word.split("-")} | set(PLAIN.split())


def world_words() -> set[str]:
    """Return the words of the world that the base has seen."""
    things = [word for name, one in THINGS.items() if name not in HELD_OUT_THINGS for word in one.words]
    rest = [*WORDS["openings"], *WORDS["endings"], *WORDS["before_a_backdrop"], *WORDS["between_things"]]
    for attribute in ("colour", *ATTRIBUTES):
        for value, wordings in WORDS[attribute].items():
            rest += wordings if value != HELD_OUT_BACKDROP else ()
    return known_words([*things, *rest])


def neighbours(emoji: Iterable[Mapping[str, Any]], things: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return for words the plain word of the thing that stands nearest to them.

    `emoji` are emojibase's (`hexcode`, `label`, `tags`, `subgroup`, `order`), `things` the words for some of
    them, by code point, the plain one first. A keyword of a thing stands for it, and so does the plural of a
    word for it; the name of another emoji stands for the thing of its subgroup that shares most keywords with
    it, or else is nearest on the keyboard.
    """
    rows = [row for row in emoji if "subgroup" in row]
    ours = {code: row for row in rows if (code := _code(row["hexcode"])) in things}
    votes: dict[str, Counter[str]] = {}
    for row in rows:
        code, tags = _code(row["hexcode"]), set(row.get("tags", ()))
        names = [word for word in row["label"].lower().split() if len(word) > 2]
        if code in ours:
            for tag in tags:
                votes.setdefault(tag.lower(), Counter())[things[code][0]] += 1000
        elif len(names) in (1, 2):  # "airplane", "delivery truck"
            for other, its in ours.items():
                if row["subgroup"] == its["subgroup"]:
                    away = min(abs(row["order"] - its["order"]), 99)
                    near = 100 * (1 + len(tags & set(its.get("tags", ())))) - away
                    count = votes.setdefault(names[-1], Counter())
                    count[things[other][0]] = max(count[things[other][0]], near)
    plain = {word: max(count, key=lambda name: (count[name], name)) for word, count in votes.items()}
    found = {word: name for word, name in plain.items() if re.fullmatch(r"[a-z]{3,}", word)}
    last: dict[str, str] = {}
    for words in things.values():
        for word in words:
            last.setdefault(word.split()[-1], words[0])
    return found | {_plural(word): name for word, name in last.items() if not word.endswith("es")}


def write_vocabulary(weights: Path) -> None:
    """Write the list of the world's words into `weights`, and for some others one of these instead; a line
    for each of the two parts."""
    words, near = world_words(), json.loads(NEIGHBOURS.read_text(encoding="utf-8"))
    near |= {word[:-1]: word for word in words if re.fullmatch(r"\w{4,}[^s]s", word)}  # "mountain"
    instead = {word: name for word, name in sorted(near.items()) if word not in words}
    parts = {"words": sorted(words), "instead": instead}
    lines = ",\n".join(f'"{name}": {json.dumps(part, ensure_ascii=False)}' for name, part in parts.items())
    (weights / FILE).write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def _code(hexcode: str) -> str:
    return hexcode.lower().removesuffix("-fe0f")


def _plural(word: str) -> str:
    if word.endswith(("s", "x", "sh", "ch")):
        return word + "es"
    return word[:-1] + "ies" if word[-1] == "y" and word[-2] not in "aeiou" else word + "s"
