"""From the hub to an image: download, save, load and generate, for every model of the table at toy size."""

import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache

import pytest
import torch
from diffusers import AutoencoderKL
from hub import running_hub
from ldm import save_checkpoint
from safetensors.torch import load_file, save_file
from tiny import REAL, as_downloaded, make_folder, put_on

from fewstep.cli import download_weights, save_weights
from fewstep.errors import WeightsError
from fewstep.generation.load import load_pipeline
from fewstep.models.manifest import read_manifest
from fewstep.models.save import save_model
from fewstep.models.specs import MODELS
from fewstep.models.upsampling import fold_upsamplers
from fewstep.settings import Settings


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """What makes the folder of a model as its authors have it, once; nobody may change its files."""
    return cache(lambda name, **more: make_folder(MODELS[name], tmp_path_factory.mktemp("published"), **more))


class Shop:
    """A hub that has one model, and a machine that has none."""

    def __init__(self, hub, name, weights, original):
        self.hub, self.name, self.spec, self.weights = hub, name, MODELS[name], weights
        self.rows = put_on(hub, self.spec, original)
        self.variables = {"HOME": str(weights), "FEWSTEP_WEIGHTS": str(weights)}

    def run(self, module, *arguments):
        return self.hub.run(self.rows, self.name, module, *arguments, **self.variables)

    def install(self):
        assert [self.run(command)[0] for command in ("download_weights", "save_weights")] == [0, 0]

    def load(self, **settings):
        return load_pipeline(self.spec, Settings(weights_root=self.weights, **settings))

    def generate(self, **inputs):
        size = {"aspect_ratio": "custom", "width": 64, "height": 64}
        [image] = self.load().images(["a red house"], [1], **size, **inputs)
        return image


@pytest.fixture
def shop(tmp_path, published):
    with running_hub({}) as hub:
        yield lambda name, **more: Shop(hub, name, tmp_path / "weights", published(name, **more))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "sdxl" else pytest.mark.slow) for name in REAL]
)
def test_a_model_goes_from_the_hub_to_a_image(shop, name):
    model = shop(name)

    model.install()

    image = model.generate()
    assert image.size == (64, 64)
    assert model.generate().tobytes() == image.tobytes()
    guided = 3.0 if model.spec.embedded_guidance else 2.0
    assert model.generate(guidance=guided).tobytes() != image.tobytes()
    assert sorted(path.name for path in model.weights.iterdir()) == [".downloads", ".lock", name]


def test_the_folder_is_what_design_says(shop, published):
    model, original = shop("sdxl", dtype=torch.float32), published("sdxl", dtype=torch.float32)
    model.install()
    folder = model.weights / "sdxl"

    assert json.loads((folder / "vae" / "config.json").read_text())["force_upcast"] is False
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["_class_name"], scheduler["beta_end"]) == ("LCMScheduler", 0.012)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        (file,) = (folder / part).glob("*.safetensors")
        found, whole = load_file(file), load_file(original / part / file.name)
        assert {value.dtype for value in found.values()} == {torch.float16}
        assert all(torch.equal(found[key], whole[key].half()) for key in whole)
    loaded = model.load(dtype="fp32").diffusion
    saved = AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32)
    fold_upsamplers(saved)
    expected = {"vae": saved.state_dict()}
    for part in ("text_encoder", "text_encoder_2"):
        (file,) = (folder / part).glob("*.safetensors")
        expected[part] = plain(load_file(file))
    for part, tensors in expected.items():
        state = plain(getattr(loaded, part).state_dict())
        for key, value in tensors.items():
            assert torch.equal(state[key], value.float()), (part, key)
    manifest = {file.path: file for file in read_manifest(folder, fix="").files}
    vae = manifest["vae/diffusion_pytorch_model.safetensors"]
    assert (vae.source, vae.licence) == ("madebyollin/sdxl-vae-fp16-fix", "MIT")
    assert manifest["unet/config.json"].revision == "462165984030d82259a11f4367a4eed129e94a7b"
    assert manifest["lcm_lora.safetensors"].source == "latent-consistency/lcm-lora-sdxl"


