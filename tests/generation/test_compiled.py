"""What is compiled is compiled while nobody asks, block by block, and no request compiles anything."""

import math
import os
import shutil
import stat
from dataclasses import replace

import numpy as np
import pytest
import torch
from generating import pixels_of as generate
from small import MINIATURE
from torch._dynamo.utils import counters

from fewstep.errors import DeviceLost, SettingsError
from fewstep.generation import load, pipeline
from fewstep.generation.engines import compiled
from fewstep.generation.engines.compiled import CompiledEngine, keep_compiled, padded, why_nothing_compiles
from fewstep.generation.load import load_pipeline
from fewstep.generation.pipeline import Pipeline
from fewstep.request import Inputs
from fewstep.settings import Settings, Shape

pytestmark = pytest.mark.slow


LISTED = (Shape(64, 64), Shape(96, 64, batch=4))
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.fixture(scope="module", autouse=True)
def traces():
    """Of dynamo, none may outlive these tests."""
    yield
    torch._dynamo.reset()


def loaded(**settings) -> Pipeline:
    return load_pipeline(MINIATURE, Settings(dtype="fp32", verify="size", **settings))


def compile_none_at_start(found, shapes) -> Pipeline:
    """As `load_pipeline` does it, but for the compiler, which would take minutes, and for the time it has."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pipeline, "COMPILE_AT_START_S", 0)
        found.compile(CompiledEngine(found.diffusion.unet, found.decoder, backend="eager"), shapes)
    return found


@pytest.fixture(scope="module")
def improved():
    """All of LISTED compiled, a block at a time."""
    found, before = compile_none_at_start(loaded(), LISTED), graphs()
    made = []
    while True:
        start, more = graphs(), found.improve()
        made.append(graphs() - start)
        if not more:
            break
    assert graphs() - before >= 2 * 15 and max(made) <= 2, made  # of UNet and decoder, few at a time
    assert not found.improve() and counters["graph_break"] == {}
    return found


def wish(shape: Shape, seed=7, **inputs) -> Inputs:
    guidance = 2.0 if shape.guided else None
    size = {"aspect_ratio": "custom", "width": shape.width, "height": shape.height}
    return Inputs.create(MINIATURE, prompt="a red house", seed=seed, guidance=guidance, **size, **inputs)


@pytest.mark.parametrize(
    ("shape", "most"),
    [
        (LISTED[0], 0),
        (LISTED[1], 1),
        (replace(LISTED[1], batch=3), 1),  # padded to four
        (replace(LISTED[1], batch=2, guided=True), 1),  # four evaluations a step
        (Shape(72, 96), 0),
    ],
)
def test_no_request_compiles_anything_and_images_are_torchs(improved, miniature, shape, most):
    before = graphs()
    for steps, text in ((1, "a red house"), (4, "a blue car at night")):
        requests = [replace(wish(shape, seed, steps=steps), prompt=text) for seed in range(shape.batch)]
        images = zip(generate(improved, *requests), generate(miniature, *requests), strict=True)
        assert all(np.abs(found - expected).max() <= most for found, expected in images)
    assert graphs() == before


def test_a_style_is_generated_by_the_compiled_networks_and_leaves_no_trace(improved, miniature):
    before, [unstyled] = graphs(), generate(improved, wish(LISTED[0]))
    style = improved.adapters.read(Settings().styles_root / "miniature" / "ink.safetensors", "ab")
    styled = wish(LISTED[0], style="ink", style_scale=1.0)
    [found], [expected] = (generate(model, styled, loras=[style]) for model in (improved, miniature))
    assert np.abs(found - expected).max() <= 1 and np.abs(found - unstyled).mean() > 5
    assert np.array_equal(generate(improved, wish(LISTED[0]))[0], unstyled)
    assert graphs() == before


def test_a_block_that_cannot_be_compiled_runs_as_it_is_and_the_others_are(monkeypatch, caplog):
    found, calls = compile_none_at_start(loaded(), LISTED[:1]), []
    real, kinds = found.engine._generate, len(found.engine._regions)

    def generate_or_fail(shape):
        calls.append(shape)
        if len(calls) == 2:
            raise RuntimeError("the compiler broke")
        real(shape)

    found.engine._generate = generate_or_fail
    while found.improve():
        pass
    assert len(calls) == kinds + 2 and caplog.text.count("is not compiled, and runs as it is") == 1
    second = found.engine._regions[1]._modules
    assert not any("forward" in vars(module) for module in second)
    generate(found, wish(LISTED[0]))


def test_what_leaves_the_range_of_16_bits_is_decoded_in_fp32_by_blocks_that_are_compiled_as_well(monkeypatch):
    found = load_pipeline(MINIATURE, Settings(dtype="bf16", verify="size"))
    compile_none_at_start(found, LISTED[:1])
    while found.improve():
        pass
    [expected] = generate(found, wish(LISTED[0]))
    decode = found.engine.decode
    monkeypatch.setattr(found.engine, "decode", lambda latents: torch.full_like(decode(latents), math.inf))
    assert np.abs(generate(found, wish(LISTED[0]))[0] - expected).max() < 16


def test_only_what_was_compiled_is_recorded_anew(monkeypatch):
    made, kept = [], []
    found = loaded()
    found.engine = engine = CompiledEngine(
        found.diffusion.unet, found.decoder, lambda: lambda function, _: made.append(1) or function, "eager"
    )
    engine.prepare((Shape(64, 64), Shape(64, 96)), found.warm_up)
    assert len(made) == 4  # UNet and decoder of each
    for _ in range(2):
        while engine._left[0][1]:
            engine._left.pop(0)
        found.improve()
        kept.append(len(made))
    assert kept == [6, 8]
    record = engine._recorded_unet.record
    assert engine.release() and not engine.release() and engine._recorded_unet.record is not record


def test_a_lost_device_is_not_taken_for_a_block_that_cannot_be_compiled():
    found = compile_none_at_start(loaded(), LISTED[:1])

    def fail(shape):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    found.engine._generate = fail
    with pytest.raises(DeviceLost):
        found.improve()


def test_rows_are_padded_to_a_power_of_two_with_the_last():
    for count, wanted in ((1, 1), (2, 2), (3, 4), (5, 8), (8, 8), (9, 16)):
        rows = torch.arange(2.0 * count).view(count, 2)
        found = padded(rows)
        assert torch.equal(found[:count], rows) and len(found) == wanted
        assert (found[count:] == rows[-1]).all()
    assert padded(None) is None


def test_without_a_list_it_is_the_usual_sizes_that_fit(monkeypatch):
    prepared = []
    monkeypatch.setattr(CompiledEngine, "prepare", lambda self, shapes, generate: prepared.append(shapes))
    compile_none_at_start(loaded(max_batch=5), ())
    assert prepared == [[Shape(128, 128, batch=batch) for batch in (1, 2, 4)]]


def test_what_a_start_has_time_for_is_compiled_at_the_start(monkeypatch):
    left = iter((True, True, False))
    monkeypatch.setattr(CompiledEngine, "prepare", lambda self, shapes, generate: None)
    monkeypatch.setattr(CompiledEngine, "improve", lambda self: next(left))
    found = loaded()
    found.compile(CompiledEngine(found.diffusion.unet, found.decoder), ())
    assert list(left) == []


def test_a_batch_that_never_comes_is_refused(miniature):
    engine = CompiledEngine(miniature.diffusion.unet, miniature.decoder, backend="eager")
    with pytest.raises(SettingsError, match="batches of 9; FEWSTEP_MAX_BATCH, or the GPU's memory, allows 8"):
        miniature.compile(engine, (Shape(128, 128, batch=9),))


def test_without_a_compiler_it_says_so_and_runs_as_it_is(monkeypatch, caplog, miniature):
    assert why_nothing_compiles(CPU) == ""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert why_nothing_compiles(CPU).startswith("there is no compiler (g++ or clang++)")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert why_nothing_compiles(GPU) == "triton is not installed"
    found = compile_none_at_start(loaded(), LISTED[:1])
    assert "nothing is compiled, which is slower: there is no compiler" in caplog.text
    assert not found.improve()
    assert np.array_equal(generate(found, wish(LISTED[0])), generate(miniature, wish(LISTED[0])))


def test_what_is_compiled_is_kept_where_the_host_says_or_beside_the_weights(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/the/hosts/own")
    keep_compiled(tmp_path / "cache")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/the/hosts/own"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    tmp_path.joinpath("file").write_text("")
    keep_compiled(tmp_path / "file" / "cache")  # even root cannot make a folder there
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ and "is not kept" in caplog.text
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is put back
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    keep_compiled(tmp_path / "cache")
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "cache")
    assert stat.S_ISDIR((tmp_path / "cache").stat().st_mode)


def test_a_size_that_cannot_be_generated_is_refused_before_anything_is_loaded(monkeypatch):
    monkeypatch.setattr("fewstep.generation.load.check_folder", None)
    for settings, named in (
        ({"engine": "compiled", "compiled": (Shape(64, 64), Shape(2048, 2048))}, "FEWSTEP_COMPILED"),
        ({"engine": "openvino", "openvino_size": (32, 32)}, "FEWSTEP_OPENVINO_SIZE"),
    ):
        with pytest.raises(SettingsError, match=f"{named} has a size that cannot be painted: "):
            load_pipeline(MINIATURE, Settings(**settings))


def test_a_pipeline_that_is_loaded_with_it_is_compiled_for_what_is_listed(monkeypatch):
    made = []
    monkeypatch.setattr(load, "keep_compiled", lambda cache: made.append(cache.parts[-2:]))
    monkeypatch.setattr(Pipeline, "compile", lambda self, engine, shapes: made.append((type(engine), shapes)))
    settings = Settings(verify="size", engine="compiled", compiled=(Shape(64, 64),))
    assert load_pipeline(MINIATURE, settings).usual_size == (64, 64)
    assert made == [(compiled.FOLDER, "miniature"), (CompiledEngine, (Shape(64, 64),))]
