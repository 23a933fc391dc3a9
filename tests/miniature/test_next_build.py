"""The next build at its smallest: every stage, each from what the one before has left, and a folder that
generates."""

import pytest
import torch
from diffusers import AutoencoderTiny, LCMScheduler, StableDiffusionXLPipeline

from fewstep.miniature.next_base import NextBatchSampler, NextLatentSet, NextMiniature, make_tokenizer
from fewstep.miniature.next_build import OTHER_SHAPES, BaseStage, NextBuild, NextSizes
from fewstep.miniature.next_judge import load_judge
from fewstep.miniature.next_world.restyling import STYLES
from fewstep.miniature.next_world.scenes import draw_scenes
from fewstep.models.sources import LCM_LORA, TINY_VAE

pytestmark = pytest.mark.slow

TINY = NextSizes(
    vae_images=16, vae_steps=1, reader_images=100, reader_steps=1, whole_images=24, broken_images=24,
    looks_steps=1, text_steps=1, base=(BaseStage(128, 2, 4, 24, 2), BaseStage(256, 2, 2, 4, 2)),
    sharp_steps=1, lora_steps=2, lora_batch=2, style_images=4, style_steps=1, style_batch=2, tiny_vae_steps=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("build")
    build = NextBuild(folder / "weights", folder / "styles", folder / "work", TINY, torch.device("cpu"))
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
    assert load_judge(built.weights).reader.read([image]).shape == (1, 9)


def test_a_stage_begins_with_what_the_one_before_has_left(built, tmp_path):
    base = weights_of(built.base())
    again = NextBuild(built.weights, built.styles, tmp_path, TINY, torch.device("cpu"))
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
    base = NextMiniature(make_tokenizer(tmp_path))
    sides = ((16, 16, 0.75), (10, 24, 0.25))
    sets = [NextLatentSet(torch.zeros(3, 4, a, b), draw_scenes(3, 1), share) for a, b, share in sides]
    sampler = NextBatchSampler(base, sets, 1, seed=1)
    wide = 0
    with torch.no_grad():
        for step in range(200):
            batch = sampler(step)
            height, width = (8 * side for side in batch.latents.shape[2:])
            assert batch.time_ids.tolist() == [[height, width, 0, 0, height, width]]
            wide += width > height
    assert 30 < wide < 70
    assert torch.equal(sampler(5).prompt_embeds, sampler(5).prompt_embeds)
