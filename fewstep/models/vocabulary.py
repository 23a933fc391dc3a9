"""The words that a model was trained on, for one that knows so few that it says which it does not know."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fewstep.errors import InvalidRequest
from fewstep.models.specs import ModelSpec
from fewstep.prompts import parse_prompt

MOST = 8  # unknown words that are named
_WORD = re.compile(r"[^\W_]+(?:['\N{RIGHT SINGLE QUOTATION MARK}-][^\W_]+)*")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The words that have a meaning to a model or need none, and for some others one of these instead."""

    words: frozenset[str]
    instead: Mapping[str, str]

    def unknown(self, prompt: str) -> dict[str, str]:
        """Return the first words of `prompt` that the model does not know, and for each a known one that may
        do instead, or nothing."""
        try:
            text = " ".join(part.text for part in parse_prompt("prompt", prompt))
        except InvalidRequest:  # it is refused anyhow
            return {}
        found = [word for word in _WORD.findall(text.lower()) if word not in self.words]
        parts = (part for word in found for part in ([word] if word in self.instead else word.split("-")))
        unknown = list(dict.fromkeys(part for part in parts if part not in self.words))
        return {word: self.instead.get(word, "") for word in unknown[:MOST]}


@cache
def load_vocabulary(spec: ModelSpec, weights_root: Path) -> Vocabulary | None:
    """Return the vocabulary that lies beside the weights of `spec`; None for a model that names none, which
    knows whatever people write."""
    path = weights_root / spec.name / str(spec.vocabulary)
    if not spec.vocabulary or not path.exists():  # a missing file is the manifest's to tell
        return None
    content = json.loads(path.read_text(encoding="utf-8"))
    return Vocabulary(frozenset(content["words"]), content["instead"])


def unknown_words_sentence(model: str, unknown: Mapping[str, str]) -> str:
    """Return a sentence for whoever wrote the prompt."""
    words = [f"{word} (try {instead})" if instead else word for word, instead in unknown.items()]
    return f"the {model} does not know: {', '.join(words)}"
