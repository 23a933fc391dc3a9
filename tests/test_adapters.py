"""Fusing the LCM-LoRA: exact to rounding, complete or refused, and nothing is left behind."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file

from fewstep.adapters import fuse_lcm_lora
from fewstep.errors import WeightsError
from fewstep.settings import Settings

FOLDER = Settings().weights_root / "miniature"
LORA = FOLDER / "lcm_lora.safetensors"


@pytest.fixture
def diffusion() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline.from_pretrained(
        FOLDER, dtype=torch.float32, use_safetensors=True, local_files_only=True, add_watermarker=False
    )


def state(diffusion: StableDiffusionXLPipeline) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in diffusion.unet.state_dict().items()}


def is_plain(diffusion: StableDiffusionXLPipeline) -> bool:
    return not any(isinstance(module, BaseTunerLayer) for module in diffusion.unet.modules())


def test_the_fused_unet_is_base_plus_lora_and_has_no_wrapper(diffusion):
    before, tensors = state(diffusion), load_file(LORA)
    modules = fuse_lcm_lora(diffusion, LORA, "mend it")
    after = state(diffusion)

    assert is_plain(diffusion) and after.keys() == before.keys()
    assert modules == sum(key.endswith("lora_B.weight") for key in tensors)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    for key, down in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        up = tensors[key.replace("lora_A", "lora_B")].float()
        name = key.removeprefix("unet.").replace(".lora_A", "")
        delta = (up.flatten(1) @ down.float().flatten(1)).reshape(before[name].shape)
        assert torch.allclose(after[name], before[name] + delta, atol=1e-5), name
        changed.discard(name)
    assert not changed, "only the LoRA's layers may change"


def test_kohya_names_and_alpha_fuse_the_same(diffusion, tmp_path):
    """As the published LCM-LoRAs are: lora_unet_..., alpha 8 at rank 64."""
    tensors, kohya = load_file(LORA), {}
    for key, value in tensors.items():
        module, _, kind = key.removeprefix("unet.").removesuffix(".weight").rpartition(".")
        name = "lora_unet_" + module.replace(".", "_")
        if kind == "lora_A":
            kohya[f"{name}.lora_down.weight"] = value
            kohya[f"{name}.alpha"] = torch.tensor(value.shape[0] / 4)
        else:
            kohya[f"{name}.lora_up.weight"] = 4 * value.float()
    save_file(kohya, tmp_path / "kohya.safetensors")

    fuse_lcm_lora(diffusion, tmp_path / "kohya.safetensors", "mend it")
    found = state(diffusion)
    other = StableDiffusionXLPipeline.from_pretrained(FOLDER, dtype=torch.float32, local_files_only=True)
    fuse_lcm_lora(other, LORA, "mend it")
    for name, expected in state(other).items():
        assert torch.allclose(found[name], expected, atol=1e-5), name


@pytest.mark.parametrize("damage", ["stranger", "nan", "inf", "empty"])
def test_a_lora_that_does_not_fit_is_refused_and_the_model_untouched(diffusion, tmp_path, damage):
    tensors, before = load_file(LORA), state(diffusion)
    key = next(key for key in tensors if key.endswith("conv1.lora_A.weight"))
    if damage == "stranger":  # a module that this UNet does not have
        for kind in ("lora_A", "lora_B"):
            tensors[f"unet.down_blocks.7.resnets.0.conv1.{kind}.weight"] = tensors[
                key.replace("lora_A", kind)
            ].clone()
    elif damage == "empty":
        tensors = {"unet.nothing": torch.zeros(1)}
    else:
        tensors[key] = torch.full_like(tensors[key], float(damage))
    path = tmp_path / "lcm_lora.safetensors"
    save_file(tensors, path)

    with pytest.raises(WeightsError, match="mend it"):
        fuse_lcm_lora(diffusion, path, "mend it")

    assert is_plain(diffusion)
    assert all(torch.equal(value, before[name]) for name, value in state(diffusion).items())


def test_a_lora_of_another_model_is_refused(diffusion, tmp_path):
    path = tmp_path / "lcm_lora.safetensors"
    tensors = load_file(LORA)
    save_file({key: torch.cat([value, value], 1) for key, value in tensors.items()}, path)
    before = state(diffusion)
    with pytest.raises(WeightsError):
        fuse_lcm_lora(diffusion, path, "mend it")
    assert is_plain(diffusion)
    assert all(torch.equal(value, before[name]) for name, value in state(diffusion).items())


def test_scale_scales(diffusion):
    before = state(diffusion)
    fuse_lcm_lora(diffusion, LORA, "mend it", scale=0.5)
    half = state(diffusion)
    full = StableDiffusionXLPipeline.from_pretrained(FOLDER, dtype=torch.float32, local_files_only=True)
    fuse_lcm_lora(full, LORA, "mend it")
    for name, value in state(full).items():
        assert torch.allclose(half[name] - before[name], (value - before[name]) / 2, atol=1e-5)


def test_no_path_of_this_machine_is_in_an_error(diffusion, tmp_path):
    path: Path = tmp_path / "lcm_lora.safetensors"
    save_file({"unet.nothing": torch.zeros(1)}, path)
    with pytest.raises(WeightsError) as caught:
        fuse_lcm_lora(diffusion, path, "mend it")
    assert str(tmp_path) not in str(caught.value)
