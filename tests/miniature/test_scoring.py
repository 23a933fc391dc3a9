"""The committed miniature follows prompts: the judge's figures, with margin for fewer captions than the
card's; and the judge cannot be fooled by what is blurred, coarse or mixed."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from fewstep.evaluation.generate import ddim, few_steps
from fewstep.miniature.judge import PLACE_COUNT
from fewstep.miniature.scoring import TEACHER_GUIDANCE, Evaluator
from fewstep.miniature.vae import reconstruct
from fewstep.miniature.world.dataset import draw_many
from fewstep.miniature.world.scenes import unseen_scenes
from fewstep.miniature.world.things import OWN
from fewstep.miniature.world.words import COLOURS
from fewstep.settings import Settings
from fewstep.training.networks import load_base

pytestmark = pytest.mark.slow

FOLDER = Settings().weights_root / "miniature"
MANIFEST = json.loads((FOLDER / "manifest.json").read_text())
SCENES = unseen_scenes(120)


@pytest.fixture(scope="module")
def evaluator(judge):
    return Evaluator(judge, SCENES)


@pytest.fixture(scope="module")
def base():
    return load_base("miniature", Settings(verify="size"), torch.device("cpu"))


@pytest.fixture(scope="module")
def drawings():
    return draw_many(SCENES, 123_456_789, 256, 256)


@pytest.mark.numeric
def test_drawings_are_right_and_stay_so_through_the_autoencoder(evaluator, base, drawings):
    assert evaluator.measure(drawings)["all_right"] >= 97
    assert evaluator.measure(reconstruct(base.vae, drawings))["all_right"] >= 93


def _blurred(pixels):
    images = [Image.fromarray(image).filter(ImageFilter.GaussianBlur(3)) for image in pixels]
    return np.stack([np.asarray(image) for image in images])


def _coarse(pixels):
    small = [Image.fromarray(image).resize((16, 16), Image.Resampling.BOX) for image in pixels]
    return np.stack([np.asarray(image.resize((256, 256), Image.Resampling.BICUBIC)) for image in small])


def _averaged(pixels):
    return (
        np.mean([draw_many(SCENES, 10_000_000 * i, 256, 256) for i in (1, 2, 3)], 0).round().astype(np.uint8)
    )


fooled = pytest.mark.xfail(reason="8 in a hundred means of one scene pass")


@pytest.mark.numeric
@pytest.mark.parametrize("spoil", [_blurred, _coarse, pytest.param(_averaged, marks=fooled)])
def test_what_a_blur_or_a_mean_leaves_is_not_right(evaluator, drawings, spoil):
    """The mean is of three drawings of the same scenes: all that a prompt says is in it."""
    assert evaluator.measure(spoil(drawings))["all_right"] <= 3


PUBLISHED = {row["system"]: row["all_right"] for row in MANIFEST["extra"]["scores"]}
missed = pytest.mark.xfail(reason="one and two steps are not as good yet")
[TEACHER] = [right for system, right in PUBLISHED.items() if system.startswith("teacher")]


def _published(steps):
    return next(right for system, right in PUBLISHED.items() if system.startswith(f"LCM-LoRA, {steps} "))


@pytest.mark.parametrize(
    ("steps", "target"),
    [
        pytest.param(1, 55, marks=missed),
        pytest.param(2, TEACHER - 8, marks=missed),
        (4, TEACHER - 4),
        (8, TEACHER - 4),
    ],
)
def test_few_steps_are_as_good_as_they_are_meant_to_be(steps, target):
    assert _published(steps) >= target


def test_the_teacher_and_the_autoencoder_are_as_good_as_they_are_meant_to_be():
    assert TEACHER >= 88
    assert PUBLISHED["VAE's reconstruction"] >= 96


@pytest.mark.xfail(reason="they are less sharp: 8 points fewer are right")
def test_images_of_the_tiny_vae_are_as_right():
    [tiny] = [right for system, right in PUBLISHED.items() if "tiny" in system]
    assert tiny >= _published(4) - 5


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_few_steps_generate_what_was_asked(evaluator, pipeline, steps):
    found = evaluator.generate_and_score("", few_steps(pipeline, steps)).all_right
    share = _published(steps) / 100
    standard_error = 100 * (share * (1 - share) / len(SCENES)) ** 0.5
    assert found >= 100 * share - 2 * standard_error


@pytest.mark.xfail(reason="it calls most of them orange, though to eyes they are red")
def test_the_judge_reads_the_colour_of_generated_red_houses(judge, pipeline):
    seeds = range(1, 7)
    images = few_steps(pipeline, 4)(["a red house in the snow at night"] * len(seeds), seeds)
    labels = judge.look(images).labels
    red = 1 + (OWN, *COLOURS).index("red")
    assert (labels[:, PLACE_COUNT : 2 * PLACE_COUNT] == red).any(1).all()


def test_without_the_lora_two_steps_are_far_worse(evaluator, pipeline, base):
    with_lora = evaluator.generate_and_score("", few_steps(pipeline, 2))
    few = evaluator.first(40)
    without = few.generate_and_score("", partial(ddim(base, TEACHER_GUIDANCE, "trailing").generate, steps=2))
    assert without.all_right <= with_lora.all_right - 40
    assert without.distance > 1.5 * with_lora.distance


def test_the_card_shows_the_manifests_scores():
    card, scores = (FOLDER / "README.md").read_text(), MANIFEST["extra"]["scores"]
    assert len(scores) == 16
    for row in scores:
        assert f"| {row['system']} |" in card
        assert f"**{row['all_right']:.1f}** ({row['interval'][0]:.1f} to {row['interval'][1]:.1f})" in card


def test_the_folder_is_small_and_holds_the_judge_that_judged():
    assert sum(file["size"] for file in MANIFEST["files"]) < 50_000_000
    hashes = {file["path"]: file["sha256"] for file in MANIFEST["files"]}
    assert hashes["judge/judge.safetensors"] == MANIFEST["extra"]["judge_sha256"]
