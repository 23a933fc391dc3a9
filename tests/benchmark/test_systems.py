"""What is compared paints the same pictures, and the stopwatches add up."""

import json
import math

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image

from fewstep.benchmark.floor import flops_of, matmul_rate
from fewstep.benchmark.quality import psnr
from fewstep.benchmark.systems import SYSTEMS, System, Wish, prompts_and_seeds
from fewstep.benchmark.worker import main
from fewstep.fullsize import SDXL_UNET, VAE
from fewstep.settings import Settings

WEIGHTS = Settings().weights_root


WISHES = [Wish(128, 4), Wish(128, 2, guidance=1.5), Wish(128, 1, batch=2)]


def paint_all(system: System) -> list[Image.Image]:
    return [image for wish in WISHES for image in system.paint(wish, *prompts_and_seeds(wish, 7))]


@pytest.fixture(scope="module")
def expected() -> list[Image.Image]:
    exact = SYSTEMS["fewstep-fp32"]("miniature", WEIGHTS, 128)
    images = paint_all(exact)
    [other] = exact.paint(WISHES[0], *prompts_and_seeds(WISHES[0], 1007))
    assert psnr([other], images[:1]) < 25  # another seed's, to compare
    return images


@pytest.fixture(scope="module")
def in_8_bits() -> list[Image.Image]:
    """What torch paints with the weights that OpenVINO has in 8 bits: those of all linear layers of the UNet,
    each a whole number of steps of a 127th of the largest of its row."""
    system = SYSTEMS["fewstep-fp32"]("miniature", WEIGHTS, 128)
    [unet] = system.networks["unet"]
    with torch.no_grad():
        for layer in unet.modules():
            if isinstance(layer, torch.nn.Linear):
                step = layer.weight.abs().amax(1, keepdim=True) / 127
                layer.weight.copy_((layer.weight / step).round() * step)
    return paint_all(system)


# Without those of 8 and 16 bits, which OpenVINO asks of oneDNN on any CPU that can, even held to AVX2.
NUMERIC = ("fewstep", "fewstep-openvino", "diffusers", "reference")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.numeric if name in NUMERIC else ())
        for name in SYSTEMS
        # A tiny VAE is coarser by intent: tests/test_tiny_vae.py.
        if name != "fewstep-fp32" and not name.endswith("tiny-vae")
    ],
)
def test_all_systems_paint_the_same_pictures(name, expected, request):
    system = SYSTEMS[name]("miniature", WEIGHTS, 128)
    found = paint_all(system)
    assert len(found) == len(expected) == 4
    least = [60 if system.dtype == "fp32" else 35] * 4
    if system.dtype == "fp32" and "int8" in name:
        # What the weights' rounding costs; and since some CPUs round the activations to 8 bits as well, by
        # as much at most, an error of up to twice that amplitude.
        rounded = request.getfixturevalue("in_8_bits")
        least = [
            psnr([one], [image]) - 20 * math.log10(2) for one, image in zip(rounded, expected, strict=True)
        ]
    for one, image, bound in zip(found, expected, least, strict=True):
        assert psnr([one], [image]) > bound


@pytest.mark.parametrize(
    "name", ["fewstep", "fewstep-openvino", "fewstep-openvino-int8-tiny-vae", "openvino"]
)
def test_the_parts_of_a_picture_are_less_than_the_whole(name, tmp_path, capsys):
    main([name, "miniature", str(WEIGHTS), "2", "0", str(tmp_path), json.dumps({"size": 128, "steps": 2})])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2
    for row in rows:
        assert min(row["unet"], row["vae"], row["text"]) > 0  # text: no cache has seen the prompt
        assert row["unet"] + row["vae"] + row["text"] < row["seconds"]


@pytest.mark.parametrize(
    ("wish", "tera"),  # counted elsewhere, by hand and by others
    [
        (Wish(1024, 4), 4 * 6.761 + 10.470),
        (Wish(512, 1), 1.589 + 2.515),
        (Wish(512, 1, 2.0), 2 * 1.589 + 2.515),
    ],
)
def test_the_floor_counts_what_sdxl_is_known_to_take(tmp_path, wish, tera):
    with torch.device("meta"):
        UNet2DConditionModel(**SDXL_UNET).save_config(tmp_path / "unet")
        AutoencoderKL(**VAE).save_config(tmp_path / "vae")
    assert flops_of(tmp_path, wish) / 1e12 == pytest.approx(tera, rel=0.01)


def test_the_rate_is_a_rate():
    assert 1e8 < matmul_rate(torch.float32, side=256, repeats=2) < 1e15
