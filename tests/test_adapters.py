"""Fusing the LCM-LoRA: exact to rounding, complete or refused with the count, nothing left behind."""

import json
import re

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fewstep.adapters import fuse_lcm_lora
from fewstep.errors import WeightsError
from fewstep.settings import Settings

FOLDER = Settings().weights_root / "miniature"
LORA = FOLDER / "lcm_lora.safetensors"
ALPHA = 8.0
MODULE = re.compile(r"unet\.(.*)\.lora_([AB])\.weight")


def load_unet(dtype: torch.dtype = torch.float32) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(
        FOLDER, subfolder="unet", torch_dtype=dtype, use_safetensors=True, local_files_only=True
    )


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return load_unet()


def state(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in unet.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def modules() -> dict[str, dict[str, torch.Tensor]]:
    """The file's matrices, {module: {"A": (r, in, ...), "B": (out, r, ...)}}."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in load_file(LORA).items():
        name, matrix = MODULE.fullmatch(key).groups()
        found.setdefault(name, {})[matrix] = value
    return found


def write(path, style: str, alpha: float):
    """The LoRA as different tools would write it."""
    tensors, metadata = {}, {"format": "pt"}
    names = {
        "kohya": ("lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight"),
        "peft": ("unet.{}.lora_A.weight", "unet.{}.lora_B.weight"),
        "unet only": ("{}.lora_A.weight", "{}.lora_B.weight"),
        "diffusers": ("unet.{}.lora.down.weight", "unet.{}.lora.up.weight"),
    }[style]
    for name, matrices in modules().items():
        written = name.replace(".", "_") if style == "kohya" else name
        for form, matrix in zip(names, "AB", strict=True):
            tensors[form.format(written)] = matrices[matrix]
        if style == "kohya":
            tensors[f"lora_unet_{written}.alpha"] = torch.tensor(alpha, dtype=torch.float16)
        elif style == "diffusers":
            tensors[f"unet.{written}.alpha"] = torch.tensor(alpha)
    if style in ("peft", "unet only"):
        with safe_open(LORA, framework="pt") as file:
            config = json.loads(file.metadata()["lora_adapter_metadata"])
        config["unet.lora_alpha"] = alpha
        if style == "unet only":
            config = {key.removeprefix("unet."): value for key, value in config.items()}
        metadata["lora_adapter_metadata"] = json.dumps(config)
    save_file(tensors, path, metadata=metadata)
    return path


@pytest.mark.parametrize("scale", [1.0, 0.5, -0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fused_is_base_plus_lora_in_float64_rounded_once(tmp_path, dtype, scale):
    unet = load_unet(dtype)
    before = state(unet)
    count = fuse_lcm_lora(unet, write(tmp_path / "lora.safetensors", "kohya", ALPHA), "mend it", scale)
    after = state(unet)

    assert count == len(modules()) == 129
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    for name, matrices in modules().items():
        weight = before[f"{name}.weight"]
        a, b = (matrices[matrix].double().numpy().reshape(len(matrices[matrix]), -1) for matrix in "AB")
        exact = weight.double() + scale * ALPHA / len(a) * torch.from_numpy(b @ a).reshape(weight.shape)
        error = (after[f"{name}.weight"].double() - exact).abs()
        nearest = (exact.to(dtype).double() - exact).abs()  # but for ties, and the order of the sum
        assert (error <= nearest + 1e-14).all(), name
        changed.discard(f"{name}.weight")
    assert not changed, "only the LoRA's layers may change"


@pytest.mark.parametrize("alpha", [8.0, 32.0, 5.0])
def test_whoever_wrote_the_file_the_fused_weights_are_bit_identical(tmp_path, alpha):
    states = []
    for style in ("kohya", "peft", "unet only", "diffusers"):
        unet = load_unet()
        fuse_lcm_lora(unet, write(tmp_path / f"{style}.safetensors", style, alpha), "mend it")
        states.append(state(unet))
    assert all(same(states[0], one) for one in states[1:])
    assert not same(states[0], state(load_unet()))


@pytest.mark.parametrize("style", ["kohya", "peft"])
def test_it_is_what_diffusers_and_peft_fuse(tmp_path, style):
    path = write(tmp_path / "lora.safetensors", style, ALPHA)
    theirs = StableDiffusionXLPipeline.from_pretrained(
        FOLDER, dtype=torch.float32, use_safetensors=True, local_files_only=True, add_watermarker=False
    )
    theirs.load_lora_weights(tmp_path, weight_name=path.name, local_files_only=True)
    theirs.fuse_lora(components=["unet"])
    theirs.unload_lora_weights()
    ours = load_unet()
    fuse_lcm_lora(ours, path, "mend it")
    expected = state(theirs.unet)
    for name, value in state(ours).items():
        assert torch.allclose(value, expected[name], atol=1e-5), name


def test_nothing_is_left_of_the_adapter(unet):
    before = state(unet)
    fuse_lcm_lora(unet, LORA, "mend it")
    assert not any(isinstance(module, BaseTunerLayer) for module in unet.modules())
    assert state(unet).keys() == before.keys()
    assert all(value.dtype == before[name].dtype for name, value in state(unet).items())


def damaged(kind: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    tensors, metadata = load_file(LORA), {"format": "pt"}
    convolution = next(key for key in tensors if key.endswith("conv1.lora_A.weight"))
    linear = next(key for key in tensors if key.endswith("to_q.lora_B.weight"))
    if kind == "nothing of it":
        tensors = {key.replace("unet.", "unet.other."): value for key, value in tensors.items()}
    elif kind == "two strangers":
        for place in ("down_blocks.7.resnets.0.conv1", "text_model.layers.0.to_q"):
            for key in (convolution, convolution.replace("lora_A", "lora_B")):
                tensors[key.replace(convolution.split(".lora")[0], f"unet.{place}")] = tensors[key].clone()
    elif kind == "wider":
        tensors = {key: torch.cat([value, value], 1) for key, value in tensors.items()}
    elif kind == "transposed":
        tensors[convolution] = tensors[convolution].permute(1, 0, 2, 3).contiguous()
    elif kind == "ranks that differ":
        tensors[linear] = tensors[linear][:, :-1].contiguous()
    elif kind == "half a module":
        del tensors[linear]
    elif kind == "a key of another kind":
        tensors["unet.mid_block.resnets.0.conv1.dora_scale"] = torch.ones(4)
    elif kind in ("nan", "inf"):
        for key in (convolution, linear):
            tensors[key].view(-1)[3] = float(kind)
    elif kind == "alpha":
        tensors[linear.replace("lora_B.weight", "alpha")] = torch.tensor(torch.inf)
    elif kind == "empty":
        tensors = {}
    elif kind == "two alphas":
        tensors[linear.replace("lora_B.weight", "alpha")] = torch.ones(2)
    elif kind in ("use_dora", "use_rslora", "alpha_pattern"):
        metadata["lora_adapter_metadata"] = json.dumps(
            {f"unet.{kind}": {"to_q": 4} if "pattern" in kind else True}
        )
    elif kind == "list":
        metadata["lora_adapter_metadata"] = "[]"
    elif kind == "header":
        metadata["lora_adapter_metadata"] = "{"
    return tensors, metadata


@pytest.mark.parametrize(
    "kind, said",
    [
        ("nothing of it", "129 of its 129 modules do not fit this model"),
        ("two strangers", "2 of its 131 modules do not fit this model, first down_blocks_7_resnets_0_conv1"),
        ("wider", "129 of its 129 modules do not fit this model"),
        ("transposed", "1 of its 129 modules do not fit this model"),
        ("ranks that differ", "1 of its 129 modules do not fit this model"),
        ("half a module", "1 of its 129 modules do not fit this model"),
        ("a key of another kind", "1 of its 130 modules do not fit this model"),
        ("nan", "2 of its 129 modules hold values that are not finite"),
        ("inf", "2 of its 129 modules hold values that are not finite"),
        ("alpha", "1 of its 129 modules hold values that are not finite"),
        ("empty", "has no modules"),
        ("two alphas", "1 of its 129 modules do not fit this model"),
        ("use_dora", "cannot be read (not a plain LoRA)"),
        ("use_rslora", "cannot be read (not a plain LoRA)"),
        ("alpha_pattern", "cannot be read (not a plain LoRA)"),
        ("list", "cannot be read"),
        ("header", "cannot be read"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused_with_the_count_and_the_unet_untouched(
    unet, tmp_path, kind, said
):
    tensors, metadata = damaged(kind)
    path = tmp_path / "lcm_lora.safetensors"
    save_file(tensors, path, metadata=metadata)
    before = state(unet)

    with pytest.raises(WeightsError) as caught:
        fuse_lcm_lora(unet, path, "mend it")

    sentence = str(caught.value)
    assert said in sentence and sentence.endswith("; run: mend it")
    assert str(tmp_path) not in sentence, "no path of this machine"
    assert same(before, state(unet))


def test_a_damaged_file_is_refused(unet, tmp_path):
    path = tmp_path / "lcm_lora.safetensors"
    path.write_bytes(LORA.read_bytes()[:5000])
    with pytest.raises(WeightsError, match=r"lcm_lora.safetensors cannot be read .*; run: mend it"):
        fuse_lcm_lora(unet, path, "mend it")
