"""The committed miniature follows prompts: the judge's figures, with margin for fewer captions than the
card's."""

import json

import pytest
import torch

from fewstep.evaluation.generate import ddim, few_steps
from fewstep.generation.pipeline import load_pipeline
from fewstep.miniature.judge import load_judge, make_evaluator
from fewstep.miniature.scoring import TEACHER_GUIDANCE, TEACHER_STEPS
from fewstep.miniature.vae import reconstruct
from fewstep.miniature.world.dataset import draw_many
from fewstep.miniature.world.scenes import unseen_scenes
from fewstep.models.specs import get_model
from fewstep.settings import Settings
from fewstep.training.networks import load_base

pytestmark = pytest.mark.slow

FOLDER = Settings().weights_root / "miniature"
SCENES = unseen_scenes(120)


@pytest.fixture(scope="module")
def judge():
    return load_judge(FOLDER)


@pytest.fixture(scope="module")
def evaluator(judge):
    return make_evaluator(judge, SCENES)


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(get_model("miniature"), Settings(max_batch=32))


@pytest.fixture(scope="module")
def base():
    return load_base("miniature", Settings(verify="size"), torch.device("cpu"))


@pytest.mark.numeric
def test_the_autoencoder_keeps_every_attribute(judge, base):
    drawn = draw_many(SCENES, 123_456_789, 128, 128)
    assert judge.score(drawn, SCENES).all(1).mean() >= 0.98
    assert judge.score(reconstruct(base.vae, drawn), SCENES).all(1).mean() >= 0.95


@pytest.mark.parametrize(("steps", "least"), [(1, 96), (2, 96), (4, 96), (8, 96)])
def test_few_steps_generate_what_was_asked(evaluator, pipeline, steps, least):
    assert evaluator.generate_and_score("", few_steps(pipeline, steps)).all_right >= least


def test_the_teacher_generates_what_was_asked(judge, base):
    teacher = ddim(base, TEACHER_GUIDANCE, "leading").in_steps(TEACHER_STEPS)
    assert make_evaluator(judge, SCENES[:40]).generate_and_score("", teacher).all_right >= 95


@pytest.fixture(scope="module")
def two_steps(evaluator, pipeline, base):
    """With the LoRA, and without it at the teacher's guidance."""
    ways = few_steps(pipeline, 2), ddim(base, TEACHER_GUIDANCE, "leading").in_steps(2)
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
    card = (FOLDER / "README.md").read_text()
    manifest = json.loads((FOLDER / "manifest.json").read_text())
    assert len(manifest["extra"]["scores"]) == 20
    for row in manifest["extra"]["scores"]:
        assert f"| {row['system']} |" in card
        assert f"**{row['all_right']:.1f}** ± {row['interval']:.1f} | {row['distance']:.1f} |" in card


def test_the_folder_is_small_and_holds_the_judge_that_judged():
    manifest = json.loads((FOLDER / "manifest.json").read_text())
    assert sum(file["size"] for file in manifest["files"]) < 40_000_000
    hashes = {file["path"]: file["sha256"] for file in manifest["files"]}
    assert hashes["judge/judge.safetensors"] == manifest["extra"]["judge_sha256"]
