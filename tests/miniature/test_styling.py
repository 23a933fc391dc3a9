"""The styles: what they leave alone, that the meter tells how much of one there is, and how much of the
committed ones is seen on top of the LCM-LoRA."""

import json

import numpy as np
import pytest
from safetensors import safe_open

from fewstep.miniature.styling import SCALES, load_style, score_style
from fewstep.miniature.world.dataset import draw_many
from fewstep.miniature.world.restyling import STYLES, StyleMeter, draw_restyled
from fewstep.miniature.world.scenes import ATTRIBUTES, unseen_scenes
from fewstep.settings import Settings

pytestmark = pytest.mark.slow

FOLDER = Settings().styles_root / "miniature"
SCENES = unseen_scenes(300, seed=9)


@pytest.fixture(scope="module")
def plain():
    return draw_many(SCENES, 5, 128, 128)


@pytest.fixture(scope="module", params=STYLES)
def styled(request):
    return request.param, draw_restyled(request.param, SCENES, 5, 128, 128)


def test_the_same_seed_draws_the_same_image_and_another_does_not(styled):
    name, images = styled
    assert np.array_equal(images[:3], draw_restyled(name, SCENES[:3], 5, 128, 128))
    assert not np.array_equal(images[:3], draw_restyled(name, SCENES[:3], 6, 128, 128))
    assert draw_restyled(name, SCENES[:2], 5, 192, 80).shape == (2, 80, 192, 3)


def test_the_judge_still_reads_what_a_style_leaves_alone(styled, judge):
    name, images = styled
    read = dict(zip(ATTRIBUTES, judge.score(images, SCENES).mean(0), strict=True))
    assert {attribute for attribute, share in read.items() if share >= 0.98} >= set(STYLES[name].leaves)


def test_the_meter_tells_how_much_of_a_style_images_have(styled, plain):
    _, images = styled
    meter = StyleMeter(plain[:200], images[:200])
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    found = []
    for share in shares:  # images that it has not seen, ever more of their styled selves
        mixed = (1 - share) * plain[200:] + share * images[200:]
        found.append(meter(mixed.round().astype(np.uint8)).mean())
    assert found == sorted(found)
    assert abs(found[0]) < 0.1 and abs(found[-1] - 1) < 0.15


def test_the_meter_of_one_style_does_not_take_another_for_it(plain):
    card, gold = (draw_restyled(name, SCENES, 5, 128, 128) for name in ("postcard", "golden-hour"))
    meter = StyleMeter(plain[:200], gold[:200])
    assert meter(card[200:]).mean() < 0.2


@pytest.mark.parametrize("name", STYLES)
def test_a_style_grows_with_its_scale_and_leaves_the_rest_right(pipeline, judge, name):
    style = load_style(pipeline, FOLDER / f"{name}.safetensors")
    scores = score_style(name, style, pipeline, judge, unseen_scenes(30), (0.0, 0.5, 1.0), drawings=80)
    strength, right = zip(*scores, strict=True)
    assert list(strength) == sorted(set(strength)) and strength[-1] > strength[0] + 0.3, scores
    assert right[-1] >= right[0] - 5, scores


@pytest.mark.parametrize("name", STYLES)
def test_the_files_are_small_and_of_rank_8(name):
    path = FOLDER / f"{name}.safetensors"
    assert path.stat().st_size < 1_000_000
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.r"] == 8


def test_the_card_has_every_style_and_scale():
    card = (FOLDER / "README.md").read_text()
    assert all(f"{name}: style" in card for name in STYLES)
    assert all(f"| {scale:g} |" in card for scale in SCALES)
