"""What is done on cards of so many GB: nothing where there is room, else less at once, or 8 bits."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from fewstep.benchmark.full_size import UNETS
from fewstep.errors import SettingsError
from fewstep.models import memory
from fewstep.models.manifest import Manifest, ManifestFile
from fewstep.models.memory import Footprint, MemoryPlan, plan_for, plan_memory
from fewstep.models.specs import get_model
from fewstep.settings import Settings

SDXL = get_model("sdxl")
GB = 10**9
README = Path(__file__).resolve().parents[2] / "README.md"
# The files of weights/sdxl, in GB: 7.55 with the checker, as it was counted.
FILES = {
    "unet/x.safetensors": 5.14,
    "text_encoder/x.safetensors": 0.25,
    "text_encoder_2/x.safetensors": 1.39,
    "vae/x.safetensors": 0.17,
    "safety_checker/x.safetensors": 0.61,
    "safety_classifier/x.safetensors": 0.34,
    "lcm_lora.safetensors": 0.39,
    "tokenizer/vocab.json": 1,
}
MANIFEST = Manifest("sdxl", tuple(ManifestFile(p, int(s * GB), "", "", "", "") for p, s in FILES.items()), {})


def sizes(dtype=torch.float16, **settings) -> Footprint:
    return Footprint.of(MANIFEST, Settings(**settings), dtype)


def plan(gb: float, **settings) -> MemoryPlan:
    return plan_for(SDXL, sizes(**settings), Settings(**settings), gb, torch.float16)


def test_the_parts_of_a_model_are_those_of_its_files():
    found = sizes()
    assert found == Footprint(unet=5.14, encoders=pytest.approx(1.64), vae=0.17, checker=0.61, lora=0.39)
    assert sizes(torch.float32).unet == 2 * found.unet
    assert (sizes(safety="vit").checker, sizes(safety="off").checker) == (0.34, 0)


@pytest.mark.parametrize(
    ("gb", "small", "least", "pristine"),
    [
        (8, True, 4, False),
        (10.5, True, 8, False),
        (12, False, 4, False),
        (16, False, 8, False),
        (24, False, 8, True),
    ],
)
def test_a_card_of_so_many_gigabytes(gb, small, least, pristine):
    found = plan(gb)
    assert (found.small, found.keep_pristine) == (small, pristine) and found.max_batch >= least
    assert found.needed_gb <= gb
    assert found.max_batch in (1, 2, 4, 8)  # batches are padded to these


def test_more_memory_never_means_less():
    found = [plan(gb / 2) for gb in range(12, 100)]
    for less, more in zip(found, found[1:], strict=False):
        assert more.max_batch >= less.max_batch or (less.small and not more.small)
        assert (less.small, more.keep_pristine) >= (more.small, less.keep_pristine)


def test_what_takes_less_leaves_room_for_more():
    assert plan(10).small and not plan(10, vae="tiny", safety="off").small
    assert plan(100, max_batch=3).max_batch == 3
    assert plan(13, engine="compiled-fp8").needed_gb > plan(13).needed_gb


def test_a_card_that_is_too_small_is_told_so():
    for settings in ({}, {"vae": "tiny"}):  # the text encoders take more than a tiny decoder
        with pytest.raises(SettingsError, match=r"sdxl needs 5\.\d GB of the GPU's memory, and 5\.0 GB are"):
            plan(5, **settings)


def test_a_cpu_has_no_plan_but_the_settings():
    settings = Settings(memory_gb=1, max_batch=5)
    assert plan_memory(SDXL, sizes(), settings, torch.device("cpu"), torch.float16) == MemoryPlan(5)


def test_the_settings_limit_what_is_taken_of_a_card(monkeypatch):
    limits = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (79 * GB, 80 * GB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share: limits.append(share))
    card = torch.device("cuda")
    free = plan_memory(SDXL, sizes(), Settings(), card, torch.float16)
    assert free == plan(79) and limits == []
    assert plan_memory(SDXL, sizes(), Settings(memory_gb=8), card, torch.float16) == plan(8)
    assert limits == [pytest.approx((8 - 0.5) / 80)]  # the fraction is of what torch allocates


def test_larger_images_and_dtypes_take_more(monkeypatch):
    in_fp32 = plan_for(SDXL, sizes(torch.float32), Settings(), 16, torch.float32)
    assert in_fp32.small and not plan(16).small
    monkeypatch.setattr(memory, "UNET_GB", 0.34)
    assert plan(12).max_batch < 8


@pytest.mark.parametrize("name", ["sdxl", "ssd-1b", "sd15", "lcm-dreamshaper-v7"])
def test_the_readme_says_what_is_computed(name):
    spec = get_model(name)
    with torch.device("meta"):
        unet = sum(value.numel() for value in UNet2DConditionModel(**UNETS[name]).parameters())
    encoders = 1.64 if spec.family == "sdxl" else 0.25
    own = Footprint(unet=2 * unet / GB, encoders=encoders, vae=0.17, checker=0.61, lora=0)
    whole = plan_for(spec, own, Settings(max_batch=4), 11, torch.float16)
    assert (whole.max_batch, whole.small) == (4, False)
    with pytest.raises(SettingsError) as refused:
        plan_for(spec, own, Settings(), 1, torch.float16)
    least = re.search(r"needs (\S+) GB", str(refused.value))[1]
    held = whole.needed_gb - (own.unet + own.encoders + own.lora if whole.keep_pristine else 0)
    assert f"| {held:.1f} / {least} GB |" in re.search(rf"\| `{name}` \|.*", README.read_text())[0]
