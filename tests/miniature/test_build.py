"""The build at its smallest: every stage, each from what the one before has left, and a folder that
generates."""

import random
from functools import partial

import pytest
import torch
from diffusers import AutoencoderTiny, LCMScheduler, StableDiffusionXLPipeline
from transformers import CLIPTokenizer

from fewstep.cli import build_miniature
from fewstep.errors import TrainingError
from fewstep.miniature.base import (
    TOKENS,
    BatchSampler,
    LatentSet,
    Miniature,
    make_scheduler,
    make_tokenizer,
    train_text,
)
from fewstep.miniature.build import OTHER_SHAPES, BaseStage, Build, Sizes
from fewstep.miniature.judge import load_judge
from fewstep.miniature.world.restyling import STYLES
from fewstep.miniature.world.scenes import caption, draw_scenes, say
from fewstep.miniature.world.words import ATTRIBUTES
from fewstep.models.sources import LCM_LORA, TINY_VAE
from fewstep.settings import Settings

pytestmark = pytest.mark.slow

TINY = Sizes(
    vae_images=16, vae_steps=1, judge_images=100, judge_steps=1, text_steps=1,
    base=(BaseStage(128, 2, 4, 24, 2), BaseStage(256, 2, 2, 4, 2)), sharp_steps=1, lora_images=4,
    lora_steps=2, lora_batch=2, style_images=4, style_steps=1, style_batch=2, tiny_vae_steps=1,
    captions=8, base_captions=6,
)  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("build")
    build = Build(
        folder / "weights" / "miniature", folder / "styles", folder / "work", TINY, torch.device("cpu")
    )
    build.run(list(build.stages))
    return build


def weights_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_all_stages_make_a_folder_that_generates(built):
    pipeline = StableDiffusionXLPipeline.from_pretrained(built.weights, torch_dtype=torch.float32)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.load_lora_weights(built.weights, weight_name=LCM_LORA, adapter_name="lcm")
    assert {path.stem for path in built.styles.iterdir()} == set(STYLES)
    for path in built.styles.iterdir():
        pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name=path.stem)
        assert path.stat().st_size < 1_200_000
    pipeline.set_adapters(["lcm", *STYLES])
    pipeline.vae = AutoencoderTiny.from_pretrained(built.weights / TINY_VAE, torch_dtype=torch.float32)
    size = {"width": 256, "height": 128, "num_inference_steps": 1, "guidance_scale": 1.0}
    [image] = pipeline("a fox in the snow", **size).images
    assert image.size == (256, 128)
    assert load_judge(built.weights).look([image]).labels.shape == (1, 9)


def test_no_file_names_a_folder_of_the_machine_it_was_made_on(built):
    for path in built.weights.rglob("*.json"):
        assert str(built.weights.parent) not in path.read_text(), path


def test_a_stage_begins_with_what_the_one_before_has_left(built, tmp_path):
    base = weights_of(built.base())
    again = Build(built.weights, built.styles, tmp_path, TINY, torch.device("cpu"))
    assert all(torch.equal(value, base[name]) for name, value in again.base().state_dict().items())
    vae, encoder = weights_of(again.vae()), weights_of(again.vae().encoder)
    again.run(["decoder"])
    assert all(torch.equal(value, encoder[name]) for name, value in again.vae().encoder.state_dict().items())
    assert not all(torch.equal(value, vae[name]) for name, value in again.vae().state_dict().items())
    again.run(["base-2"])
    tokenizer = contents(built.work / "tokenizer")
    assert contents(built.weights / "tokenizer") == contents(built.weights / "tokenizer_2") == tokenizer
    changed = [not torch.equal(value, base[name]) for name, value in again.base().state_dict().items()]
    assert any(changed)


def test_a_large_stage_sees_small_images_too_and_every_stage_other_scenes(built):
    first, second = built.latents(0), built.latents(1)
    assert [part.latents.shape[1:] for part in first[:2]] == [(4, 16, 16), (4, 14, 18)]
    sides = {tuple(part.latents.shape[2:]) for part in second}
    assert {(32, 32), (16, 16)} <= sides and len(sides) == len(second) == 2 * (1 + len(OTHER_SHAPES))
    large = sum(part.share for part in second if part.latents[0, 0].numel() > 400)
    assert large / sum(part.share for part in second) == pytest.approx(0.8)
    assert not set(first[0].scenes) & set(second[0].scenes)


