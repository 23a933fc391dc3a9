"""What was listed is compiled before the start is over, and nothing is compiled after it."""

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from fewstep.compiled_engine import CompiledEngine
from fewstep.errors import SettingsError
from fewstep.models import get_model
from fewstep.pipeline import Painting, Pipeline, load_pipeline
from fewstep.request import Request
from fewstep.settings import Settings, Shape

MINIATURE = get_model("miniature")
LISTED = (Shape(96, 96), Shape(96, 64, batch=2), Shape(64, 64, guided=True))


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.fixture(scope="module")
def plain() -> Pipeline:
    return load_pipeline(MINIATURE, Settings(dtype="fp32", verify="size"))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    found = load_pipeline(MINIATURE, Settings(dtype="fp32", verify="size"))
    cache = tmp_path_factory.mktemp("cache")
    found.engine = CompiledEngine(found.diffusion.unet, found.decoder, cache, backend="eager")
    found.engine.compile_for(found, LISTED)
    yield found
    torch._dynamo.reset()  # what it keeps of these networks must not outlive them


def wish(shape: Shape, seed=7, **inputs) -> Request:
    guidance = 2.0 if shape.guided else None
    size = {"aspect_ratio": "custom", "width": shape.width, "height": shape.height}
    return Request.create(MINIATURE, prompt="a red house", seed=seed, guidance=guidance, **size, **inputs)


def paint(pipeline, *requests):
    found = pipeline.generate(requests)
    assert all(isinstance(one, Painting) for one in found), found
    return [np.asarray(image, dtype=int) for one in found for image in one.images]


@pytest.mark.parametrize("shape", LISTED)
def test_what_is_listed_is_compiled_and_the_same_picture(pipeline, plain, shape):
    before = graphs()
    assert before >= 2 * len(LISTED)  # UNet and decoder
    requests = [wish(shape, seed) for seed in range(shape.batch)]
    for found, expected in zip(paint(pipeline, *requests), paint(plain, *requests), strict=True):
        assert np.abs(found - expected).max() <= 1
    assert graphs() == before


@pytest.mark.parametrize("shape", [Shape(72, 96), Shape(96, 96, batch=2), Shape(96, 96, guided=True)])
def test_nothing_else_is_compiled_after_the_start_and_it_is_torchs_to_the_last_bit(pipeline, plain, shape):
    before = graphs()
    requests = [wish(shape, seed) for seed in range(shape.batch)]
    for found, expected in zip(paint(pipeline, *requests), paint(plain, *requests), strict=True):
        assert np.array_equal(found, expected)
    assert graphs() == before


def test_a_style_is_painted_by_the_compiled_networks_and_leaves_no_trace(pipeline, plain):
    before, [unstyled] = graphs(), paint(pipeline, wish(LISTED[0]))
    style = pipeline.adapters.read(Settings().styles_root / "miniature" / "postcard.safetensors", "ab")
    styled = wish(LISTED[0], style="postcard", style_scale=1.0).with_styles([style])
    [found], [expected] = paint(pipeline, styled), paint(plain, styled)
    assert np.abs(found - expected).max() <= 1 and np.abs(found - unstyled).mean() > 5
    assert np.array_equal(paint(pipeline, wish(LISTED[0]))[0], unstyled)
    assert graphs() == before


def test_a_batch_that_never_comes_is_refused(pipeline):
    engine = CompiledEngine(pipeline.diffusion.unet, pipeline.decoder, pipeline.engine.cache, backend="eager")
    with pytest.raises(SettingsError, match="batches of 9; FEWSTEP_MAX_BATCH allows 8"):
        engine.compile_for(pipeline, (Shape(128, 128, batch=9),))


def test_a_pipeline_that_is_loaded_with_it_has_compiled_for_its_native_size(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(CompiledEngine, "compile_for", lambda self, pipeline, shapes: made.append(shapes))
    settings = Settings(verify="size", engine="compiled", compiled=(Shape(64, 64),))
    assert isinstance(load_pipeline(MINIATURE, settings).engine, CompiledEngine)
    assert made == [(Shape(64, 64),)]