@pytest.mark.slow
def test_nothing_is_saved_of_an_incomplete_or_damaged_download(shop):
    model = shop("sd15")
    status, err = model.run("save_weights")
    assert status == 1 and "has not been downloaded; run: scripts/download-weights sd15" in err
    model.run("download_weights")
    flip(next(model.weights.rglob("unet/*.fp16.safetensors")), 5000)

    status, err = model.run("save_weights")

    assert status == 1 and "diffusion_pytorch_model.fp16.safetensors is damaged on this disk" in err
    assert not (model.weights / "sd15").exists()


def flip(file, at):
    """Change a byte, and neither the file's times nor what it may be a link to."""
    before, content = file.stat(), bytearray(file.read_bytes())
    content[at] ^= 1
    file.unlink()
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.slow
def test_a_killed_save_leaves_nothing_that_looks_finished_and_the_next_completes(shop):
    model = shop("sd15")
    model.run("download_weights")
    process = model.hub.start(model.rows, "sd15", "save_weights", **model.variables)
    part = model.weights / ".sd15.part"
    while not part.exists():
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert not (model.weights / "sd15").exists()
    with pytest.raises(WeightsError, match=r"weights/sd15 is missing; run: scripts/download-weights sd15"):
        model.load()

    assert model.run("save_weights")[0] == 0
    assert not part.exists()
    model.generate()


@pytest.mark.slow
def test_a_byte_flipped_in_the_unet_is_found_at_setup_and_saving_anew_mends_it(shop):
    model = shop("sd15")
    model.install()
    flip(model.weights / "sd15" / "unet" / "diffusion_pytorch_model.safetensors", -10)
    said = r"weights/sd15/unet/diffusion_pytorch_model.safetensors is damaged"
    with pytest.raises(WeightsError, match=said):
        model.load()

    assert model.run("save_weights")[0] == 0

    model.generate()
    assert sorted(path.name for path in model.weights.iterdir()) == [".downloads", ".lock", "sd15"]


def plain(state):
    """Transformers 5 writes its text encoders without the prefix that their published files have."""
    return {key.removeprefix("text_model."): value for key, value in state.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sdxl", "sd15"])
def test_a_single_file_checkpoint_takes_the_place_of_the_networks(shop, published, tmp_path, name):
    model, fine_tune = shop(name), published(name, seed=5)
    checkpoint = save_checkpoint(fine_tune, tmp_path / "fine_tune_v7.safetensors")
    assert model.run("download_weights", "--for-single-file")[0] == 0
    assert not list(model.weights.rglob("unet/*.safetensors"))

    assert model.run("save_weights", "--from-single-file", str(checkpoint))[0] == 0

    for part in model.spec.in_checkpoint:
        (file,) = (model.weights / name / part).glob("*.safetensors")
        found, expected = plain(load_file(file)), plain(load_file(fine_tune / part / file.name))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), part
    files = {file.path: file for file in read_manifest(model.weights / name, fix="").files}
    unet = files["unet/diffusion_pytorch_model.safetensors"]
    sha256 = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert (unet.source, unet.revision) == ("fine_tune_v7.safetensors", f"sha256 {sha256}")
    assert files["model_index.json"].source == "fewstep"
    assert files["scheduler/scheduler_config.json"].source == model.spec.sources[0].name
    model.generate()
    # Mended by the usual commands, it would silently be the base again.
    (model.weights / name / "vae" / "config.json").unlink()
    said = f"run: scripts/save-weights {name} --from-single-file fine_tune_v7.safetensors"
    with pytest.raises(WeightsError, match=said):
        model.load()


