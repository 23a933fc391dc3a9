"""OpenVINO beside torch: the same images, faster, of what it was compiled for; all else is torch's."""

import importlib.util
import shutil
import subprocess
import sys
import tomllib

import numpy as np
import pytest
import torch
from generating import pixels_of as generate
from PIL import Image
from small import MINIATURE, drawn
from tiny import as_downloaded, make_folder

from fewstep.coglet.server import ROOT
from fewstep.errors import SettingsError, WeightsError
from fewstep.generation.engines import openvino_conversion as conversion
from fewstep.generation.load import load_pipeline
from fewstep.generation.pipeline import Pipeline
from fewstep.models.save import save_model
from fewstep.models.specs import get_model
from fewstep.request import Inputs
from fewstep.settings import Settings

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")]


PROMPT = "a red house in a meadow with mountains at sunset, in the middle"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    root = tmp_path_factory.mktemp("weights")
    shutil.copytree(Settings().weights_root / "miniature", root / "miniature")
    return root


@pytest.fixture(scope="module")
def settings(weights):
    return {"weights_root": weights, "dtype": "fp32", "engine": "openvino"}


@pytest.fixture(scope="module")
def pipeline(settings) -> Pipeline:
    return load_pipeline(MINIATURE, Settings(**settings))


def load(spec, hint="f32", **settings) -> Pipeline:
    """As `load_pipeline`, but for the process of a conversion, which takes seconds to start."""
    conversion.main([spec.name, str(settings["weights_root"]), settings["engine"], hint])
    return load_pipeline(spec, Settings(**settings))


@pytest.fixture(scope="module")
def in_8_bits(settings) -> Pipeline:
    return load(MINIATURE, **(settings | {"engine": "openvino-int8"}))


def wish(seed=7, prompt=PROMPT, **inputs) -> Inputs:
    return Inputs.create(MINIATURE, prompt=prompt, seed=seed, **inputs)


@pytest.fixture
def used(pipeline, monkeypatch):
    """The sizes of the batches that OpenVINO's UNet was given."""
    calls, unet = [], pipeline.engine.unet
    monkeypatch.setattr(pipeline.engine, "unet", lambda x, *rest: calls.append(len(x)) or unet(x, *rest))
    return calls


GUIDED = {"guidance": 2.0, "negative_prompt": "night"}


@pytest.mark.parametrize("inputs", [{}, {"steps": 1}, GUIDED, {"image": True}, {"clip_skip": 1}])
def test_it_generates_what_torch_generates(pipeline, miniature, used, inputs):
    if "image" in inputs:
        photo = drawn()
        inputs = {"image": photo, "mask": Image.new("L", photo.size, 255), "prompt_strength": 0.6}
    request = wish(**inputs)
    [found], [expected] = generate(pipeline, request), generate(miniature, request)
    assert len(used) == request.real_steps
    assert np.abs(found - expected).max() <= 1


def test_nobody_waits_for_the_images_of_others(pipeline):
    """It takes them one by one: in a batch, all would be answered when the last is done."""
    assert pipeline.max_images(pipeline.request(wish())) == 1
    assert pipeline.max_images(pipeline.request(wish(lcm_scale=0.5))) == 8


def test_an_image_is_the_same_in_any_batch(pipeline, in_8_bits):
    for model in (pipeline, in_8_bits):
        [alone] = generate(model, wish())
        batched = generate(model, wish(1), wish(), wish(2, num_outputs=2))
        assert np.array_equal(batched[1], alone)


def test_what_it_was_not_compiled_for_is_torchs_to_the_last_bit(pipeline, in_8_bits, miniature, used):
    [before] = generate(in_8_bits, wish())
    style = pipeline.adapters.read(Settings().styles_root / "miniature" / "flat.safetensors", "ab")
    for inputs, loras in (
        (wish(style="flat"), [style]),
        (wish(lcm_scale=0.5), []),
        (wish(aspect_ratio="16:9"), []),
        (wish(prompt=f"{PROMPT}. " * 5), []),
    ):
        [expected] = generate(miniature, inputs, loras=loras)
        for model in (pipeline, in_8_bits):
            assert np.array_equal(generate(model, inputs, loras=loras)[0], expected)
    assert used == []
    assert np.array_equal(generate(in_8_bits, wish())[0], before)
    generate(pipeline, wish(style="flat", style_scale=0.0), loras=[style])  # which adds nothing
    assert used == [1] * 4


def test_bf16_is_finite_and_near(settings, miniature, caplog):
    half = load(MINIATURE, "bf16", **(settings | {"dtype": "bf16"}))
    assert half.engine.serves(half.request(wish()))
    [found], [expected] = generate(half, wish()), generate(miniature, wish())
    assert np.abs(found - expected).mean() < 1
    assert "decoded again" not in caplog.text


