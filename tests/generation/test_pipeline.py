"""The loaded miniature: what it makes depends on the request alone, and equals what diffusers' own pipeline
makes."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline
from generating import MATES, results_of, wish
from generating import pixels_of as generate
from safetensors.torch import load_file, save_file
from small import MINIATURE

from fewstep.errors import GenerationError, Stopped, WeightsError
from fewstep.generation import tensors
from fewstep.generation.load import load_pipeline
from fewstep.generation.pipeline import Pipeline
from fewstep.models.manifest import Origin, write_manifest
from fewstep.request import Inputs
from fewstep.settings import Settings


@pytest.fixture
def pipeline(miniature) -> Pipeline:
    return miniature


@pytest.fixture(scope="module")
def half() -> Pipeline:
    return load_pipeline(MINIATURE, Settings(dtype="bf16"))


def batch_of(size: int, slot: int, request: Inputs, seed: int = 100) -> list[Inputs]:
    """`request` in one slot, mates with other prompts and seeds in the others."""
    mates = [wish(MATES[i % len(MATES)], seed + i, steps=request.steps) for i in range(size)]
    mates[slot] = request
    return mates


@pytest.mark.numeric
def test_the_same_seed_generates_the_same_pixels_and_another_does_not(pipeline):
    [one], [again] = generate(pipeline, wish()), generate(pipeline, wish())
    [other] = generate(pipeline, wish(seed=8))
    assert np.array_equal(one, again)
    assert np.abs(one - other).mean() > 1


@pytest.mark.numeric
def test_when_prompts_are_encoded_changes_nothing(pipeline):
    """The batcher encodes those who join a batch later, and others may have been encoded in between."""
    inputs = [wish(prompt, seed, num_outputs=2) for seed, prompt in enumerate(MATES[:3])]
    together = results_of(pipeline, *inputs)
    encoded = []
    for each in inputs:
        encoded.append(pipeline.encode(pipeline.request(each)))
        pipeline.encode(pipeline.request(wish("a tree", lcm_scale=0.5)))  # by other weights
    results = pipeline.generate(encoded)
    assert [result.seeds for result in results] == [[0, 1], [1, 2], [2, 3]]
    for result, expected in zip(results, together, strict=True):
        assert all(map(np.array_equal, result.images, expected.images))


def test_images_are_those_of_requests_or_the_first_failure(pipeline, monkeypatch):
    expected, other = generate(pipeline, wish(MATES[0], 1, steps=2), wish(MATES[1], 2, steps=2))
    images = pipeline.images(MATES[:2], (1, 2), steps=2)
    assert all(map(np.array_equal, images, (expected, other)))
    monkeypatch.setattr(
        tensors, "decode_latents", lambda *_: [GenerationError("one"), GenerationError("two")]
    )
    with pytest.raises(GenerationError, match="one"):
        pipeline.images(MATES[:2], (1, 2), steps=2)


def test_a_reloaded_model_generates_the_same_pixels(pipeline):
    [expected] = generate(pipeline, wish())
    [found] = generate(load_pipeline(MINIATURE, Settings(dtype="fp32")), wish())
    assert np.array_equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.numeric), 8])
def test_at_one_batch_size_slot_and_mates_change_nothing(pipeline, size):
    expected = generate(pipeline, *batch_of(size, 0, wish()))[0]
    for slot in range(size):
        found = generate(pipeline, *batch_of(size, slot, wish(), seed=1000 * slot))[slot]
        assert np.array_equal(found, expected), f"slot {slot}"


@pytest.mark.parametrize("size", [2, 4, pytest.param(8, marks=pytest.mark.numeric)])
def test_alone_and_in_a_batch_differ_within_the_bound(pipeline, size):
    for seed in range(3):
        [alone] = generate(pipeline, wish(seed=seed))
        together = generate(pipeline, *batch_of(size, size - 1, wish(seed=seed)))[-1]
        difference = np.abs(alone - together)
        assert difference.max() <= 1
        assert (difference > 0).mean() <= 0.0005


def test_in_bf16_it_generates_the_same_image_nearly(pipeline, half):
    """What 16 bits cost, alone and in a batch; the judge's scores are in benchmarks/."""
    [exact], [alone] = generate(pipeline, wish()), generate(half, wish())
    batched = generate(half, *batch_of(4, 1, wish()))[1]
    assert np.array_equal(batched, generate(half, *batch_of(4, 3, wish(), seed=200))[3])
    assert np.abs(alone - batched).max() <= 4 and (np.abs(alone - batched) > 1).mean() <= 0.001
    assert np.abs(alone - exact).mean() < 1


