"""The styles: what they leave alone, that the meter tells how much of one there is, and how much of the
committed ones is seen on top of the LCM-LoRA."""

import json

import numpy as np
import pytest
from safetensors import safe_open

from fewstep.miniature.scoring import Evaluator
from fewstep.miniature.styling import SCALES, load_style, score_style
from fewstep.miniature.world.dataset import draw_many
from fewstep.miniature.world.restyling import STYLES, StyleMeter
from fewstep.miniature.world.scenes import unseen_scenes
from fewstep.settings import Settings

pytestmark = pytest.mark.slow

FOLDER = Settings().styles_root / "miniature"
SCENES = unseen_scenes(700, seed=9)  # to 400 of them meters are fitted, as elsewhere


def styled_drawings(name, scenes=SCENES, seed=5):
    return draw_many(scenes, seed, 128, 128, STYLES[name].draw)


def published(name):
    """Return what the card says is right of a style's images, at each of SCALES."""
    rows = [line.strip("| ").split(" | ") for line in (FOLDER / "README.md").read_text().splitlines()]
    [head] = [row for row in rows if row[0] == "style_scale"]
    column = head.index(f"{name}: style") + 1
    found = {row[0]: float(row[column]) for row in rows if row[0] in {f"{scale:g}" for scale in SCALES}}
    return [found[f"{scale:g}"] for scale in SCALES]


@pytest.fixture(scope="module")
def plain():
    return draw_many(SCENES, 5, 128, 128)


@pytest.fixture(scope="module", params=STYLES)
def styled(request):
    return request.param, styled_drawings(request.param)


def test_the_same_seed_draws_the_same_image_and_another_does_not(styled, plain):
    name, images = styled
    assert np.array_equal(images[:3], styled_drawings(name, SCENES[:3]))
    assert not np.array_equal(images[:3], styled_drawings(name, SCENES[:3], 6))
    assert np.abs(images.astype(int) - plain).mean() > 2
    [wide] = draw_many(SCENES[:1], 5, 192, 80, STYLES[name].draw)
    assert wide.shape == (80, 192, 3)


@pytest.mark.numeric
def test_the_judge_reads_what_a_style_leaves_alone(judge):
    evaluator = Evaluator(judge, SCENES[:100])
    for name, style in STYLES.items():
        drawn = draw_many(evaluator.scenes, 5, 256, 256, style.draw)
        seen = judge.look(drawn)
        attributes = evaluator.attributes(seen)
        read = {"whole": seen.whole.mean(), **{which: attributes[which].mean() for which in style.leaves}}
        assert min(read.values()) >= 0.93, (name, read)


def test_the_meter_tells_how_much_of_a_style_images_have(styled, plain):
    _, images = styled
    meter = StyleMeter(plain[:400], images[:400])
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    found = []
    for share in shares:  # images that it has not seen, ever more of their styled selves
        mixed = (1 - share) * plain[400:] + share * images[400:]
        found.append(meter(mixed.round().astype(np.uint8)).mean())
    assert found == sorted(found)
    assert abs(found[0]) < 0.1 and abs(found[-1] - 1) < 0.15


def test_the_meter_of_one_style_does_not_take_another_for_it(plain):
    flat, gold = (styled_drawings(name) for name in ("flat", "golden-hour"))
    meter = StyleMeter(plain[:400], gold[:400])
    assert meter(flat[400:]).mean() < 0.2


missed = pytest.mark.xfail(reason="it was trained too shortly")
MISSED = {("flat", 1.0), ("golden-hour", 1.0), ("ink", 0.8), ("ink", 1.0)}
TARGETS = [
    pytest.param(name, scale, marks=missed if (name, scale) in MISSED else ())
    for name in STYLES
    for scale in (0.8, 1.0)
]


@pytest.mark.parametrize("name", STYLES)
def test_a_style_grows_with_its_scale_and_leaves_as_much_right_as_the_card_says(pipeline, judge, name):
    style, scenes = load_style(pipeline, FOLDER / f"{name}.safetensors"), unseen_scenes(30)
    scores = score_style(name, style, pipeline, judge, scenes, (0.0, 0.5, 1.0), drawings=80)
    strength, right = zip(*scores, strict=True)
    assert list(strength) == sorted(set(strength)) and strength[-1] > strength[0] + 0.3, scores
    share = published(name)[SCALES.index(1.0)] / 100
    assert right[-1] >= 100 * (share - 2 * (share * (1 - share) / len(scenes)) ** 0.5), scores


@pytest.mark.parametrize(("name", "scale"), TARGETS)
def test_a_style_leaves_the_rest_right(name, scale):
    right = dict(zip(SCALES, published(name), strict=True))
    assert right[scale] >= right[0] - 5


@pytest.mark.parametrize("name", STYLES)
def test_the_files_are_small_and_of_rank_8(name):
    path = FOLDER / f"{name}.safetensors"
    assert path.stat().st_size < 1_200_000
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.r"] == 8


def test_the_card_has_every_style_and_scale():
    card = (FOLDER / "README.md").read_text()
    assert all(f"{name}: style" in card for name in STYLES)
    assert all(f"| {scale:g} |" in card for scale in SCALES)
