"""Whole trainings of seconds: what they leave, what is rehearsed, and that they can be taken up again."""

import importlib
import json
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import make_diffusers_folder

from fewstep.errors import DatasetError, SettingsError
from fewstep.generation.load import load_pipeline
from fewstep.generation.pipeline import Pipeline
from fewstep.generation.reference import native_size
from fewstep.lora.types import Mix
from fewstep.miniature.world.dataset import training_captions, write_world
from fewstep.models.specs import get_model
from fewstep.settings import Settings
from fewstep.training import prior_preservation, trainer
from fewstep.training.config import PRESETS, STUDENTS, TrainingOptions, preset
from fewstep.training.data import find
from fewstep.training.networks import load_base, load_few_step
from fewstep.training.run import generate_samples, train_model

SPEC = get_model("miniature")
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[2]
SETTINGS = Settings(verify="size", dtype="fp32")
PROMPT, SEED = "a red house in a meadow with mountains at sunset", 5
FILES = ("pytorch_lora_weights.safetensors", "kohya.safetensors")
HOW = ("--batch-size", 4, "--rank", 8, "--learning-rate", 0.005)


def command(name: str, *arguments: object, status: int = 0) -> None:
    """Run it to that exit status, in this process, which has imported torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_VERIFY", "size")
        assert importlib.import_module(f"fewstep.cli.{name}").main([*map(str, arguments)]) == status


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, 6)
    return folder


@pytest.fixture(scope="module")
def distilled(world, tmp_path_factory) -> Path:
    """Three bold steps towards an LCM-LoRA of the miniature."""
    folder = tmp_path_factory.mktemp("distilled")
    command("distill", "--data", world, "--out", folder, *HOW, "--steps", 3)
    return folder


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return load_pipeline(SPEC, SETTINGS)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def differ(one: Image.Image, other: Image.Image) -> bool:
    return np.abs(pixels(one) - pixels(other)).mean() > 1


def test_a_run_leaves_what_a_user_needs(distilled):
    names = {path.relative_to(distilled).as_posix() for path in distilled.rglob("*") if path.is_file()}
    expected = {"README.md", *FILES, f"best/{FILES[0]}", "checkpoints/step-000003.safetensors"}
    assert expected | {"samples/step-000003.webp"} <= names
    assert any(name.startswith("fewstep/events") for name in names), "TensorBoard's"
    assert len(list((distilled / "encoded").iterdir())) == 6
    with Image.open(distilled / "samples" / "step-000003.webp") as row:
        assert row.size == (4 * 256, 256)
    card = (distilled / "README.md").read_text()
    assert "samples/step-000003.webp" in card and "| rank | 8 |" in card and "base_model: miniature" in card
    made = {"method": "lora", "model": "miniature", "step": 3, "rank": 8, "steps": 3, "batch": 4}
    for name in FILES:
        with safe_open(distilled / name, framework="pt") as file:
            metadata = json.loads(file.metadata()["fewstep"])
        assert metadata | made | {"guidance": [1.5, 2.5]} == metadata


def test_plain_diffusers_and_the_server_generate_with_it_alike(distilled, pipeline, monkeypatch):
    [before] = pipeline.images([PROMPT], [SEED])
    styles = [pipeline.adapters.read(distilled / name, name[0] * 64) for name in FILES]
    [styled] = pipeline.images([PROMPT], [SEED], loras=[styles[0]], style="x")
    assert differ(styled, before)
    monkeypatch.setattr(pipeline.adapters, "lcm_lora", None)
    [without] = pipeline.images([PROMPT], [SEED])
    plain = StableDiffusionXLPipeline.from_pretrained(
        SETTINGS.weights_root / "miniature", dtype=torch.float32, add_watermarker=False
    )
    plain.scheduler = LCMScheduler.from_config(plain.scheduler.config)
    images = []
    for name, style in zip(FILES, styles, strict=True):
        monkeypatch.setattr(pipeline.adapters, "lcm_lora", style)
        [ours] = pipeline.images([PROMPT], [SEED])
        plain.load_lora_weights(distilled, weight_name=name)
        seeded = torch.Generator().manual_seed(SEED)
        [theirs] = plain(PROMPT, num_inference_steps=4, guidance_scale=1.0, generator=seeded).images
        plain.unload_lora_weights()
        assert np.abs(pixels(ours) - pixels(theirs)).max() <= 1
        assert differ(ours, before), "it is not the LCM-LoRA that was there"
        assert differ(ours, without), "it says something of its own"
        images.append(pixels(ours))
    assert np.array_equal(*images), "both files say the same"


def test_the_same_command_goes_on_where_it_stopped_and_another_does_not(
    distilled, world, tmp_path, caplog, capsys
):
    arguments = ("--out", distilled, *HOW)
    written = load_file(distilled / FILES[0])
    with caplog.at_level("INFO"):
        command("distill", *arguments, "--data", world, "--steps", 3)
    assert "resuming at step 3" in caplog.text
    rewritten = load_file(distilled / FILES[0])
    assert all(torch.equal(value, rewritten[name]) for name, value in written.items())
    write_world(tmp_path, 5)
    for data, steps, what in ((world, 4, "steps 3 instead of 4"), (tmp_path, 3, "pictures ")):
        command("distill", *arguments, "--data", data, "--steps", steps, status=1)
        assert f"[training] the checkpoints are of a run with {what}" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_make_the_step_of_one_from_the_same_fresh_lora(world, tmp_path):
    """The gradients of the miniature's UNet differ by what bf16 rounds; further steps of AdamW would magnify
    that where a gradient is nearly nothing."""
    arguments = ("--data", world, *HOW, "--steps", 1, "--watch-every", 0, "--out")
    command("distill", *arguments, tmp_path / "1")
    launch = [sys.executable, "-P", "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    run = [*launch, "-m", "fewstep.cli.distill", *map(str, arguments), tmp_path / "2"]
    environ = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "FEWSTEP_VERIFY": "size"}
    environ |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(run, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and "on 2 processes" in done.stderr, done.stderr[-2000:]
    moments = []
    for folder in "12":
        found = load_file(tmp_path / folder / "checkpoints" / "step-000001.safetensors")
        names = sorted(name for name in found if name.endswith(".exp_avg"))
        moments.append(torch.cat([found[name].flatten() for name in names]))
    one, two = moments
    assert (one - two).norm() < 0.05 * one.norm()  # measured: 0.002 to 0.011


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sdxl", "sd15"])
def test_a_full_lcm_of_any_diffusers_folder_generates_in_diffusers(family, world, tmp_path):
    teacher = make_diffusers_folder(get_model(family), tmp_path / "teacher")
    out = tmp_path / "out"
    arguments = ("--data", world, "--out", out, "--steps", 2, "--batch-size", 2, "--student", "full")
    command("distill", *arguments, "--model", teacher)
    for unet in (out / "unet", out / "best" / "unet"):
        lcm = UNet2DConditionModel.from_pretrained(unet)
        assert lcm.config.time_cond_proj_dim == 256
    assert 'subfolder="unet"' in (out / "README.md").read_text()
    diffusion = load_base(str(teacher), SETTINGS, CPU)
    with torch.no_grad():  # two steps at 1e-6 say nothing yet
        lcm.time_embedding.cond_proj.weight.normal_(generator=torch.Generator().manual_seed(0))
    row, other = (generate_samples(diffusion, lcm, [PROMPT, "a tree"], True, w) for w in (9.0, 3.0))
    side = native_size(diffusion)
    assert row.size == (2 * side, side)
    assert np.abs(pixels(row) - pixels(other)).max() > 0, "it is told w"


NO_FOLDER = "[settings] the folder of the model is no diffusers folder"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("train PICTURES --resolution 100", "[dataset] the resolution is 100; it must be a multipl"),
        ("train NOTHING", "[dataset] there is no picture"),
        ("train TEXT", "[dataset] the archive cannot be read"),
        ("train BARE", "[dataset] 1 of 1 pictures have no caption"),
        ("distill --data NOTHING", "[dataset] there is no picture"),
        ("distill --data PICTURES --model NOTHING", NO_FOLDER),
    ],
)
def test_what_cannot_be_trained_on_is_told_in_one_sentence(world, tmp_path, capsys, arguments, told):
    places = {name: tmp_path / name for name in ("NOTHING", "BARE", "TEXT")} | {"PICTURES": world}
    for name in ("NOTHING", "BARE"):
        places[name].mkdir()
    Image.new("RGB", (64, 64)).save(places["BARE"] / "a.png")
    places["TEXT"].write_text("no zip")
    name, *rest = arguments.split()
    command(name, *(places.get(one, one) for one in rest), "--out", tmp_path / "out", "--steps", 1, status=1)
    assert capsys.readouterr().err.splitlines()[-1].startswith(told)


@pytest.mark.parametrize("side", [100, 32, 4096])
def test_a_resolution_that_cannot_be_trained_at_is_refused(side):
    with pytest.raises(DatasetError, match=f"resolution is {side}; it must be a multiple of 8 from 64 to"):
        TrainingOptions(resolution=side).plan("miniature")


def test_every_preset_is_whole():
    presets = tomllib.loads(PRESETS.read_text())
    assert set(presets["real"]) == set(presets["miniature"]) == set(STUDENTS)
    for method in STUDENTS:
        assert preset("miniature", method).method == preset("sdxl", method).method == method
        assert preset("sdxl", method).metadata()["method"] == method


def fine_tune(options: TrainingOptions, images: Path, folder: Path, model: str = "miniature") -> Path:
    more = {"prior_prompts": training_captions}
    return train_model(model, SETTINGS, options, lambda: find(images), folder, **more)


@pytest.mark.parametrize("method", [pytest.param("lcf", marks=pytest.mark.numeric), "style"])
def test_every_other_step_rehearses_what_the_few_step_model_generates(
    method, world, pipeline, tmp_path, monkeypatch
):
    kept = []
    real = prior_preservation.prior_loss

    def watched(*arguments):
        loss = real(*arguments)
        return lambda step, share: (kept.append(step), loss(step, share))[1]

    monkeypatch.setattr(prior_preservation, "prior_loss", watched)
    arguments = (world, "--out", tmp_path, "--method", method, "--steps", 5, "--batch-size", 2, "--rank", 4)
    command("train", *arguments, "--rehearse", 2, "--watch-every", 0)
    assert kept == [0, 1]
    first, second = sorted(tmp_path.glob("rehearsal/*/*.png"))
    [generated] = pipeline.images(training_captions(2)[:1], [0])
    with Image.open(first) as image:
        assert np.abs(pixels(image) - pixels(generated)).mean() < 1  # bf16
    assert len(list((tmp_path / "encoded").iterdir())) == 6 + 2
    with safe_open(tmp_path / FILES[0], framework="pt") as file:
        assert json.loads(file.metadata()["fewstep"])["method"] == method
    assert pipeline.adapters.read(tmp_path / FILES[0], "0" * 64).modules


def test_without_rehearsal_every_step_is_for_the_new_images(world, tmp_path, monkeypatch):
    monkeypatch.setattr(prior_preservation, "prior_loss", None)
    options = TrainingOptions("lcf", steps=1, batch_size=2, rank=4, rehearse=0, watch_every=0)
    fine_tune(options, world, tmp_path)
    assert not (tmp_path / "rehearsal").exists()


@pytest.mark.slow
def test_an_interrupted_run_with_rehearsal_ends_where_it_would_have(world, tmp_path, monkeypatch):
    plan = TrainingOptions("lcf", steps=4, batch_size=2, rank=4, rehearse=2, watch_every=2).plan("miniature")
    plan = replace(plan, schedule=replace(plan.schedule, checkpoint_every=2))
    monkeypatch.setattr(TrainingOptions, "plan", lambda self, model: plan)
    trained = fine_tune(TrainingOptions(), world, tmp_path)
    whole = load_file(trained)
    trained.unlink()
    (tmp_path / "checkpoints" / "step-000004.safetensors").unlink()
    steps = []
    step = trainer._step
    monkeypatch.setattr(trainer, "_step", lambda *a: (steps.append(a[-1]), step(*a))[1])
    resumed = load_file(fine_tune(TrainingOptions(), world, tmp_path))
    assert steps == [2, 3]
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_lcf_begins_with_the_model_that_generates_in_few_steps(pipeline):
    few, base = load_few_step("miniature", SETTINGS, CPU).unet, load_base("miniature", SETTINGS, CPU).unet
    pipeline.adapters.apply(Mix())
    served = pipeline.diffusion.unet.state_dict()
    assert all(torch.equal(value, served[name]) for name, value in few.state_dict().items())
    name = "mid_block.attentions.0.proj_in.weight"
    assert not torch.allclose(few.state_dict()[name], base.state_dict()[name])


def test_a_full_lcm_has_no_base_for_a_style(world, tmp_path):
    model = "lcm-dreamshaper-v7"  # of which there are no weights: it is refused before it is loaded
    with pytest.raises(SettingsError, match="is a full LCM"):
        fine_tune(TrainingOptions("style"), world, tmp_path, model)
