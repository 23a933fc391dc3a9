import pickle

import pytest

from fewstep import errors

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
KINDS.remove(errors.FewstepError)


def test_codes_and_statuses_are_the_published_ones():
    assert {kind.code: kind.status for kind in KINDS} == {
        "invalid_request": 422,
        "lora": 422,
        "refused": 422,
        "weights": 500,
        "download": 500,
        "server": 500,
        "settings": 500,
        "dataset": 500,
        "training": 500,
        "generation_failed": 500,
        "out_of_memory": 503,
        "device_lost": 503,
        "safety_check_failed": 500,
        "unsafe": 422,
        "deadline": 503,
        "busy": 503,
        "too_many_requests": 429,
        "stopped": 503,
        "not_found": 404,
        "method_not_allowed": 405,
        "taken": 409,
        "invalid_api_key": 401,
        "unknown_host": 421,
        "other_site": 403,
        "too_long": 413,
        "too_slow": 408,
        "help_failed": 502,
        "internal": 500,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_survives_a_process_boundary_and_can_be_made_from_its_code(kind):
    for made in (
        pickle.loads(pickle.dumps(kind("a sentence"))),
        errors.error_in(f"before [{kind.code}] a sentence"),
    ):
        alone = kind in (errors.Refused, errors.ServerFailed)  # as a terminal shows it
        assert type(made) is kind and made.sentence == "a sentence"
        assert str(made) == ("a sentence" if alone else f"[{kind.code}] a sentence")


def test_a_code_of_a_later_version_is_a_failed_generation():
    assert type(errors.error_in("[unheard_of] a sentence")) is errors.GenerationError
    assert errors.error_in("it ended [1] somehow") is None


def test_internal_error_needs_no_words_and_never_reads_as_a_cancel():
    text = str(errors.InternalError())
    assert text.startswith("[internal] ")
    # coglet takes an error with this word in it for a cancel.
    assert "cancel" not in text.lower()