def test_what_leaves_the_range_of_16_bits_is_decoded_once_more_in_fp32(half, monkeypatch):
    kind = type(half.diffusion.vae)
    decode, dtypes = kind.decode, []

    def overflow(self, latents):
        dtypes.append(latents.dtype)
        found = decode(self, latents)
        if latents.dtype != torch.float32:
            found.sample[1] = float("inf")
        return found

    expected = results_of(half, wish(), wish(seed=8))
    monkeypatch.setattr(kind, "decode", overflow)
    sound, rescued = results_of(half, wish(), wish(seed=8))
    assert dtypes == [torch.bfloat16, torch.float32]
    assert sound.images == expected[0].images
    difference = np.subtract(rescued.images[0], expected[1].images[0], dtype=int)
    assert 0 < np.abs(difference).max() < 16 and half.diffusion.vae.dtype == torch.bfloat16


@pytest.mark.numeric
def test_guidance_of_each_image_is_its_own(pipeline):
    mild, strong = wish(guidance=1.5), wish(guidance=3.5)
    [alone] = generate(pipeline, strong)
    _, together = generate(pipeline, mild, strong)
    assert np.abs(alone - together).max() <= 1
    [other] = generate(pipeline, mild)
    assert np.abs(alone - other).max() > 1


@pytest.mark.numeric
def test_image_i_has_seed_plus_i_and_seeds_wrap(pipeline):
    last = 2**31 - 1
    several = generate(pipeline, wish(seed=last, num_outputs=3))
    for image, seed in zip(several, (last, 0, 1), strict=True):
        [alone] = generate(pipeline, wish(seed=seed))
        assert np.abs(image - alone).max() <= 1


@pytest.mark.numeric
def test_a_request_larger_than_a_pass_is_generated_in_several(pipeline):
    small = Pipeline(MINIATURE, pipeline.diffusion, pipeline.adapters, max_batch=2)
    expected = generate(pipeline, wish(num_outputs=4))
    found = generate(small, wish(num_outputs=4))
    assert len(found) == 4
    assert max(np.abs(a - b).max() for a, b in zip(found, expected, strict=True)) <= 1


def test_large_images_share_a_pass_with_fewer(pipeline):
    assert pipeline.max_images(pipeline.request(wish())) == pipeline.max_batch
    big = wish(aspect_ratio="custom", width=256, height=256)
    assert pipeline.max_images(pipeline.request(big)) < pipeline.max_batch
    assert pipeline.max_images(pipeline.request(replace(big, width=2048, height=2048))) == 1


@pytest.mark.parametrize("aspect_ratio", ["1:1", "16:9", "2:3", "9:21"])
def test_images_have_the_size_that_the_request_says(pipeline, aspect_ratio):
    request = wish(aspect_ratio=aspect_ratio, steps=1)
    [result] = results_of(pipeline, request)
    assert result.images[0].size == (request.width, request.height)


def test_negative_prompt_counts_only_with_guidance(pipeline):
    [plain] = generate(pipeline, wish())
    [unguided] = generate(pipeline, wish(negative_prompt="mountains"))
    [guided] = generate(pipeline, wish(guidance=2.0))
    [negative] = generate(pipeline, wish(guidance=2.0, negative_prompt="mountains"))
    assert np.array_equal(plain, unguided)
    assert np.abs(guided - negative).mean() > 0.5


