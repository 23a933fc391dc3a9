"""The words that a model knows: which of a prompt's it does not, and what it says of them."""

import json
from dataclasses import replace

import pytest

from fewstep.models.specs import MODELS
from fewstep.models.vocabulary import MOST, Vocabulary, load_vocabulary, unknown_words_sentence

KNOWN = Vocabulary(
    frozenset({"a", "house", "t-rex", "red", "it's"}), {"helicopter": "rocket", "fire-truck": "car"}
)


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("a red HOUSE, a t-rex.", {}),
        ("a (red:1.3) (house)++ it's", {}),  # a weight is no word
        ("a Helicopter", {"helicopter": "rocket"}),
        ("a blorb house blorb", {"blorb": ""}),  # once
        ("a fire-truck", {"fire-truck": "car"}),
        ("red-house red-roof", {"roof": ""}),  # joined words count one by one
        ("ein rotes Häuschen 狐", {"ein": "", "rotes": "", "häuschen": "", "狐": ""}),
        ("(a:99) blorb", {}),  # refused before it is generated
        ("", {}),
    ],
)
def test_words_that_are_not_known_are_named_once_with_what_to_try(prompt, unknown):
    assert KNOWN.unknown(prompt) == unknown


def test_only_the_first_are_named():
    assert list(KNOWN.unknown(" ".join(f"word{i}" for i in range(30)))) == [f"word{i}" for i in range(MOST)]


def test_the_sentence_says_what_to_try():
    unknown = KNOWN.unknown("a helicopter over the blorb")
    expected = "the miniature does not know: helicopter (try rocket), over, the, blorb"
    assert unknown_words_sentence("miniature", unknown) == expected


def test_a_model_has_a_vocabulary_only_where_its_spec_names_one_and_the_file_is_there(tmp_path):
    miniature = MODELS["miniature"]
    assert load_vocabulary(miniature, tmp_path) is None
    other = tmp_path / "other"
    (other / "miniature").mkdir(parents=True)
    (other / "miniature" / str(miniature.vocabulary)).write_text(
        json.dumps({"words": ["fox"], "instead": {}})
    )
    loaded = load_vocabulary(miniature, other)
    assert loaded and loaded.unknown("fox owl") == {"owl": ""}
    assert load_vocabulary(replace(miniature, vocabulary=None), other) is None
    assert [name for name, spec in MODELS.items() if spec.vocabulary] == ["miniature"]
