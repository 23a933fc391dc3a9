"""A model that is loaded for a card: in 8 bits where they are asked for or memory is short, and back."""

import logging
import math

import numpy as np
import pytest
import torch
from generating import pixels_of as generate
from small import MINIATURE

from fewstep.errors import DeviceLost
from fewstep.generation import load
from fewstep.generation.load import load_pipeline, multiply_in_fp8
from fewstep.generation.pipeline import Pipeline
from fewstep.lora.merge import WeightMerger
from fewstep.models.fp8 import Fp8Linear, StoredConv2d, StoredLinear
from fewstep.models.memory import MemoryPlan
from fewstep.request import Inputs
from fewstep.settings import Settings

# Of e4m3's rounding, 1/16 of a value at most, an image shows less than half of a percent: 46 dB.
LEAST_DB = 30.0


def wish(**inputs) -> Inputs:
    size = {"aspect_ratio": "custom", "width": 64, "height": 64}
    return Inputs.create(MINIATURE, prompt="a red house at night", seed=7, steps=2, **size, **inputs)


def loaded(monkeypatch, plan=None, **settings) -> Pipeline:
    monkeypatch.setattr(load, "plan_memory", lambda *_: plan or MemoryPlan(8))
    return load_pipeline(MINIATURE, Settings(dtype="fp32", verify="size", **settings))


def layers(pipeline: Pipeline, *kinds: type) -> list[torch.nn.Module]:
    return [layer for layer in pipeline.diffusion.unet.modules() if isinstance(layer, kinds)]


def state(pipeline: Pipeline) -> dict[str, torch.Tensor]:
    own = pipeline.diffusion.unet
    tensors = {**own.state_dict(), **dict(own.named_buffers())}
    return {name: value.to(torch.float32) for name, value in tensors.items()}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def decibels(found: np.ndarray, expected: np.ndarray) -> float:
    error = np.square(found - expected).mean()
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


@pytest.fixture
def style(miniature):
    return miniature.adapters.read(Settings().styles_root / "miniature" / "ink.safetensors", "ab")


@pytest.mark.parametrize("how", ["small", "multiplying"])
def test_in_8_bits_images_are_nearly_the_same_and_styles_leave_no_trace(how, monkeypatch, miniature, style):
    small = loaded(monkeypatch, MemoryPlan(8, small=how == "small"))
    if how == "multiplying":
        multiply_in_fp8(small)
    assert len(layers(small, StoredLinear, StoredConv2d, Fp8Linear)) > 50
    before, [unstyled] = state(small), generate(small, wish())
    assert math.inf > decibels(unstyled, generate(miniature, wish())[0]) > LEAST_DB
    styled = wish(style="ink", style_scale=1.0)
    [found], [expected] = (generate(model, styled, loras=[style]) for model in (small, miniature))
    assert decibels(found, expected) > LEAST_DB and np.abs(found - unstyled).mean() > 3
    assert not same(state(small), before)
    assert np.array_equal(generate(small, wish())[0], unstyled) and same(state(small), before)


def test_8_bits_that_change_an_image_too_much_are_not_used(monkeypatch, miniature, caplog):
    monkeypatch.setattr(load, "LEAST_PSNR", math.inf)
    pipeline = loaded(monkeypatch)
    with caplog.at_level(logging.WARNING):
        multiply_in_fp8(pipeline)
    assert "do not multiply in 8 bits: an image is" in caplog.text and "which is too far" in caplog.text
    assert np.array_equal(generate(pipeline, wish())[0], generate(miniature, wish())[0])
    assert layers(pipeline, Fp8Linear) == [] and same(state(pipeline), state(miniature))


def test_8_bits_that_fail_are_not_used_unless_the_device_is_lost(monkeypatch, miniature, caplog):
    pipeline = loaded(monkeypatch)
    for error in (RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling cublasLtMatmul"), None):

        def fails(*given, error=error, **named):
            raise error or torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(torch, "_scaled_mm", fails)
        if error:
            multiply_in_fp8(pipeline)
            assert "CUBLAS_STATUS_NOT_SUPPORTED" in caplog.text and layers(pipeline, Fp8Linear) == []
            assert np.array_equal(generate(pipeline, wish())[0], generate(miniature, wish())[0])
        else:
            with pytest.raises(DeviceLost):
                multiply_in_fp8(pipeline)


def test_a_gpu_that_does_not_multiply_in_8_bits_multiplies_in_16(monkeypatch, caplog):
    pipeline = loaded(monkeypatch)
    pipeline.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    multiply_in_fp8(pipeline)
    assert "does not multiply in 8 bits" in caplog.text and layers(pipeline, Fp8Linear) == []


@pytest.mark.parametrize(("small", "asked"), [(False, 1), (True, 0)])
def test_the_setting_asks_for_it_unless_memory_has_it_already(small, asked, monkeypatch):
    calls = []
    monkeypatch.setattr(load, "multiply_in_fp8", calls.append)
    monkeypatch.setattr(Pipeline, "compile", lambda *_: None)
    monkeypatch.setattr(load, "keep_compiled", lambda cache: None)
    loaded(monkeypatch, MemoryPlan(8, small=small), engine="compiled-fp8")
    assert len(calls) == asked


def test_a_card_with_room_keeps_the_weights_as_they_were_and_a_style_leaves_no_trace(monkeypatch, style):
    plain, rich = loaded(monkeypatch), loaded(monkeypatch, MemoryPlan(8, keep_pristine=True))
    assert same(state(rich), state(plain))
    unstyled, styled = wish(), wish(style="ink", style_scale=1.0)
    expected = [generate(plain, unstyled)[0], generate(plain, styled, loras=[style])[0]]
    # Nothing more is read from the files.
    monkeypatch.setattr(WeightMerger, "read", None)
    found = [
        generate(rich, unstyled)[0],
        generate(rich, styled, loras=[style])[0],
        generate(rich, unstyled)[0],
    ]
    assert all(map(np.array_equal, found, [*expected, expected[0]]))