@pytest.mark.parametrize(("steps", "guidance"), [(1, 1.0), (4, 1.0), (4, 2.5)])
@pytest.mark.numeric
def test_it_generates_what_diffusers_own_pipeline_generates(pipeline, steps, guidance):
    """The same weights and noise through `StableDiffusionXLPipeline.__call__` with `LCMScheduler`."""
    theirs = StableDiffusionXLPipeline(**pipeline.diffusion.components, add_watermarker=False)
    theirs.register_to_config(force_zeros_for_empty_prompt=True)
    theirs.scheduler = LCMScheduler.from_config(pipeline.diffusion.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    request = wish(steps=steps, guidance=guidance)
    expected = theirs(
        request.prompt,
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=128,
        width=128,
        generator=torch.Generator().manual_seed(request.seed),
    ).images[0]
    [found] = generate(pipeline, request)
    assert np.abs(found - np.asarray(expected).astype(int)).max() <= 1


@pytest.mark.numeric
def test_it_stops_before_the_next_step_when_nobody_waits(pipeline, monkeypatch):
    calls, unet = [], pipeline.diffusion.unet
    forward = unet.forward
    monkeypatch.setattr(unet, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    [before] = generate(pipeline, wish())
    calls.clear()
    with pytest.raises(Stopped):
        results_of(pipeline, wish(steps=8), stopped=lambda: len(calls) >= 3)
    assert len(calls) == 3
    [after] = generate(pipeline, wish())
    assert np.array_equal(before, after)


def test_an_image_of_nans_fails_its_own_request_only(pipeline, monkeypatch):
    decode = pipeline.diffusion.vae.decode
    [expected] = generate(pipeline, wish(seed=2))

    def spoil_the_first(latents: torch.Tensor) -> object:
        latents = latents.clone()
        latents[0] = float("nan")
        return decode(latents)

    monkeypatch.setattr(pipeline.diffusion.vae, "decode", spoil_the_first)
    spoilt, sound = results_of(pipeline, wish(seed=1), wish(seed=2))
    assert isinstance(spoilt, GenerationError)
    assert np.abs(np.asarray(sound.images[0]).astype(int) - expected).max() <= 1


def test_metrics_say_what_it_cost(pipeline):
    new = "a red house that no other test here paints"
    one, two = results_of(pipeline, wish(new), wish(seed=1, num_outputs=2))
    assert one.metrics["batch_size"] == two.metrics["batch_size"] == 3
    assert all(one.metrics[name] > 0 for name in ("text_ms", "steps_ms", "decode_ms"))


def test_unknown_words_still_generate_the_known_ones(pipeline):
    [strange] = generate(pipeline, wish("a red house, zxqv 漢字 🦊 !!"))
    assert strange.std() > 10


def test_of_a_long_prompt_the_last_words_are_generated(pipeline):
    long = "a red house in a meadow. " + "It is a quiet place. " * 12
    night, day = wish(f"{long} At night."), wish(f"{long} By day.")
    assert pipeline.request(night).chunks > 2
    dark, bright = generate(pipeline, night, day)
    assert dark.mean() < 0.6 * bright.mean()


def test_a_word_of_more_weight_shows_more(pipeline):
    def redness(prompt):
        [picture] = generate(pipeline, wish(prompt, steps=4))
        return (picture[..., 0] - picture[..., 2]).mean()

    assert redness("a (red)1.4 (blue)0.6 house") > redness("a (red)0.6 (blue)1.4 house") + 5


def test_prompts_of_unlike_lengths_go_together_as_prompt_and_negative_prompt(pipeline):
    long = "a red house in the snow " * 9
    images = [
        generate(pipeline, wish(guidance=2, prompt=prompt, negative_prompt=negative))[0]
        for prompt, negative in [("a house", long), (long, "rain"), (long, ""), (long, long)]
    ]
    assert pipeline.request(wish("a house", guidance=2, negative_prompt=long)).chunks > 1
    assert pipeline.request(wish("a house", negative_prompt=long)).chunks == 1  # it has no effect
    assert all(picture.std() > 10 for picture in images)


def test_requests_of_unlike_shapes_are_refused_together(pipeline):
    for other in (wish(steps=2), wish("a red house " * 30), wish(clip_skip=1)):
        with pytest.raises(ValueError, match="different shape keys"):
            results_of(pipeline, wish(), other)


@pytest.mark.parametrize(
    ("key", "first"),
    [("unet.down_blocks.9.conv1.lora_A.weight", "unet"), ("unet.conv_in.lora_C.weight", "unet.conv_in")],
)
def test_an_lcm_lora_that_does_not_fit_ends_the_start_with_the_count_and_the_remedy(tmp_path, key, first):
    folder = tmp_path / "miniature"
    shutil.copytree(Settings().weights_root / "miniature", folder)
    state = load_file(folder / "lcm_lora.safetensors")
    (folder / "lcm_lora.safetensors").unlink()  # the tensors above are mapped from it
    save_file({**state, key: torch.zeros(4, 4)}, folder / "lcm_lora.safetensors")
    write_manifest(folder, model="miniature", origin=Origin("test", "", ""))
    said = f"has 1 of 170 modules that do not fit this model, first {first}"
    expected = rf"^\[weights\] weights/miniature/lcm_lora.safetensors {said}.*; run: git checkout -- weights/"
    with pytest.raises(WeightsError, match=expected):
        load_pipeline(MINIATURE, Settings(weights_root=tmp_path))
