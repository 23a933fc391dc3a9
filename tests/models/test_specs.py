import math

import pytest

from fewstep.errors import SettingsError
from fewstep.models.specs import MODELS, get_model


def test_models_are_found_by_their_own_name():
    assert {name: get_model(name).name for name in MODELS} == {name: name for name in MODELS}


def test_unknown_model_lists_the_known_ones_and_not_what_was_given():
    with pytest.raises(SettingsError) as caught:
        get_model("my secret model")

    assert all(name in str(caught.value) for name in MODELS)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("spec", MODELS.values(), ids=MODELS)
def test_the_facts_about_a_model_go_together(spec):
    assert spec.max_pixels >= spec.native_size**2
    assert math.isqrt(spec.max_pixels) % 8 == 0
    assert not (spec.lcm_lora and spec.embedded_guidance)
    assert spec.default_guidance == (8.0 if spec.embedded_guidance else 1.0)
    assert spec.name in spec.fix
    assert not any(word.startswith(("/", "~")) for word in spec.fix.split())


def test_only_the_miniature_and_random_weights_need_no_safety_checker():
    assert [name for name, spec in MODELS.items() if not spec.needs_safety_checker] == ["miniature"]
    assert not get_model("sdxl-random").needs_safety_checker
