"""Weights of words: what is written, and that compel reads the same."""

import random
import re

import pytest
from compel.prompt_parser import PromptParser

from fewstep.errors import InvalidRequest
from fewstep.prompts import MAX_BELOW_1, is_plain, parse_prompt


def parts(text):
    return [(part.text.strip(), round(part.weight, 4)) for part in parse_prompt("prompt", text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a (red)1.3 house", [("a", 1), ("red", 1.3), ("house", 1)]),
        ("a (red:1.3) house", [("a", 1), ("red", 1.3), ("house", 1)]),
        ("a (red : .5 ) house", [("a", 1), ("red", 0.5), ("house", 1)]),
        ("(red)++, (blue)--.", [("red", 1.21), (",", 1), ("blue", 0.81), (".", 1)]),
        (
            "red++,blue-. a snow-covered house",
            [("red", 1.21), (",", 1), ("blue", 0.9), (". a snow-covered house", 1)],
        ),
        ("((red)1.2 house)1.1", [("red", 1.32), ("house", 1.1)]),
        ("((red:1.2) house:1.1)", [("red", 1.32), ("house", 1.1)]),
        ("(red (the) house)1.1", [("red (the) house", 1.1)]),
        ("(red:1.1)1.2", [("red", 1.32)]),
        ("(a (b)+ c:0.5)-", [("a", 0.45), ("b", 0.495), ("c", 0.45)]),
        ("a+b+ c", [("a+b", 1.1), ("c", 1)]),
        ("(red)1.3(blue)1.3", [("red  blue", 1.3)]),
        ("(red)1.3  (blue)1.2 ", [("red", 1.3), ("blue", 1.2)]),
        ("(a:b)1.2", [("a:b", 1.2)]),
        ("(雪)1.2の家", [("雪", 1.2), ("の家", 1)]),
        (r"(a \(b\))1.2 C\+\+ \- d\-", [("a (b)", 1.2), ("C++ - d-", 1)]),
        ("a (b (c)1.2", [("a (b", 1), ("c", 1.2)]),
        ("a) b)1.2", [("a) b)1.2", 1)]),
        ("(red)0", [("red", 0)]),
    ],
)
def test_words_have_the_weights_that_are_written(text, expected):
    assert parts(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "a house (red)",
        "a (b",
        "c) d",
        "a - b -10 + c",
        "black-and-white, 16:9, e.g. 1,000",
        "smile :-) :)",
        "(red)-haired",
        "(red) 1.3",
        '"quoted" (it\'s)',
        "((((",
        "a\\b",
        "line\nline",
    ],
)
def test_what_is_no_weight_is_text_as_it_stands(text):
    assert parts(text) == [(text, 1)]
    assert is_plain(parse_prompt("prompt", text))


@pytest.mark.parametrize("text", ["", "  \n", "()1.3", "( )++"])
def test_of_blank_text_there_are_no_parts(text):
    assert parts(text) == []


@pytest.mark.parametrize("weight", ["3.01", "99999", "1" * 400, "+" * 12, "+" * 1900])
def test_a_weight_out_of_range_is_refused_with_the_range(weight):
    with pytest.raises(InvalidRequest, match=r"the weight .*; weights from 0 to 3 are allowed"):
        parse_prompt("prompt", f"a (red){weight}")


def test_weights_of_nested_parentheses_are_counted_together():
    with pytest.raises(InvalidRequest, match="the weight 4;"):
        parse_prompt("negative_prompt", "((red)2 house)2")


def test_few_parts_may_count_less():
    assert len(parts("a- b " * MAX_BELOW_1)) == 2 * MAX_BELOW_1
    with pytest.raises(InvalidRequest, match=f"prompt has {MAX_BELOW_1 + 1} parts of a weight below 1"):
        parse_prompt("prompt", "a- b " * (MAX_BELOW_1 + 1))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('("a house", "a car").and()', r"uses \.and\(\)"),
        ('("a house", "a car").blend(0.3, 0.7)', r"uses \.blend\(\)"),
        ("a (cat).swap(dog)", r"uses \.swap\(\)"),
        ("a house <lora:snow:0.8>", "put that into the input style"),
        ("a house withLora(snow, 0.8)", "put that into the input style"),
    ],
)
def test_what_belongs_elsewhere_is_refused(text, said):
    with pytest.raises(InvalidRequest, match=f"^\\[invalid_request\\] prompt .*{said}"):
        parse_prompt("prompt", text)


@pytest.mark.parametrize(
    "text",
    [
        "(" * 2000,
        "( " * 1000,
        "(" * 999 + "a" + ")1" * 500,
        "(a" * 1000,
        "a+" * 1000,
        ":1" * 1000,
        "+-" * 1000,
        '("' * 1000,
    ],
)
def test_no_prompt_takes_long_to_read(text):  # in compel's parser, 12 open parentheses take days
    parse_prompt("prompt", text)


def generated(rng, depth=2):
    """A prompt in compel's syntax, as people write it."""
    words = ["red", "house", "old-fashioned", "snow", "e.g.", "16mm", "it's", "雪"]
    weights = ["1.3", "0.7", ".5", "2", "+", "++", "-", "--"]
    found = []
    for _ in range(rng.randint(1, 4)):
        kind = rng.choice(["word", "word", "sign", "group"] if depth else ["word", "sign"])
        if kind == "word":
            found.append(rng.choice(words) + rng.choice(["", "", ","]))
        elif kind == "sign":
            found.append(rng.choice(["red", "snow"]) + rng.choice(weights[4:]))
        else:
            found.append(f"({generated(rng, depth - 1)}){rng.choice(weights)}")
    return " ".join(found)


def by_word(found):
    return [(word, round(weight, 6)) for text, weight in found for word in re.findall(r"\w+|[^\w\s]", text)]


@pytest.mark.parametrize("seed", range(60))
def test_compel_reads_the_same(seed):
    rng = random.Random(seed)
    text = next(text for text in iter(lambda: generated(rng), None) if len(text) < 80)
    [prompt] = PromptParser().parse_conjunction(text).prompts
    expected = by_word((part.text, part.weight) for part in prompt.children)
    try:
        found = parse_prompt("prompt", text)
    except InvalidRequest:
        assert any(weight > 3 for _, weight in expected)
        return
    assert by_word((part.text, part.weight) for part in found) == expected
