"""How a prompt is written: words with weights, `(word)1.3`, `(word:1.3)`, `(word)++` and `word--`.

The first, the pluses and the minuses are compel's, the second is what other tools write. What is no weight is
text: a prompt without one is encoded as it stands. compel's own parser is not used, because its time grows
eightfold with every open parenthesis; a test compares the two.
"""

import re
from dataclasses import dataclass
from itertools import groupby

from fewstep.errors import InvalidRequest

WEIGHT = (0.0, 3.0)
# Every part below 1 is encoded once more without it.
MAX_BELOW_1 = 8
PLUS, MINUS = 1.1, 0.9  # each, as in compel

_NUMBER = r"(?:\d+(?:\.\d+)?|\.\d+)"
_SIGNS = r"(?:\++|-+)"
_WORD_ENDS = r"""(?=[\s,.;:!?)"']|$)"""
_TOKEN = re.compile(
    rf"""
      \\ (?P<escaped> [()+-] )
    | (?P<open> \( )
    | (?: : \s* (?P<inner> {_NUMBER} ) \s* )? (?P<close> \) ) (?P<outer> {_NUMBER} | {_SIGNS} {_WORD_ENDS} )?
    | (?P<word> [^\s()\\:,.;"]* \w ) (?P<signs> {_SIGNS} ) {_WORD_ENDS}
    | (?P<text> [^\s()\\:,.;"]+ | . )
    """,
    re.VERBOSE | re.DOTALL,
)
_OF_COMPEL = re.compile(r"\)\.(and|add|attend|blend|swap)\(")
_LORA = re.compile(r"<lora:|\b(?:use|with)Lora\(")


@dataclass(frozen=True, slots=True)
class Part:
    """Text of one weight; 1 is how the model was trained."""

    text: str
    weight: float = 1.0


def parse_prompt(name: str, text: str) -> tuple[Part, ...]:
    """`text` as parts, none of them blank; a plain prompt is one part, and a blank one none.

    `name` is that of the input. Raises InvalidRequest for weights out of range, too many of them below 1, and
    for what others write into prompts but fewstep takes elsewhere or not at all.
    """
    if operator := _OF_COMPEL.search(text):
        raise InvalidRequest(
            f"{name} uses .{operator[1]}(), which is not supported; of compel's syntax, weights are: "
            "(word)1.3, (word)++ and word--"
        )
    if _LORA.search(text):
        raise InvalidRequest(f"{name} names a LoRA; put that into the input style")
    runs = groupby(_weighted(text), key=lambda piece: piece.weight)
    joined = (Part("".join(piece.text for piece in run), weight) for weight, run in runs)
    parts = tuple(part for part in joined if part.text.strip())
    for weight in (part.weight for part in parts):
        if not WEIGHT[0] <= weight <= WEIGHT[1]:
            raise InvalidRequest(
                f"{name} gives a word the weight {weight:.4g}; "
                f"weights from {WEIGHT[0]:g} to {WEIGHT[1]:g} are allowed"
            )
    if (below := sum(part.weight < 1 for part in parts)) > MAX_BELOW_1:
        raise InvalidRequest(
            f"{name} has {below} parts of a weight below 1; at most {MAX_BELOW_1} are allowed"
        )
    return parts


def is_plain(parts: tuple[Part, ...]) -> bool:
    """Whether no word has a weight of its own."""
    return all(part.weight == 1 for part in parts)


def _weighted(text: str) -> list[Part]:
    """The text piece by piece. A parenthesis that has no partner, or no weight, is text."""
    pieces: list[Part] = []
    opened: list[int] = []  # where in `pieces` the open parentheses stand
    for token in _TOKEN.finditer(text):
        if token["open"]:
            opened.append(len(pieces))
            pieces.append(Part("("))
        elif token["close"] and opened and (token["inner"] or token["outer"]):
            start = opened.pop()
            factor = _factor(token["inner"]) * _factor(token["outer"])
            inside = [Part(" "), *pieces[start + 1 :], Part(" ")]  # a word ends where a parenthesis stood
            pieces[start:] = [Part(piece.text, piece.weight * factor) for piece in inside]
        elif token["word"]:
            pieces.append(Part(token["word"], _factor(token["signs"])))
        else:
            if token["close"] and opened:
                opened.pop()
            pieces.append(Part(token["escaped"] or token[0]))
    return pieces


def _factor(written: str | None) -> float:
    if not written:
        return 1.0
    if written[0] in "+-":
        return float((PLUS if written[0] == "+" else MINUS) ** len(written))
    return float(written)
