"""A user's pictures taught to the miniature in this process: what is rehearsed, and going on with it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fewstep.errors import SettingsError
from fewstep.miniature.pictures import write_world
from fewstep.models import get_model
from fewstep.pipeline import load_pipeline
from fewstep.request import Request
from fewstep.settings import Settings
from fewstep.training import run
from fewstep.training.finetune import Wish, fine_tune
from fewstep.training.rehearsal import prompts_of
from fewstep.training.sources import load_base, load_few_step

MINIATURE = get_model("miniature")
SETTINGS = Settings(verify="size", dtype="fp32")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, 4)
    return folder


@pytest.fixture(scope="module")
def painted() -> np.ndarray:
    """What the container paints of the first prompt that is rehearsed."""
    [prompt] = prompts_of("miniature", 2)[:1]
    pipeline = load_pipeline(MINIATURE, SETTINGS)
    return np.asarray(
        pipeline.generate([Request.create(MINIATURE, prompt=prompt, seed=0)])[0].images[0]
    ).astype(int)


@pytest.mark.parametrize("method", [pytest.param("lcf", marks=pytest.mark.numeric), "style"])
def test_every_other_step_rehearses_what_the_few_step_model_paints(
    method, world, painted, tmp_path, monkeypatch
):
    kept = []
    real = run.keeping_training

    def watched(*given):
        loss = real(*given)
        return lambda step, share: (kept.append(step), loss(step, share))[1]

    monkeypatch.setattr(run, "keeping_training", watched)
    wish = Wish(method, steps=5, batch_size=2, rank=4, rehearse=2, watch_every=0)
    fine_tune(MINIATURE, SETTINGS, wish, world, tmp_path)
    assert kept == [0, 1]
    first, second = sorted(tmp_path.glob("rehearsal/*/*.png"))
    with Image.open(first) as image:
        assert np.abs(np.asarray(image).astype(int) - painted).mean() < 1  # bf16
    assert len(list((tmp_path / "encoded").iterdir())) == 4 + 2


def test_without_rehearsal_every_step_is_for_the_new_pictures(world, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "keeping_training", None)
    wish = Wish("lcf", steps=1, batch_size=2, rank=4, rehearse=0, watch_every=0)
    fine_tune(MINIATURE, SETTINGS, wish, world, tmp_path)
    assert not (tmp_path / "rehearsal").exists()


def test_an_interrupted_run_with_rehearsal_ends_where_it_would_have(world, tmp_path, monkeypatch):
    plan = Wish("lcf", steps=4, batch_size=2, rank=4, rehearse=2, watch_every=2).plan("miniature")
    plan = replace(plan, schedule=replace(plan.schedule, checkpoint_every=2))
    monkeypatch.setattr(Wish, "plan", lambda self, model: plan)
    trained = fine_tune(MINIATURE, SETTINGS, Wish(), world, tmp_path)
    whole = load_file(trained)
    trained.unlink()
    (tmp_path / "checkpoints" / "step-000004.safetensors").unlink()
    steps = []
    backward = run.optimise.__globals__["_backward"]
    monkeypatch.setitem(
        run.optimise.__globals__,
        "_backward",
        lambda accelerator, loss, step, count: (
            steps.append(step),
            backward(accelerator, loss, step, count),
        )[1],
    )
    resumed = load_file(fine_tune(MINIATURE, SETTINGS, Wish(), world, tmp_path))
    assert steps == [2, 3]
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_lcf_begins_with_the_model_that_paints_in_few_steps():
    few, base = load_few_step(MINIATURE, SETTINGS, CPU).unet, load_base("miniature", SETTINGS, CPU).unet
    served = load_pipeline(MINIATURE, SETTINGS).diffusion.unet.state_dict()
    assert all(torch.equal(value, served[name]) for name, value in few.state_dict().items())
    name = "mid_block.attentions.0.proj_in.weight"
    assert not torch.allclose(few.state_dict()[name], base.state_dict()[name])


def test_a_full_lcm_has_no_base_for_a_style(world, tmp_path):
    spec = get_model("lcm-dreamshaper-v7")  # of which there are no weights: it is refused before it is loaded
    with pytest.raises(SettingsError, match="is a full LCM"):
        fine_tune(spec, SETTINGS, Wish("style"), world, tmp_path)
