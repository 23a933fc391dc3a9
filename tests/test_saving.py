"""From the hub to a picture: download, save, load and paint, for every model of the table at toy size."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hub import running_hub
from ldm import save_checkpoint
from safetensors.torch import load_file
from tiny import REAL, make_folder, put_on

from fewstep.errors import WeightsError
from fewstep.models import MODELS
from fewstep.pipeline import load_pipeline
from fewstep.request import Request
from fewstep.settings import Settings
from fewstep.weights import read_manifest

ROOT = Path(__file__).resolve().parents[1]
# A command as it is, but for the sizes and hashes that are pinned.
COMMAND = """
import importlib, json, sys
from fewstep.sources import SOURCES, HubFile, HubRepo
table, name, module, *arguments = sys.argv[1:]
SOURCES[name] = tuple(
    HubRepo(**{**row, "files": tuple(HubFile(**file) for file in row["files"])})
    for row in json.loads(table)
)
sys.exit(importlib.import_module(f"fewstep.commands.{module}").main([name, *arguments]))
"""


class Shop:
    """A hub that has one model, and a machine that has none."""

    def __init__(self, hub, name: str, home: Path, dtype: torch.dtype = torch.float16) -> None:
        self.hub, self.name, self.spec = hub, name, MODELS[name]
        self.weights = home / "weights"
        self.original = make_folder(self.spec, home / "original", dtype)
        self.rows = put_on(hub, self.spec, self.original)

    def start(self, module: str, *arguments: str) -> subprocess.Popen[str]:
        table = json.dumps([asdict(row) for row in self.rows])
        environ = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environ |= {
            "HF_ENDPOINT": self.hub.url,
            "HOME": str(self.weights),
            "FEWSTEP_WEIGHTS": str(self.weights),
            "PYTHONPATH": str(ROOT),
        }
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, table, self.name, module, *arguments],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, module: str, *arguments: str) -> tuple[int, str]:
        process = self.start(module, *arguments)
        err = process.communicate(timeout=100)[1]
        assert "Traceback" not in err, err
        return process.returncode, err

    def paint(self, **inputs):
        pipeline = load_pipeline(self.spec, Settings(weights_root=self.weights))
        request = Request.create(
            self.spec, prompt="a red house", seed=1, aspect_ratio="custom", width=64, height=64, **inputs
        )
        (painting,) = pipeline.generate([request])
        assert not isinstance(painting, Exception), painting
        return painting.images[0]


@pytest.fixture
def shop(tmp_path):
    with running_hub({}) as hub:
        yield lambda name, **options: Shop(hub, name, tmp_path, **options)


@pytest.mark.parametrize("name", REAL)
def test_a_model_goes_from_the_hub_to_a_picture(shop, name):
    model = shop(name)

    assert model.run("download_weights")[0] == 0
    assert model.run("save_weights")[0] == 0

    assert model.paint().size == (64, 64)
    assert model.paint().tobytes() == model.paint().tobytes()
    guided = 3.0 if model.spec.embedded_guidance else 2.0
    assert model.paint(guidance=guided).tobytes() != model.paint().tobytes()
    assert sorted(path.name for path in model.weights.iterdir()) == [".downloads", name]


def test_the_folder_is_what_design_says(shop):
    model = shop("sdxl", dtype=torch.float32)
    model.run("download_weights")
    model.run("save_weights")
    folder = model.weights / "sdxl"

    assert json.loads((folder / "vae" / "config.json").read_text())["force_upcast"] is False
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["_class_name"], scheduler["beta_end"]) == ("LCMScheduler", 0.012)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        (file,) = (folder / part).glob("*.safetensors")
        found, original = load_file(file), load_file(model.original / part / file.name)
        assert {value.dtype for value in found.values()} == {torch.float16}
        assert all(torch.equal(found[key], original[key].half()) for key in original)
    loaded = load_pipeline(model.spec, Settings(weights_root=model.weights)).diffusion
    for part in ("vae", "text_encoder", "text_encoder_2"):
        state = plain(getattr(loaded, part).state_dict())
        (file,) = (folder / part).glob("*.safetensors")
        for key, value in plain(load_file(file)).items():
            assert torch.equal(state[key], value.float()), (part, key)
    manifest = {file.path: file for file in read_manifest(folder, remedy="").files}
    vae = manifest["vae/diffusion_pytorch_model.safetensors"]
    assert (vae.source, vae.licence) == ("madebyollin/sdxl-vae-fp16-fix", "MIT")
    assert manifest["unet/config.json"].revision == "462165984030d82259a11f4367a4eed129e94a7b"
    assert manifest["lcm_lora.safetensors"].source == "latent-consistency/lcm-lora-sdxl"


def test_nothing_is_saved_of_an_incomplete_or_damaged_download(shop):
    model = shop("sd15")
    status, err = model.run("save_weights")
    assert status == 1 and "has not been downloaded; run: scripts/download-weights sd15" in err
    model.run("download_weights")
    unet = next(model.weights.rglob("unet/*.fp16.safetensors"))
    content = bytearray(unet.read_bytes())
    content[5000] ^= 1
    unet.write_bytes(content)

    status, err = model.run("save_weights")

    assert status == 1 and "diffusion_pytorch_model.fp16.safetensors is damaged on this disk" in err
    assert not (model.weights / "sd15").exists()


def test_a_killed_save_leaves_nothing_that_looks_finished_and_the_next_completes(shop):
    model = shop("sd15")
    model.run("download_weights")
    process = model.start("save_weights")
    part = model.weights / ".sd15.part"
    while not part.exists():
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert not (model.weights / "sd15").exists()
    with pytest.raises(WeightsError, match=r"weights/sd15 is missing; run: scripts/download-weights sd15"):
        load_pipeline(model.spec, Settings(weights_root=model.weights))

    assert model.run("save_weights")[0] == 0
    assert not part.exists()
    model.paint()


def test_saving_anew_replaces_the_folder(shop):
    model = shop("sd15")
    model.run("download_weights")
    model.run("save_weights")
    (model.weights / "sd15" / "unet" / "config.json").write_text("{}")

    assert model.run("save_weights")[0] == 0

    model.paint()
    assert sorted(path.name for path in model.weights.iterdir()) == [".downloads", "sd15"]


def test_a_byte_flipped_in_the_unet_is_found_at_setup_and_named(shop):
    model = shop("sd15")
    model.run("download_weights")
    model.run("save_weights")
    unet = model.weights / "sd15" / "unet" / "diffusion_pytorch_model.safetensors"
    before = unet.stat()
    content = bytearray(unet.read_bytes())
    content[-10] ^= 1
    unet.unlink()  # it may be a link to the download
    unet.write_bytes(content)
    os.utime(unet, ns=(before.st_atime_ns, before.st_mtime_ns))

    with pytest.raises(
        WeightsError, match=r"weights/sd15/unet/diffusion_pytorch_model.safetensors is damaged"
    ):
        load_pipeline(model.spec, Settings(weights_root=model.weights))


def plain(state):
    """Transformers 5 writes its text encoders without the prefix that their published files have."""
    return {key.removeprefix("text_model."): value for key, value in state.items()}


@pytest.mark.parametrize("name", ["sdxl", "sd15"])
def test_a_single_file_checkpoint_takes_the_place_of_the_networks(shop, name):
    model = shop(name)
    fine_tune = make_folder(model.spec, model.weights.parent / "fine-tune", seed=5)
    checkpoint = save_checkpoint(fine_tune, model.weights.parent / "fine_tune_v7.safetensors")
    assert model.run("download_weights", "--for-single-file")[0] == 0
    assert not list(model.weights.rglob("unet/*.safetensors"))

    assert model.run("save_weights", "--from-single-file", str(checkpoint))[0] == 0

    for part in model.spec.in_checkpoint:
        (file,) = (model.weights / name / part).glob("*.safetensors")
        found, expected = plain(load_file(file)), plain(load_file(fine_tune / part / file.name))
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), part
    manifest = {file.path: file.source for file in read_manifest(model.weights / name, remedy="").files}
    assert manifest["unet/diffusion_pytorch_model.safetensors"] == "fine_tune_v7.safetensors"
    model.paint()


def test_a_checkpoint_of_another_kind_is_refused(shop):
    model = shop("sd15")
    other = make_folder(MODELS["sdxl"], model.weights.parent / "other")
    checkpoint = save_checkpoint(other, model.weights.parent / "sdxl.safetensors")
    model.run("download_weights", "--for-single-file")

    status, err = model.run("save_weights", "--from-single-file", str(checkpoint))

    assert status == 1 and "sdxl.safetensors does not hold" in err
    assert not (model.weights / "sd15").exists()
