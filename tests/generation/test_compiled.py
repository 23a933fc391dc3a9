"""What was listed is compiled before the start is over, and nothing is compiled after it."""

import numpy as np
import pytest
import torch
from generating import pixels_of as generate
from torch._dynamo.utils import counters

from fewstep.errors import SettingsError
from fewstep.generation.engines.compiled import CompiledEngine
from fewstep.generation.load import load_pipeline
from fewstep.generation.pipeline import Pipeline
from fewstep.models.specs import get_model
from fewstep.request import Inputs
from fewstep.settings import Settings, Shape

pytestmark = pytest.mark.slow

MINIATURE = get_model("miniature")
LISTED = (Shape(96, 96), Shape(96, 64, batch=2), Shape(64, 64, guided=True))


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.fixture(scope="module", autouse=True)
def traces():
    """Of dynamo and of the engine's cache, none may outlive these tests."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TORCHINDUCTOR_CACHE_DIR", "")
        yield
    torch._dynamo.reset()


def compiled(cache, shapes, **settings) -> Pipeline:
    """As `load_pipeline` does it, but for the compiler, which would take minutes."""
    found = load_pipeline(MINIATURE, Settings(dtype="fp32", verify="size", **settings))
    found.compile(CompiledEngine(found.diffusion.unet, found.decoder, cache, backend="eager"), shapes)
    return found


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    before = graphs()
    found = compiled(tmp_path_factory.mktemp("cache"), LISTED)
    assert graphs() - before >= 2 * len(LISTED)  # UNet and decoder
    return found


def wish(shape: Shape, seed=7, **inputs) -> Inputs:
    guidance = 2.0 if shape.guided else None
    size = {"aspect_ratio": "custom", "width": shape.width, "height": shape.height}
    return Inputs.create(MINIATURE, prompt="a red house", seed=seed, guidance=guidance, **size, **inputs)


@pytest.mark.parametrize(
    ("shape", "most"),
    [
        *((shape, 1) for shape in LISTED),
        *((shape, 0) for shape in (Shape(72, 96), Shape(96, 96, batch=2), Shape(96, 96, guided=True))),
    ],
)
def test_images_are_torchs_to_the_last_bit_unless_compiled_and_nothing_is_after_the_start(
    pipeline, miniature, shape, most
):
    before = graphs()
    requests = [wish(shape, seed) for seed in range(shape.batch)]
    for found, expected in zip(generate(pipeline, *requests), generate(miniature, *requests), strict=True):
        assert np.abs(found - expected).max() <= most
    assert graphs() == before


def test_a_style_is_generated_by_the_compiled_networks_and_leaves_no_trace(pipeline, miniature):
    before, [unstyled] = graphs(), generate(pipeline, wish(LISTED[0]))
    style = pipeline.adapters.read(Settings().styles_root / "miniature" / "postcard.safetensors", "ab")
    styled = wish(LISTED[0], style="postcard", style_scale=1.0)
    [found], [expected] = (generate(model, styled, loras=[style]) for model in (pipeline, miniature))
    assert np.abs(found - expected).max() <= 1 and np.abs(found - unstyled).mean() > 5
    assert np.array_equal(generate(pipeline, wish(LISTED[0]))[0], unstyled)
    assert graphs() == before


def test_without_a_list_it_is_one_native_image_also_with_a_tiny_vae(tmp_path):
    tiny = load_pipeline(MINIATURE, Settings(dtype="fp32", verify="size", vae="tiny"))
    before = graphs()
    pipeline = compiled(tmp_path, (), vae="tiny")
    made = graphs()
    assert made > before
    native = Shape(128, 128)
    [found], [expected] = generate(pipeline, wish(native)), generate(tiny, wish(native))
    assert graphs() == made and np.abs(found - expected).max() <= 1
    generate(pipeline, wish(Shape(128, 64)))
    assert graphs() == made


def test_a_batch_that_never_comes_is_refused(pipeline):
    engine = CompiledEngine(pipeline.diffusion.unet, pipeline.decoder, pipeline.engine.cache, backend="eager")
    with pytest.raises(SettingsError, match="batches of 9; FEWSTEP_MAX_BATCH allows 8"):
        pipeline.compile(engine, (Shape(128, 128, batch=9),))


def test_a_size_that_cannot_be_generated_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr("fewstep.generation.load.check_folder", None)
    for settings, named in (
        ({"engine": "compiled", "compiled": (Shape(64, 64), Shape(2048, 2048))}, "FEWSTEP_COMPILED"),
        ({"engine": "openvino", "openvino_size": (32, 32)}, "FEWSTEP_OPENVINO_SIZE"),
    ):
        with pytest.raises(SettingsError, match=f"{named} has a size that cannot be painted: "):
            load_pipeline(MINIATURE, Settings(**settings))


def test_a_pipeline_that_is_loaded_with_it_has_compiled_what_is_listed_and_warms_that_up(monkeypatch):
    made = []
    monkeypatch.setattr(CompiledEngine, "compile_for", lambda self, shapes, generate: made.append(shapes))
    settings = Settings(verify="size", engine="compiled", compiled=(Shape(64, 64),))
    pipeline = load_pipeline(MINIATURE, settings)
    assert isinstance(pipeline.engine, CompiledEngine)
    assert made == [(Shape(64, 64),)] and pipeline.usual_size == (64, 64)
