"""The committed miniature follows prompts: the judge's figures, with margin for fewer captions than the
card's."""

import json
from functools import partial

import pytest
import torch

from fewstep.evaluation.generate import ddim, few_steps
from fewstep.miniature.judge import Evaluator
from fewstep.miniature.scoring import TEACHER_GUIDANCE, TEACHER_STEPS
from fewstep.miniature.vae import reconstruct
from fewstep.miniature.world.dataset import draw_many
from fewstep.miniature.world.scenes import unseen_scenes
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


@pytest.mark.numeric
def test_the_autoencoder_keeps_every_attribute(judge, base):
    drawn = draw_many(SCENES, 123_456_789, 128, 128)
    assert judge.score(drawn, SCENES).all(1).mean() >= 0.98
    assert judge.score(reconstruct(base.vae, drawn), SCENES).all(1).mean() >= 0.95


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_few_steps_generate_what_was_asked(evaluator, pipeline, steps):
    assert evaluator.generate_and_score("", few_steps(pipeline, steps)).all_right >= 96


def test_the_teacher_generates_what_was_asked(judge, base):
    teacher = partial(ddim(base, TEACHER_GUIDANCE, "leading").generate, steps=TEACHER_STEPS)
    assert Evaluator(judge, SCENES[:40]).generate_and_score("", teacher).all_right >= 95


@pytest.fixture(scope="module")
def two_steps(evaluator, pipeline, base):
    """With the LoRA, and without it at the teacher's guidance."""
    ways = few_steps(pipeline, 2), partial(ddim(base, TEACHER_GUIDANCE, "leading").generate, steps=2)
    return [evaluator.generate_and_score("", generate) for generate in ways]


# The figure to reach; what this base generates in two steps is smeared, and the judge reads it all the same.
@pytest.mark.xfail(reason="the base is read right too often, at 89 %, to be 40 points worse", strict=True)
def test_without_the_lora_two_steps_are_far_worse(two_steps):
    with_lora, without = two_steps
    assert without.all_right <= with_lora.all_right - 40


@pytest.mark.numeric
def test_without_the_lora_two_steps_look_far_worse(two_steps):
    with_lora, without = two_steps
    assert without.distance > 1.5 * with_lora.distance


def test_the_card_shows_the_manifests_scores():
    card, scores = (FOLDER / "README.md").read_text(), MANIFEST["extra"]["scores"]
    assert len(scores) == 20
    for row in scores:
        assert f"| {row['system']} |" in card
        assert f"**{row['all_right']:.1f}** ± {row['interval']:.1f} | {row['distance']:.1f} |" in card


def test_the_folder_is_small_and_holds_the_judge_that_judged():
    assert sum(file["size"] for file in MANIFEST["files"]) < 40_000_000
    hashes = {file["path"]: file["sha256"] for file in MANIFEST["files"]}
    assert hashes["judge/judge.safetensors"] == MANIFEST["extra"]["judge_sha256"]
