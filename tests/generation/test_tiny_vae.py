"""FEWSTEP_VAE=tiny: the same images from a decoder of a few small convolutions."""

import numpy as np
import pytest
import torch
from generating import results_of
from small import MINIATURE, drawn
from tiny import REAL, as_downloaded, make_folder

from fewstep.errors import WeightsError
from fewstep.evaluation.generate import few_steps
from fewstep.evaluation.metrics import psnr
from fewstep.generation.load import load_pipeline
from fewstep.miniature.judge import load_judge
from fewstep.miniature.scoring import Evaluator
from fewstep.miniature.world.scenes import unseen_scenes
from fewstep.models.manifest import Origin, write_manifest
from fewstep.models.save import save_model
from fewstep.models.specs import get_model
from fewstep.request import Inputs
from fewstep.settings import Settings

WEIGHTS = Settings().weights_root


@pytest.fixture(scope="module")
def tiny():
    return load_pipeline(MINIATURE, Settings(dtype="fp32", verify="size", vae="tiny"))


@pytest.mark.slow
def test_the_judge_reads_its_images_as_well(miniature, tiny):
    judge = load_judge(WEIGHTS / "miniature")
    evaluator = Evaluator(judge, unseen_scenes(48))
    size = {"aspect_ratio": "custom", "width": 256, "height": 256}
    ways = [few_steps(pipeline, 4, **size) for pipeline in (miniature, tiny)]
    images = [way(evaluator.prompts, range(48)) for way in ways]
    # Read: that they are less sharp than those of the VAE is in the card.
    read = [evaluator.attributes(judge.look(one)).values() for one in images]
    right = [100 * np.all([*one], 0).mean() for one in read]
    assert right[1] >= right[0] - 5
    assert 25 < psnr(images[1], images[0]) < 60


@pytest.mark.numeric
def test_it_decodes_what_was_generated_from_a_image_too(miniature, tiny, monkeypatch):
    photo = drawn()
    request = Inputs.create(MINIATURE, prompt="a red castle", seed=3, image=photo, prompt_strength=0.5)
    [expected] = results_of(miniature, request)
    monkeypatch.setattr(tiny.diffusion.vae, "decode", None)  # only its encoder is used
    [found] = results_of(tiny, request)
    assert psnr(found.images, expected.images) > 20


def test_what_leaves_the_range_of_16_bits_is_decoded_again_by_the_same_decoder(monkeypatch, caplog):
    pipeline = load_pipeline(MINIATURE, Settings(dtype="bf16", verify="size", vae="tiny"))
    request = Inputs.create(MINIATURE, prompt="a red house", seed=3)
    [expected] = results_of(pipeline, request)
    monkeypatch.setattr(pipeline.engine, "decode", lambda latents: torch.full((1, 3, 128, 128), torch.inf))
    [found] = results_of(pipeline, request)
    assert "decoded again in fp32" in caplog.text
    assert np.abs(np.subtract(found.images[0], expected.images[0], dtype=int)).max() < 12


@pytest.mark.parametrize("name", REAL)
def test_every_model_brings_one(name, tmp_path):
    spec = get_model(name)
    save_model(spec, as_downloaded(spec, make_folder(spec, tmp_path / "source")), tmp_path)
    settings = Settings(model=name, weights_root=tmp_path, safety="off", vae="tiny", dtype="fp32")
    pipeline = load_pipeline(spec, settings)
    size = {"aspect_ratio": "custom", "width": 64, "height": 64}
    assert len(pipeline.images(["a house"], [1], steps=1, **size)) == 1
    assert pipeline.decoder.dtype == torch.float32 and not pipeline.decoder.training


def test_weights_that_were_saved_before_there_was_one_are_told_the_remedy(tmp_path):
    spec = get_model("sdxl")
    folder = save_model(spec, as_downloaded(spec, make_folder(spec, tmp_path / "source")), tmp_path)
    for path in (folder / "vae_tiny").iterdir():
        path.unlink()
    write_manifest(folder, model="sdxl", origin=Origin("a test", "", ""))
    settings = Settings(model="sdxl", weights_root=tmp_path, safety="off", vae="tiny")
    with pytest.raises(WeightsError, match="sdxl/vae_tiny is missing; run: scripts/download-weights sdxl"):
        load_pipeline(spec, settings)
