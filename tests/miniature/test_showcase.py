"""The README's strips of images: one for every input, and each input does something."""

import itertools
import json
import re

import numpy as np
import pytest

from fewstep.coglet.server import ROOT, SCHEMA
from fewstep.evaluation.figures import GAP
from fewstep.generation.load import load_pipeline
from fewstep.miniature.showcase import EXAMPLES, HEIGHT, SETTINGS, strip
from fewstep.models.specs import get_model

INPUTS = json.loads(SCHEMA.read_text())["components"]["schemas"]["Input"]["properties"]
NOT_FOR_THE_MINIATURE = {"disable_safety_checker"}  # its images are not checked


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(get_model("miniature"), SETTINGS)


def test_the_readme_has_a_row_with_an_image_for_every_input():
    rows = re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    shown = {name: re.search(r"\]\((docs/inputs/\w+\.webp)\)", last) for name, last in rows if name in INPUTS}
    assert set(shown) == set(INPUTS)
    assert {name for name, image in shown.items() if image} == set(EXAMPLES)
    assert set(EXAMPLES) == set(INPUTS) - NOT_FOR_THE_MINIATURE
    assert all((ROOT / image[1]).is_file() for image in shown.values() if image)


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_a_strip_varies_is_its_input_and_changes_the_image(pipeline, name):
    examples = EXAMPLES[name]
    assert any(name in example for example in examples)
    for one, other in itertools.combinations(examples, 2):
        varied = {key for key in one | other if one.get(key) != other.get(key)}
        assert varied - {"prompt", "seed", "image", "mask", "prompt_strength"} <= {name}
    strips = [np.asarray(strip(pipeline, [example])) for example in examples]
    for one, other in itertools.combinations(strips, 2):
        assert one.shape != other.shape or not np.array_equal(one, other)


@pytest.mark.numeric
def test_a_strip_is_its_images_side_by_side(pipeline):
    exact = {"output_format": "png"}  # a lossy format makes more of a difference
    together = strip(pipeline, [example | exact for example in EXAMPLES["num_outputs"]])
    assert together.size == (4 * HEIGHT + 3 * GAP, HEIGHT)
    one = strip(pipeline, [exact])
    # Alone and in a batch, kernels differ.
    assert np.abs(np.subtract(np.asarray(together)[:, :HEIGHT], np.asarray(one), dtype=int)).max() <= 1
