"""The README's strips of pictures: one for every input, and each input does something."""

import itertools
import re

import numpy as np
import pytest

from fewstep.miniature.examples import EXAMPLES, GAP, HEIGHT, Painter
from fewstep.models import get_model
from fewstep.pipeline import load_pipeline
from fewstep.schema import make_schema
from fewstep.server import ROOT
from fewstep.settings import Settings

INPUTS = make_schema(ROOT / "predict.py")["components"]["schemas"]["Input"]["properties"]
NOT_FOR_THE_MINIATURE = {"disable_safety_checker"}  # its pictures are not checked


@pytest.fixture(scope="module")
def painter() -> Painter:
    settings = Settings(dtype="fp32")
    return Painter(load_pipeline(get_model("miniature"), settings), settings.styles_root / "miniature")


def test_the_readme_has_a_row_with_a_picture_for_every_input():
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    shown = {name: re.search(r"\]\((docs/inputs/\w+\.webp)\)", last) for name, last in rows if name in INPUTS}
    assert set(shown) == set(INPUTS)
    assert {name for name, picture in shown.items() if picture} == set(EXAMPLES)
    assert set(EXAMPLES) == set(INPUTS) - NOT_FOR_THE_MINIATURE
    assert all((ROOT / picture[1]).is_file() for picture in shown.values() if picture)


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_a_strip_varies_is_its_input_and_changes_the_picture(painter, name):
    wishes = EXAMPLES[name]
    assert any(name in wish for wish in wishes)
    for one, other in itertools.combinations(wishes, 2):
        varied = {key for key in one | other if one.get(key) != other.get(key)}
        assert varied - {"prompt", "seed", "image", "mask", "prompt_strength"} <= {name}
    strips = [np.asarray(painter.strip([wish])) for wish in wishes]
    for one, other in itertools.combinations(strips, 2):
        assert one.shape != other.shape or not np.array_equal(one, other)


@pytest.mark.numeric
def test_a_strip_is_its_pictures_side_by_side(painter):
    strip = painter.strip(EXAMPLES["num_outputs"])
    assert strip.size == (4 * HEIGHT + 3 * GAP, HEIGHT)
    one = painter.strip([{}])
    # Alone and in a batch, kernels differ.
    assert np.abs(np.subtract(np.asarray(strip)[:, :HEIGHT], np.asarray(one), dtype=int)).max() <= 1