def spoil(checkpoint, kind):
    """Make something of a checkpoint that it must not be taken for."""
    if kind == "web page":
        checkpoint.write_text("<html>")
        return checkpoint
    if kind == "pickle":
        return checkpoint.rename(checkpoint.with_suffix(".ckpt"))
    state, unet = load_file(checkpoint), "model.diffusion_model."
    first, last = state[f"{unet}input_blocks.0.0.weight"], state[f"{unet}out.2.weight"]
    changed = {
        "inpainting": {f"{unet}input_blocks.0.0.weight": torch.cat([first, first, first[:, :1]], 1)},
        "v-prediction": {"v_pred": torch.zeros(0)},
        "more layers": {f"{unet}middle_block.3.weight": torch.zeros(4)},
        "too large for fp16": {f"{unet}out.2.weight": torch.full_like(last.float(), 1e6)},
    }
    lost = {"no text encoder": "cond_stage_model", "half a text encoder": "layers.1.mlp"}.get(kind, "nothing")
    state = {key: value for key, value in (state | changed.get(kind, {})).items() if lost not in key}
    metadata = {"modelspec.prediction_type": "v"} if kind == "v-prediction by its card" else {}
    save_file(state, checkpoint, metadata=metadata)
    return checkpoint


@pytest.mark.parametrize(
    "kind, said",
    [
        ("inpainting", "has 9 input channels"),
        ("v-prediction", "predicts v or has a noise schedule of its own"),
        ("v-prediction by its card", "predicts v or has a noise schedule of its own"),
        ("more layers", "tensors where"),
        ("no text encoder", "has no text_encoder of sd15's kind in it"),
        ("half a text encoder", "has no whole text_encoder of sd15's kind in it"),
        ("too large for fp16", "does not fit in fp16, first in conv_out.weight of its unet"),
        ("web page", "is not a whole safetensors file"),
        ("pickle", "must be a .safetensors file"),
    ],
)
def test_a_checkpoint_that_cannot_be_what_is_asked_for_is_refused(sd15, published, tmp_path, kind, said):
    checkpoint = spoil(save_checkpoint(published("sd15"), tmp_path / "fine_tune.safetensors"), kind)

    with pytest.raises(WeightsError) as caught:
        save_model(*sd15, checkpoint)

    assert said in str(caught.value) and str(tmp_path) not in str(caught.value)
    assert not (tmp_path / "weights" / "sd15").exists()


@pytest.mark.parametrize("name", ["ssd-1b", "lcm-dreamshaper-v7"])
def test_a_model_that_no_checkpoint_can_be_is_refused_before_anything(name, tmp_path, capsys):
    checkpoint = tmp_path / "sdxl.safetensors"
    checkpoint.touch()
    for command, flags in (
        (download_weights, ["--for-single-file"]),
        (save_weights, ["--from-single-file", str(checkpoint)]),
    ):
        with pytest.raises(SystemExit, match="2"):
            command.main([name, *flags])
        assert "is not made from checkpoints; sdxl and sd15 are" in capsys.readouterr().err


@pytest.fixture
def sd15(published, tmp_path):
    """What `save_model` takes: the model, its files and the root of all weights."""
    spec = MODELS["sd15"]
    return spec, as_downloaded(spec, published("sd15")), tmp_path / "weights"


def test_a_save_that_was_killed_between_its_two_renames_loses_nothing(sd15, tmp_path):
    spec, files, weights = sd15
    folder = save_model(spec, files, weights)
    folder.rename(weights / ".sd15.old")  # as a kill would leave it

    with pytest.raises(FileNotFoundError):  # and the next save does not come through either
        save_model(spec, [replace(files[0], path=tmp_path / "gone"), *files[1:]], weights)

    load_pipeline(spec, Settings(weights_root=weights))
    assert not (weights / ".sd15.old").exists()


def test_two_saves_at_once_take_turns(sd15):
    spec, files, weights = sd15
    with ThreadPoolExecutor(4) as threads:
        saved = [threads.submit(save_model, spec, files, weights) for _ in range(4)]
    assert {one.result() for one in saved} == {weights / "sd15"}
    load_pipeline(spec, Settings(weights_root=weights))
    assert sorted(path.name for path in weights.iterdir()) == [".lock", "sd15"]


def test_linked_files_keep_their_mode(sd15, published):
    unet = published("sd15") / "unet" / "diffusion_pytorch_model.safetensors"
    unet.chmod(0o664)
    folder = save_model(*sd15)
    assert unet.stat().st_mode & 0o777 == 0o664
    assert all(path.stat().st_mode & 0o044 for path in folder.rglob("*.json"))