def test_a_batch_is_of_a_shape_by_its_share(tmp_path):
    base = Miniature(make_tokenizer(tmp_path))
    sides = ((16, 16, 0.75), (10, 24, 0.25))
    sets = [LatentSet(torch.zeros(3, 4, a, b), draw_scenes(3, 1), share) for a, b, share in sides]
    sampler = BatchSampler(base, sets, 1, seed=1)
    wide = 0
    with torch.no_grad():
        for step in range(200):
            batch = sampler(step)
            height, width = (8 * side for side in batch.latents.shape[2:])
            assert batch.time_ids.tolist() == [[height, width, 0, 0, height, width]]
            wide += width > height
    assert 30 < wide < 70
    assert torch.equal(sampler(5).prompt_embeds, sampler(5).prompt_embeds)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_every_word_of_the_world_is_one_token_of_a_new_tokenizer_and_of_the_committed_one(tokenizer):
    """The committed one was made when the world began, and may differ in the order of what is as common."""
    committed = CLIPTokenizer.from_pretrained(Settings().weights_root / "miniature" / "tokenizer")
    rng = random.Random(1)
    for scene in draw_scenes(500, 1, reserved=None, new=True):
        text = caption(scene, rng)
        for one in (tokenizer, committed):
            assert all(token.endswith("</w>") for token in one.tokenize(text)), text


def test_a_tokenizer_that_is_made_again_has_the_same_tokens(tokenizer, tmp_path):
    """The order of those that are as common as each other is left open by the library that finds them."""
    assert make_tokenizer(tmp_path / "again").get_vocab().keys() == tokenizer.get_vocab().keys()


@pytest.mark.parametrize("text", ["Zebra 42", "ünïcode 漢字 🦊", "{} <b> \\ \" '", "q" * 300, "\t \n x"])
def test_any_text_is_accepted(tokenizer, text):
    ids = tokenizer(text, padding="max_length", max_length=TOKENS, truncation=True).input_ids
    assert len(ids) == TOKENS
    assert ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id in ids
    assert len(tokenizer) > max(ids)


@pytest.mark.numeric
def test_the_text_encoders_learn_to_read_positions(tokenizer, tmp_path):
    torch.manual_seed(0)
    base, rng = Miniature(tokenizer), random.Random(2)
    train_text(base, 150, tmp_path / "text")
    scenes = [scene for scene in draw_scenes(500, 8) if len(scene.things) == 1][:360]
    with torch.inference_mode():
        _, pooled = base.encode_prompts([say(scene, rng, complete=True).text for scene in scenes])
    labels = torch.tensor([ATTRIBUTES["position"].index(scene.position) for scene in scenes])
    # As near to the mean of its own position as to no other, in captions that gave no mean.
    means = torch.stack([pooled[:180][labels[:180] == i].mean(0) for i in range(3)])
    assert (torch.cdist(pooled[180:], means).argmin(1) == labels[180:]).float().mean() > 0.8


def test_the_noise_schedule_ends_in_pure_noise():
    assert make_scheduler().alphas_cumprod[-1] < 1e-6


def test_stages_run_in_their_own_order_and_an_unknown_one_is_refused(tmp_path, monkeypatch, capsys):
    build = Build(tmp_path / "miniature", tmp_path, tmp_path, Sizes(), torch.device("cpu"))
    ran = []
    for name in build.stages:
        monkeypatch.setitem(build.stages, name, partial(ran.append, name))
    build.run(["lora", "judge", "base-2"])
    assert ran == ["judge", "base-2", "lora"]
    for arguments, message in (
        (["loar"], "there is no stage loar; there are vae, judge, base-1"),
        (["--weights", str(tmp_path)], "--weights must be a folder named miniature"),
    ):
        monkeypatch.setattr("sys.argv", ["build-miniature", *arguments])
        with pytest.raises(SystemExit):
            build_miniature.main()
        assert message in capsys.readouterr().err


def test_latents_of_other_sizes_are_refused(built):
    with pytest.raises(TrainingError, match=r"latents-1-128x128.safetensors is of other sizes; remove it"):
        built._encoded("1", draw_scenes(3, 1), 0, (128, 128))
