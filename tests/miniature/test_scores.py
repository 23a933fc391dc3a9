"""The committed miniature follows prompts: the judge's figures, with margin for fewer captions than the
card's."""

import json

import pytest
import torch

from fewstep.miniature.autoencoder import decode, encode
from fewstep.miniature.judge import load_judge, score
from fewstep.miniature.pictures import draw_many
from fewstep.miniature.scoring import (
    TEACHER_GUIDANCE,
    TEACHER_STEPS,
    Examiner,
    ddim_painter,
    few_step_painter,
    held_out_captions,
    load_base,
)
from fewstep.models import get_model
from fewstep.pipeline import load_pipeline
from fewstep.settings import Settings

FOLDER = Settings().weights_root / "miniature"
CAPTIONS = 120


@pytest.fixture(scope="module")
def judge():
    return load_judge(FOLDER / "judge" / "judge.safetensors")


@pytest.fixture(scope="module")
def captions():
    return held_out_captions(CAPTIONS)


@pytest.fixture(scope="module")
def examiner(judge, captions):
    return Examiner(judge, *captions, seeds=1)


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(get_model("miniature"), Settings(max_batch=32))


@pytest.fixture(scope="module")
def base():
    return load_base(FOLDER, torch.device("cpu"))


@pytest.mark.numeric
def test_the_autoencoder_keeps_every_attribute(judge, captions, base):
    scenes, _ = captions
    drawn = draw_many(scenes, 123_456_789, 128, 128)
    assert score(judge, drawn, scenes).all(1).mean() >= 0.98
    assert score(judge, decode(base.vae, encode(base.vae, drawn)), scenes).all(1).mean() >= 0.95


@pytest.mark.parametrize(
    ("steps", "least"), [pytest.param(1, 96, marks=pytest.mark.numeric), (2, 96), (4, 96), (8, 96)]
)
def test_few_steps_paint_what_was_asked(examiner, pipeline, steps, least):
    assert examiner.mark_painter(f"{steps} steps", few_step_painter(pipeline, steps)).all_right >= least


def test_the_teacher_paints_what_was_asked(judge, captions, base):
    examiner = Examiner(judge, *(part[:40] for part in captions), seeds=1)
    painter = ddim_painter(base, TEACHER_STEPS, TEACHER_GUIDANCE)
    assert examiner.mark_painter("the teacher", painter).all_right >= 95


@pytest.fixture(scope="module")
def two_steps(examiner, pipeline, base):
    """With the LoRA, and without it at the teacher's guidance."""
    return (
        examiner.mark_painter("LCM-LoRA", few_step_painter(pipeline, 2)),
        examiner.mark_painter("base", ddim_painter(base, 2, TEACHER_GUIDANCE)),
    )


# The figure to reach; what this base paints in two steps is smeared, and the judge reads it all the same.
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
