"""The words of the miniature's world, apart from its things: see words.toml."""

from __future__ import annotations

import tomllib
from pathlib import Path

WORDS = tomllib.loads(Path(__file__).with_name("words.toml").read_text(encoding="utf-8"))
COLOURS = tuple(WORDS["colour"])
ATTRIBUTES = {name: tuple(WORDS[name]) for name in ("ground", "backdrop", "sky", "position")}
