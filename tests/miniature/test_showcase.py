"""The README's strips of images: one for every input, and each input does something."""

import itertools
import json
import re

import numpy as np
import pytest
from PIL import Image

from fewstep.coglet.server import ROOT, SCHEMA
from fewstep.evaluation.figures import GAP
from fewstep.generation.load import load_pipeline
from fewstep.miniature.showcase import EXAMPLES, HEIGHT, SETTINGS, SHEET_COLUMNS, SHEET_PX, strip, things
from fewstep.miniature.world.scenes import HELD_OUT_THINGS
from fewstep.miniature.world.things import THINGS
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


def test_a_sheet_of_things_has_every_thing_that_the_base_knows_once(pipeline, monkeypatch):
    asked = []

    def images(prompts, seeds, **how):
        asked.extend(zip(prompts, seeds, strict=True))
        return [Image.new("RGB", (8, 8))] * len(prompts)

    monkeypatch.setattr(pipeline, "images", images)
    sheet = things(pipeline, 5)
    assert len(asked) == len(set(asked)) == len(THINGS) - len(HELD_OUT_THINGS)
    assert {seed for _, seed in asked} == {5}
    assert ("a fox", 5) in asked and ("an owl", 5) in asked and ("a flamingo", 5) not in asked
    assert sheet.width == SHEET_COLUMNS * (SHEET_PX + GAP) - GAP
