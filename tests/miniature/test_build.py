"""The whole build at its smallest: all stages, resumed, and the folder that comes out generates."""

import random
from dataclasses import asdict

import pytest
import torch
from transformers import CLIPTokenizer

from fewstep.generation.load import load_pipeline
from fewstep.miniature.base import TOKENS, Miniature, make_scheduler, make_tokenizer, train_text
from fewstep.miniature.build import SQUARE, Build, Sizes
from fewstep.miniature.scoring import write_card
from fewstep.miniature.world.restyling import STYLES
from fewstep.miniature.world.scenes import ATTRIBUTES, all_scenes, caption
from fewstep.models.specs import get_model
from fewstep.settings import Settings
from fewstep.training.distill import LoraStudent

pytestmark = pytest.mark.slow

TINY = Sizes(
    judge_images=40, judge_steps=1, vae_images=40, vae_steps=1, text_steps=1, base_images=24, other_images=4,
    base_steps=2, base_batch=4, lora_steps=2, lora_batch=4, style_images=6, style_steps=2, style_batch=4,
    tiny_vae_steps=2,
)  # fmt: skip
STUDENT = LoraStudent(rank=32, guidance=(1.5, 3.0))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> CLIPTokenizer:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_all_stages_make_a_folder_that_generates(tmp_path):
    weights, cpu = tmp_path / "weights" / "miniature", torch.device("cpu")
    build = Build(weights, tmp_path / "work", TINY, cpu)
    assert build.judge and build.latents[0].latents.shape[1:] == (4, SQUARE[1] // 8, SQUARE[0] // 8)
    build.train_lora(STUDENT)
    write_card(weights, asdict(TINY), STUDENT, [])

    spec = get_model("miniature")
    pipeline = load_pipeline(spec, Settings(weights_root=weights.parent))
    assert len(pipeline.images(["a red house"], [1])) == 1

    build.train_styles(tmp_path / "styles")
    paths = list((tmp_path / "styles").iterdir())
    assert {path.stem for path in paths} == set(STYLES) and len(paths) == len(STYLES)
    for path in paths:
        style = pipeline.adapters.read(path, path.stem)
        assert style.modules and path.stat().st_size < 1_000_000
        assert len(pipeline.images(["a red house"], [1], loras=[style], style=path.stem)) == 1

    build.train_tiny_vae()
    write_card(weights, asdict(TINY), STUDENT, [])
    tiny = load_pipeline(spec, Settings(weights_root=weights.parent, vae="tiny"))
    assert len(tiny.images(["a red house"], [1])) == 1

    # From the LoRA on, with everything before it taken from the folder.
    again = Build(weights, tmp_path / "other-work", TINY, cpu, start="lora")
    for name, value in build.base.unet.state_dict().items():
        assert torch.equal(value, again.base.unet.state_dict()[name]), name
    assert not (tmp_path / "other-work" / "base.safetensors").exists()


def test_every_word_of_the_world_is_one_token(tokenizer):
    rng = random.Random(1)
    for scene in rng.sample(all_scenes(), 500):
        text = caption(scene, rng, complete=True)
        assert all(token.endswith("</w>") for token in tokenizer.tokenize(text)), text


@pytest.mark.numeric
def test_the_text_encoders_learn_to_read_positions(tokenizer, tmp_path):
    torch.manual_seed(0)
    base, rng = Miniature(tokenizer), random.Random(2)
    train_text(base, 60, tmp_path / "text.safetensors")

    scenes = rng.sample(all_scenes(), 360)
    with torch.inference_mode():
        _, pooled = base.encode_prompts([caption(scene, rng, complete=True) for scene in scenes])
    labels = torch.tensor([ATTRIBUTES["position"].index(scene.position) for scene in scenes])
    # As near to the mean of its own position as to no other, in captions that gave no mean.
    means = torch.stack([pooled[:180][labels[:180] == i].mean(0) for i in range(3)])
    assert (torch.cdist(pooled[180:], means).argmin(1) == labels[180:]).float().mean() > 0.9


def test_the_noise_schedule_ends_in_pure_noise():
    assert make_scheduler().alphas_cumprod[-1] < 1e-6


@pytest.mark.parametrize("text", ["Zebra 42", "ünïcode 漢字 🦊", "{} <b> \\ \" '", "q" * 300, "\t \n x"])
def test_any_text_is_accepted(tokenizer, text):
    ids = tokenizer(text, padding="max_length", max_length=TOKENS, truncation=True).input_ids
    assert len(ids) == TOKENS
    assert ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id in ids
    assert len(tokenizer) > max(ids)


def test_the_tokenizer_is_made_the_same_every_time(tokenizer, tmp_path):
    again = make_tokenizer(tmp_path / "again")
    assert again.get_vocab() == tokenizer.get_vocab()
