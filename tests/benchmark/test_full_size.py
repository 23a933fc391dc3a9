"""The real models' shapes, counted without their memory, and the way from them to an image at toy size."""

import csv

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from fewstep.benchmark import full_size
from fewstep.benchmark.measure import measure
from fewstep.evaluation.tables import append_csv, commit
from fewstep.generation.load import load_pipeline
from fewstep.lora.merge import layers_by_name
from fewstep.models.manifest import read_manifest
from fewstep.models.specs import get_model
from fewstep.settings import Settings


def count(module: torch.nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


@pytest.mark.parametrize(
    "name, parameters, modules, lora_parameters",
    [
        ("sdxl", 2_567_463_684, 788, 196_751_360),
        ("ssd-1b", 1_331_334_404, 423, 104_902_656),
        ("sd15", 859_520_964, 278, 67_252_224),
    ],
)
def test_the_shapes_are_the_published_ones(monkeypatch, name, parameters, modules, lora_parameters):
    monkeypatch.setattr(full_size, "_random", lambda key, shape, generator: torch.empty(shape, device="meta"))
    with torch.device("meta"):
        unet = UNet2DConditionModel(**full_size.UNETS[name])
    tensors = full_size._random_lora(unet, torch.Generator())

    assert count(unet) == parameters
    assert len(tensors) == 3 * modules
    assert sum(value.numel() for key, value in tensors.items() if "alpha" not in key) == lora_parameters
    stems = {key.split(".")[0].replace("lora_unet_", "unet.") for key in tensors}
    assert stems <= layers_by_name("unet", unet).keys()


def test_the_other_networks_have_their_published_sizes():
    with torch.device("meta"):
        vae = AutoencoderKL(**full_size.VAE)
        encoder = CLIPTextModelWithProjection(CLIPTextConfig(projection_dim=1280, **full_size.BIG_G))
    assert (count(vae), count(encoder)) == (83_653_863, 694_659_840)


def test_a_random_style_fits_what_was_made_and_changes_as_much_as_the_lcm_lora(toy, tmp_path):
    full_size.make_random("sdxl", toy)
    pipeline = load_pipeline(get_model("sdxl-random"), Settings(weights_root=toy, verify="size"))
    full_size.make_random_style("sdxl", tmp_path / "style.safetensors")
    style, lcm = pipeline.adapters.read(tmp_path / "style.safetensors", "any"), pipeline.adapters.lcm_lora
    assert style.modules.keys() == lcm.modules.keys() and style.size == lcm.size
    [layer, *_] = style.modules
    assert not style.modules[layer].down.equal(lcm.modules[layer].down)


@pytest.mark.parametrize("name", ["sdxl", "sd15"])
def test_what_is_made_loads_and_generates(toy, name):
    folder = full_size.make_random(name, toy)

    assert {path.name for path in toy.iterdir()} == {".lock", f"{name}-random"}
    assert folder == toy / f"{name}-random"
    assert {file.source for file in read_manifest(folder, fix="").files} == {"fewstep"}
    spec = get_model(f"{name}-random")
    pipeline = load_pipeline(spec, Settings(weights_root=toy))
    [image] = pipeline.images(["noise"], [1], aspect_ratio="custom", width=64, height=64)
    assert image.size == (64, 64)


def test_a_measurement_is_a_row_with_its_machine(tmp_path):
    row = measure("miniature", width=64, height=64, steps=1)

    path = tmp_path / "benchmarks" / "full-size.csv"
    append_csv(path, row)
    append_csv(path, row)

    first, second = csv.DictReader(path.read_text().splitlines())
    assert first == second and first["commit"] == commit()
    assert (first["model"], first["width"], first["torch"]) == ("miniature", "64", torch.__version__)
    assert 0.2 < float(first["setup_peak_gb"]) < 8 and 0.2 < float(first["painting_peak_gb"]) < 8
    assert 0 < float(first["steps_s"]) <= float(first["painting_s"])
    assert float(first["setup_s"]) > 0 and first["cpu"] and int(first["cores"]) > 0
