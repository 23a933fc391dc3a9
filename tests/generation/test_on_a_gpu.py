"""The miniature on a real GPU: scripts/test -m gpu."""

import asyncio
import shutil

import numpy as np
import pytest
import torch
from generating import pixels_of as generate
from generating import results_of
from small import MINIATURE

from fewstep.errors import FewstepError
from fewstep.evaluation.metrics import psnr
from fewstep.generation.batcher import Batcher
from fewstep.generation.load import load_pipeline
from fewstep.generation.pipeline import GenerationResult, Pipeline
from fewstep.request import Inputs
from fewstep.settings import Settings, Shape

pytestmark = pytest.mark.gpu


PROMPTS = ("a red house in the snow", "a blue sailboat on a lake at sunset", "a pink tulip")
NEAR_DB = 30.0  # of two images that are hardly told apart


def load(device: str, dtype: str, **settings) -> Pipeline:
    return load_pipeline(MINIATURE, Settings(device=device, dtype=dtype, verify="size", **settings))


@pytest.fixture(scope="module")
def card() -> Pipeline:
    return load("cuda", "fp16")


def wish(i: int = 0, **inputs) -> Inputs:
    return Inputs.create(MINIATURE, prompt=PROMPTS[i % len(PROMPTS)], seed=i, **inputs)


def likeness(one: Pipeline, other: Pipeline) -> float:
    """In dB, the median of nine images, each generated alone."""
    images = ([results_of(each, wish(i))[0].images[0] for i in range(9)] for each in (one, other))
    return psnr(*images)


def test_in_fp16_it_generates_what_a_cpu_does_in_fp32(card):
    assert card.device.type == "cuda" and card.dtype == torch.float16
    assert likeness(card, load("cpu", "fp32")) >= NEAR_DB


def test_the_same_seed_generates_the_same_pixels(card):
    for inputs in (wish(), wish(guidance=2.0, negative_prompt="night")):
        [one], [again] = generate(card, inputs), generate(card, inputs)
        assert np.array_equal(one, again)


def test_in_a_batch_of_three_slot_and_mates_change_nothing(card):
    batch = [wish(i) for i in range(3)]
    expected = generate(card, *batch)
    for shift in (1, 2):
        found = generate(card, *batch[shift:], *batch[:shift])
        for i, image in enumerate(expected):
            assert np.array_equal(found[(i - shift) % 3], image)


def test_after_a_style_every_bit_is_what_it_was(card):
    networks = [card.diffusion.components[name] for name in ("unet", "text_encoder", "text_encoder_2")]
    [unstyled] = generate(card, wish())
    before = [parameter.clone() for network in networks for parameter in network.parameters()]
    style = card.adapters.read(Settings().styles_root / "miniature" / "flat.safetensors", "flat")
    [styled] = generate(card, wish(style="flat", style_scale=1.0), loras=[style])
    assert np.abs(styled - unstyled).mean() > 5
    assert np.array_equal(generate(card, wish())[0], unstyled)
    after = [parameter for network in networks for parameter in network.parameters()]
    assert all(map(torch.equal, before, after))


def test_without_memory_it_ends_in_images_or_an_error_of_ours_and_the_next_request_is_served(card):
    [expected] = generate(card, wish())
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(card.device).total_memory

    async def ask() -> None:
        batcher = Batcher(card, deadline_s=120)
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved() / total)  # and no byte more
        try:
            requests = [card.request(wish(i, num_outputs=4)) for i in range(2)]
            outcomes = await asyncio.gather(*map(batcher.submit, requests), return_exceptions=True)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        assert all(isinstance(outcome, GenerationResult | FewstepError) for outcome in outcomes), outcomes
        found = await batcher.submit(card.request(wish()))
        assert batcher.healthy() and np.array_equal(found.images[0], expected)
        await batcher.close()

    asyncio.run(ask())


@pytest.mark.timeout(1200)  # it compiles
@pytest.mark.skipif(not shutil.which("gcc"), reason="triton compiles by gcc, which is not here")
def test_the_compiled_engine_generates_what_torchs_does(card, tmp_path):
    weights = tmp_path / "weights"  # beside the model, the engine keeps what it has compiled
    shutil.copytree(Settings().weights_root / "miniature", weights / "miniature")
    shape = (Shape(MINIATURE.native_size, MINIATURE.native_size),)
    compiled = load("cuda", "fp16", engine="compiled", compiled=shape, weights_root=weights)
    while compiled.improve():
        pass
    assert likeness(compiled, card) >= NEAR_DB
