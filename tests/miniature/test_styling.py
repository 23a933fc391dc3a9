"""The committed styles on top of the LCM-LoRA: how much of them there is, and what is still right."""

import json

import pytest
from safetensors import safe_open

from fewstep.generation.pipeline import load_pipeline
from fewstep.miniature.judge import load_judge
from fewstep.miniature.styling import SCALES, load_style, score_style
from fewstep.miniature.world.restyling import STYLES
from fewstep.miniature.world.scenes import unseen_scenes
from fewstep.models.specs import get_model
from fewstep.settings import Settings

pytestmark = pytest.mark.slow

FOLDER = Settings().styles_root / "miniature"
CAPTIONS = 30


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(get_model("miniature"), Settings(max_batch=25))


@pytest.mark.parametrize("name", STYLES)
def test_a_style_grows_with_its_scale_and_leaves_the_rest_right(pipeline, name):
    judge = load_judge(Settings().weights_root / "miniature")
    style = load_style(pipeline, FOLDER / f"{name}.safetensors")
    scenes, scales = unseen_scenes(CAPTIONS), (0.0, 0.5, 1.0)
    scores = score_style(name, style, pipeline, judge, scenes, scales, drawings=80)
    strength = [score.style for score in scores]
    assert strength == sorted(set(strength)) and strength[-1] > strength[0] + 0.3, scores
    assert scores[-1].all_right >= scores[0].all_right - 5, scores


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
