import pickle

import pytest

from fewstep import errors

SUBCLASSES = errors.FewstepError.__subclasses__()


def test_text_is_code_and_sentence():
    error = errors.InvalidRequest("steps is 9; it must be a whole number from 1 to 8")

    assert str(error) == "[invalid_request] steps is 9; it must be a whole number from 1 to 8"


def test_codes_are_the_published_ones():
    assert {kind.code for kind in SUBCLASSES} == {
        "invalid_request",
        "weights",
        "download",
        "settings",
        "dataset",
        "training",
        "generation_failed",
        "safety_check_failed",
        "unsafe",
        "deadline",
        "stopped",
        "internal",
    }


@pytest.mark.parametrize("kind", SUBCLASSES)
def test_every_kind_is_in_the_drawn_tree_with_its_code(kind):
    assert any(kind.__name__ in line and f" {kind.code} " in line for line in errors.__doc__.splitlines())


@pytest.mark.parametrize("kind", SUBCLASSES)
def test_survives_a_process_boundary(kind):
    there_and_back = pickle.loads(pickle.dumps(kind("a sentence")))

    assert type(there_and_back) is kind
    assert str(there_and_back) == f"[{kind.code}] a sentence"


def test_internal_error_needs_no_words_and_never_reads_as_a_cancel():
    text = str(errors.InternalError())

    assert text.startswith("[internal] ")
    # coglet takes an error with this word in it for a cancel.
    assert "cancel" not in text.lower()
