"""What is compared generates the same images, and the stopwatches add up."""

import json
import math

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image

from fewstep.benchmark.full_size import UNETS, VAE
from fewstep.benchmark.roofline import flops_of, matmul_rate
from fewstep.benchmark.systems import (
    ON_CUDA,
    SYSTEMS,
    Scenario,
    System,
    compile_all,
    load_own,
    prompts_and_seeds,
)
from fewstep.benchmark.worker import main
from fewstep.evaluation.metrics import psnr
from fewstep.generation.load import load_pipeline
from fewstep.models.specs import get_model
from fewstep.settings import Settings, Shape

pytestmark = pytest.mark.slow

WEIGHTS = Settings().weights_root
SCENARIOS = [Scenario(128, 4), Scenario(128, 2, guidance=1.5), Scenario(128, 1, batch=2)]


def generate_all(system: System) -> list[Image.Image]:
    images = [system.generate(scenario, *prompts_and_seeds(scenario, 7)) for scenario in SCENARIOS]
    return [image for batch in images for image in batch]


@pytest.fixture(scope="module")
def expected() -> list[Image.Image]:
    exact = SYSTEMS["fewstep-fp32"]("miniature", WEIGHTS, 128)
    images = generate_all(exact)
    [other] = exact.generate(SCENARIOS[0], *prompts_and_seeds(SCENARIOS[0], 1007))
    assert psnr([other], images[:1]) < 25  # another seed's, to compare
    return images


@pytest.fixture(scope="module")
def in_8_bits() -> list[Image.Image]:
    """What torch makes with the weights that OpenVINO has in 8 bits: those of all linear layers of the UNet,
    each a whole number of steps of a 127th of the largest of its row."""
    pipeline = load_pipeline(get_model("miniature"), Settings(dtype="fp32", verify="size"))
    with torch.no_grad():
        for layer in pipeline.diffusion.unet.modules():
            if isinstance(layer, torch.nn.Linear):
                step = layer.weight.abs().amax(1, keepdim=True) / 127
                layer.weight.copy_((layer.weight / step).round() * step)
    images = [pipeline.images(*prompts_and_seeds(one, 7), **one.inputs) for one in SCENARIOS]
    return [image for batch in images for image in batch]


# Without those of 8 and 16 bits, which OpenVINO asks of oneDNN on any CPU that can, even held to AVX2.
NUMERIC = ("fewstep", "fewstep-openvino", "diffusers", "reference")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.numeric if name in NUMERIC else ())
        for name in SYSTEMS
        # A tiny VAE is coarser by intent: test_tiny_vae.py. On a CPU, compiling and fp16 take minutes.
        if name not in ("fewstep-fp32", *ON_CUDA) and not name.endswith("tiny-vae")
    ],
)
def test_all_systems_generate_the_same_images(name, expected, request):
    system = SYSTEMS[name]("miniature", WEIGHTS, 128)
    images = generate_all(system)
    assert len(images) == len(expected) == 4
    least = [60 if system.dtype == "fp32" else 35] * 4
    if system.dtype == "fp32" and "int8" in name:
        # What the weights' rounding costs; and since some CPUs round the activations to 8 bits as well, by
        # as much at most, an error of up to twice that amplitude.
        rounded = zip(request.getfixturevalue("in_8_bits"), expected, strict=True)
        least = [psnr([one], [image]) - 20 * math.log10(2) for one, image in rounded]
    for one, image, bound in zip(images, expected, least, strict=True):
        assert psnr([one], [image]) > bound


@pytest.mark.parametrize(
    "name", ["fewstep", "fewstep-openvino", "fewstep-openvino-int8-tiny-vae", "openvino"]
)
def test_the_parts_of_an_image_are_less_than_the_whole(name, tmp_path, capsys):
    main([name, "miniature", str(WEIGHTS), "2", "0", str(tmp_path), json.dumps({"size": 128, "steps": 2})])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert min(row["unet"], row["vae"], row["text"]) > 0  # text: no cache has seen the prompt
        assert row["unet"] + row["vae"] + row["text"] < row["seconds"]


@pytest.mark.parametrize(
    ("scenario", "tera"),  # counted elsewhere, by hand and by others
    [
        (Scenario(1024, 4), 4 * 6.761 + 10.470),
        (Scenario(512, 1), 1.589 + 2.515),
        (Scenario(512, 1, 2.0), 2 * 1.589 + 2.515),
    ],
)
def test_the_roofline_counts_what_sdxl_is_known_to_take(tmp_path, scenario, tera):
    with torch.device("meta"):
        UNet2DConditionModel(**UNETS["sdxl"]).save_config(tmp_path / "unet")
        AutoencoderKL(**VAE).save_config(tmp_path / "vae")
    assert flops_of(tmp_path, scenario) / 1e12 == pytest.approx(tera, rel=0.01)


def test_the_rate_is_a_rate():
    assert 1e8 < matmul_rate(torch.float32, side=256, repeats=2) < 1e15


def test_all_is_compiled_unless_the_time_is_over():
    class Compiling:
        parts = 3

        def improve(self):
            self.parts -= 1
            return self.parts > 0

    pipeline = Compiling()
    assert not compile_all(pipeline, until=0) and pipeline.parts == 3
    assert compile_all(pipeline) and pipeline.parts == 0


def test_an_engine_is_made_for_the_size_that_is_measured(monkeypatch):
    made = []
    monkeypatch.setattr(
        "fewstep.benchmark.systems.load_pipeline", lambda spec, settings: made.append(settings)
    )
    for size in (64, 256):
        load_own("miniature", WEIGHTS, size, engine="compiled")
    assert [settings.compiled for settings in made] == [(Shape(64, 64),), ()]
    assert {settings.engine for settings in made} == {"compiled"}
