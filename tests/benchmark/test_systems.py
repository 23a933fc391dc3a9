"""What is compared paints the same pictures, and the stopwatches add up."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from fewstep.benchmark.floor import flops_of, matmul_rate
from fewstep.benchmark.systems import SYSTEMS, Wish, prompts_and_seeds
from fewstep.benchmark.worker import main
from fewstep.fullsize import SDXL_UNET, VAE
from fewstep.settings import Settings

WEIGHTS = Settings().weights_root


@pytest.mark.parametrize("wish", [Wish(128, 4), Wish(128, 2, guidance=1.5), Wish(128, 1, batch=2)])
def test_all_systems_paint_the_same_pictures(wish):
    exact = SYSTEMS["fewstep-fp32"]("miniature", WEIGHTS, 128)
    asked, other = prompts_and_seeds(wish, 7), prompts_and_seeds(wish, 1007)
    expected, others = exact.paint(wish, *asked), exact.paint(wish, *other)
    assert len(expected) == wish.batch
    for name in set(SYSTEMS) - {"fewstep-fp32"}:
        system = SYSTEMS[name]("miniature", WEIGHTS, 128)
        for found, image, other in zip(system.paint(wish, *asked), expected, others, strict=True):
            far = np.abs(np.subtract(found, image, dtype=int)).mean()
            of_another_seed = np.abs(np.subtract(other, image, dtype=int)).mean()
            assert far < (0.02 if system.dtype == "fp32" else of_another_seed / 4), name


@pytest.mark.parametrize("name", ["fewstep", "fewstep-openvino", "openvino"])
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
