"""What is compared generates the same images, and the stopwatches add up."""

import json

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from fewstep.benchmark.full_size import SDXL_UNET, VAE
from fewstep.benchmark.roofline import flops_of, matmul_rate
from fewstep.benchmark.systems import SYSTEMS, Scenario, prompts_and_seeds
from fewstep.benchmark.worker import main
from fewstep.evaluation.metrics import psnr
from fewstep.settings import Settings

WEIGHTS = Settings().weights_root


def test_all_systems_generate_the_same_images():
    scenarios = [Scenario(128, 4), Scenario(128, 2, guidance=1.5), Scenario(128, 1, batch=2)]
    asked = [prompts_and_seeds(scenario, 7) for scenario in scenarios]
    exact = SYSTEMS["fewstep-fp32"]("miniature", WEIGHTS, 128)
    expected = [exact.generate(scenario, *one) for scenario, one in zip(scenarios, asked, strict=True)]
    [other] = exact.generate(scenarios[0], *prompts_and_seeds(scenarios[0], 1007))
    assert psnr([other], expected[0]) < 25  # another seed's, to compare
    assert [len(images) for images in expected] == [1, 1, 2]
    coarser = {name for name in SYSTEMS if name.endswith("tiny-vae")}  # see test_tiny_vae.py
    for name in set(SYSTEMS) - coarser - {"fewstep-fp32"}:
        system = SYSTEMS[name]("miniature", WEIGHTS, 128)
        for scenario, one, images in zip(scenarios, asked, expected, strict=True):
            for found, image in zip(system.generate(scenario, *one), images, strict=True):
                assert psnr([found], [image]) > (60 if system.dtype == "fp32" else 35), name


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
        UNet2DConditionModel(**SDXL_UNET).save_config(tmp_path / "unet")
        AutoencoderKL(**VAE).save_config(tmp_path / "vae")
    assert flops_of(tmp_path, scenario) / 1e12 == pytest.approx(tera, rel=0.01)


def test_the_rate_is_a_rate():
    assert 1e8 < matmul_rate(torch.float32, side=256, repeats=2) < 1e15