def test_8_bits_are_in_the_linear_layers_and_the_image_is_near(in_8_bits, weights, miniature):
    folder = weights / ".openvino" / "miniature"
    sizes = {kind: (folder / kind / "unet.bin").stat().st_size for kind in ("f32", "f32-int8")}
    layers = (part for part in miniature.diffusion.unet.modules() if isinstance(part, torch.nn.Linear))
    linear = sum(layer.weight.numel() for layer in layers)
    assert sizes["f32"] - sizes["f32-int8"] == pytest.approx(3 * linear, rel=0.05)
    for seed in (7, 8):
        [found], [expected] = generate(in_8_bits, wish(seed)), generate(miniature, wish(seed))
        assert 0 < np.abs(found - expected).mean() < 1.5


def test_a_full_lcm_of_another_size_is_served_too(tmp_path):
    spec = get_model("lcm-dreamshaper-v7")
    save_model(spec, as_downloaded(spec, make_folder(spec, tmp_path / "source")), tmp_path)
    settings = {"model": spec.name, "weights_root": tmp_path, "dtype": "fp32", "safety": "off"}
    request = Inputs.create(spec, prompt="a house", seed=1, aspect_ratio="custom", width=64, height=96)
    pipeline = load(spec, **settings, engine="openvino", openvino_size=(64, 96))
    assert pipeline.engine.serves(pipeline.request(request))
    [found] = generate(pipeline, request)
    [expected] = generate(load_pipeline(spec, Settings(**settings)), request)
    assert np.abs(found - expected).max() <= 1


def test_it_is_converted_once_and_anew_when_the_weights_are_others(
    pipeline, settings, weights, monkeypatch, caplog
):
    calls, codes = [], iter((1, -9, 1))

    def failing(command, **_):
        calls.append(command)
        return subprocess.CompletedProcess(command, next(codes))

    monkeypatch.setattr(subprocess, "run", failing)
    load_pipeline(MINIATURE, Settings(**settings))
    assert calls == []
    decoder, manifest = weights / ".openvino/miniature/f32/vae.bin", weights / "miniature/manifest.json"
    log, memory = "the reason is in the log", "it was killed, as for lack of memory"
    for path, change, said, why in (
        (decoder, lambda content: content[:-1], "vae.bin has", log),
        (decoder, lambda content: bytes([content[0] ^ 1]) + content[1:], "vae.bin is damaged", memory),
        (manifest, lambda content: content + b"\n", "", log),
    ):
        content = path.read_bytes()
        path.write_bytes(change(content))
        with pytest.raises(WeightsError, match=f"miniature could not be converted for OpenVINO; {why}"):
            load_pipeline(MINIATURE, Settings(**settings))
        assert said in caplog.text
        path.write_bytes(content)
    assert len(calls) == 3


def test_without_it_for_fp16_or_a_size_that_cannot_be_the_start_says_so(settings, monkeypatch):
    with pytest.raises(SettingsError, match="takes bf16 or fp32"):
        load_pipeline(MINIATURE, Settings(**(settings | {"dtype": "fp16"})))
    with pytest.raises(SettingsError, match="is 128x136; OpenVINO takes multiples of 32 of miniature"):
        load_pipeline(MINIATURE, Settings(**settings, openvino_size=(128, 136)))
    pins = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    [pin] = pins["openvino"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=f"without openvino; run: pip install {pin}"):
        load_pipeline(MINIATURE, Settings(**settings))


def test_a_tiny_vae_stays_with_torch(settings, monkeypatch):
    pipeline, expected = (
        load_pipeline(MINIATURE, Settings(**(settings | {"engine": engine}), vae="tiny"))
        for engine in ("openvino", "torch")
    )
    [found], [one] = generate(pipeline, wish()), generate(expected, wish())
    assert np.abs(found - one).max() <= 1
    monkeypatch.setattr(pipeline.decoder, "decode", lambda latents: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(pipeline, wish())


SEVERAL_ENGINES_END = """
import gc, signal
import numpy as np
from openvino import Model, opset13
from fewstep.generation.engines.openvino import shared_core

def compiled():
    given = opset13.parameter([1], np.float32)
    return shared_core().compile_model(Model([opset13.relu(given)], [given]), "CPU")

first, second = compiled(), compiled()
del first
gc.collect()
del second
gc.collect()
signal.signal(signal.SIGTERM, lambda *_: print("ended as told"))
signal.raise_signal(signal.SIGTERM)
"""


def test_a_signal_is_handled_after_several_engines_have_ended():
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL_ENGINES_END], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (0, "ended as told\n"), done.stderr
