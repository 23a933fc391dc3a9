"""LoRAs that are refused: by reason, with the count, and with nothing changed."""

import os

import pytest
import torch
from loras import LAYERS, LORA, UNFIT, fuse, same, state, weights, write_style
from safetensors.torch import load_file, save_file

from fewstep.errors import LoraError
from fewstep.lora.types import Mix

BROKEN = "modules that hold values that are not finite"


def damaged(kind):
    """The tensors and the header of the file, but for one thing."""
    tensors = load_file(LORA)
    convolution = next(key for key in tensors if key.endswith("conv1.lora_A.weight"))
    linear = next(key for key in tensors if key.endswith("to_q.lora_B.weight"))
    alpha, stem = linear.replace("lora_B.weight", "alpha"), convolution.partition(".lora")[0]
    pair = {key: value for key, value in tensors.items() if key.startswith(f"{stem}.lora")}
    strange = "unet.down_blocks.7.resnets.0.conv1", "unet.text_model.layers.0.to_q"
    if kind in ("nan", "inf"):
        for key in (convolution, linear):
            tensors[key].view(-1)[3] = float(kind)
    changed = {
        "two strangers": {k.replace(stem, name): v.clone() for name in strange for k, v in pair.items()},
        "transposed": {convolution: tensors[convolution].permute(1, 0, 2, 3).contiguous()},
        "ranks that differ": {linear: tensors[linear][:, :-1].contiguous()},
        "a key of another kind": {"unet.mid_block.resnets.0.conv1.dora_scale": torch.ones(4)},
        "alpha": {alpha: torch.tensor(torch.inf)},
        "two alphas": {alpha: torch.ones(2)},
    }
    others = {
        "nothing of it": {key.replace("unet.", "unet.other."): value for key, value in tensors.items()},
        "wider": {key: torch.cat([value, value], 1) for key, value in tensors.items()},
        "half a module": {key: value for key, value in tensors.items() if key != linear},
        "empty": {},
    }
    headers = {"use_dora": '{"unet.use_dora": true}', "use_rslora": '{"unet.use_rslora": true}'}
    headers |= {"alpha_pattern": '{"unet.alpha_pattern": {"to_q": 4}}', "list": "[]", "header": "{"}
    metadata = {"lora_adapter_metadata": headers[kind]} if kind in headers else {}
    return others.get(kind, tensors | changed.get(kind, {})), {"format": "pt"} | metadata


@pytest.mark.parametrize(
    "kind, said",
    [
        ("nothing of it", f"{LAYERS} of {LAYERS} {UNFIT}"),
        ("two strangers", f"2 of {LAYERS + 2} {UNFIT}, first unet.down_blocks_7_resnets_0_conv1"),
        ("wider", f"{LAYERS} of {LAYERS} {UNFIT}"),
        *((kind, f"1 of {LAYERS} {UNFIT}") for kind in ("transposed", "ranks that differ", "half a module")),
        ("two alphas", f"1 of {LAYERS} {UNFIT}"),
        ("a key of another kind", f"1 of {LAYERS + 1} {UNFIT}"),
        *((kind, f"{count} of {LAYERS} {BROKEN}") for kind, count in (("nan", 2), ("inf", 2), ("alpha", 1))),
        ("empty", "has no modules"),
        *((kind, "is not a plain LoRA") for kind in ("use_dora", "use_rslora", "alpha_pattern")),
        *((kind, "cannot be read") for kind in ("list", "header")),
    ],
)
def test_a_lora_that_does_not_fit_is_refused_with_the_count_and_changes_nothing(model, tmp_path, kind, said):
    tensors, metadata = damaged(kind)
    path = tmp_path / "lcm_lora.safetensors"
    save_file(tensors, path, metadata=metadata)
    before = state(model.unet)

    with pytest.raises(LoraError) as caught:
        fuse(model.unet, path)

    assert said in str(caught.value)
    assert str(tmp_path) not in str(caught.value), "no path of this machine"
    assert same(before, state(model.unet))


@pytest.mark.parametrize(
    "kind, said",
    [
        ("too strong", "adds [0-9]{3,4} times as much as the weights that it changes hold"),
        ("header", "is not a safetensors file, or has a header of more than 4 MB"),
        *((kind, "is not a safetensors file") for kind in ("page", "pickle")),
        ("size", "has 3000000000 bytes; at most 2000000000 are allowed"),
        *((kind, f"has 1 of 6 {UNFIT}") for kind in ("integers", "a huge rank")),
        ("a layer twice", "has a layer twice, under two names"),
        *((kind, "cannot be read") for kind in ("empty", "cut", "alpha is a list", "alpha is huge")),
        *((kind, "cannot be read") for kind in ("deep metadata", "complex alpha", "LDM with a long alpha")),
        ("of another LDM", f"has 6 of 6 {UNFIT}"),
    ],
)
def test_hostile_styles_are_refused_by_reason(model, adapters, tmp_path, kind, said):
    state = load_file(write_style(model, tmp_path / "sound.safetensors", seed=7))
    path = tmp_path / "style.safetensors"
    first, alpha = (next(key for key in state if key.endswith(end)) for end in ("lora_up.weight", "alpha"))
    twin = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight"
    stem, wide = "lora_unet_middle_block_2_out_layers_3", torch.zeros(64_000, 128, dtype=torch.float16)
    long = {f"{stem}.{end}.weight": torch.zeros(4, 4, 1, 1) for end in ("lora_down", "lora_up")}
    ldm = "lora_unet_output_blocks_{}_1_proj.{}".format
    tensors = {
        "too strong": {key: v if "alpha" in key else 100 * v.float() for key, v in state.items()},
        "integers": state | {first: state[first].to(torch.int8)},
        # Of a few megabytes, for which r x r numbers would take 32 GB.
        "a huge rank": state | {first: wide.T.contiguous(), first.replace("lora_up", "lora_down"): wide},
        "a layer twice": state | {twin: torch.zeros(4, 128)},
        "complex alpha": state | {alpha: torch.tensor(1j, dtype=torch.complex64)},
        "LDM with a long alpha": long | {f"{stem}.alpha": torch.ones(3)},
        "of another LDM": {ldm(i // 3, k.partition(".")[2]): v for i, (k, v) in enumerate(state.items())},
    }
    headers = {"alpha is a list": '{"unet.lora_alpha": [1]}', "deep metadata": "[" * 60_000}
    headers["alpha is huge"] = f'{{"unet.lora_alpha": {10**400}}}'
    contents = {"header": (10**8).to_bytes(8, "little") + b" " * 10**6, "empty": b"", "size": bytes(9)}
    contents |= {"page": b"<!doctype html><html>sign in</html>", "cut": LORA.read_bytes()[:5000]}
    if kind in contents:
        path.write_bytes(contents[kind])
    elif kind == "pickle":
        torch.save(state, path)
    else:
        metadata = {"lora_adapter_metadata": headers[kind]} if kind in headers else None
        save_file(tensors.get(kind, state), path, metadata)
    if kind == "size":
        os.truncate(path, 3 * 10**9)
    adapters.apply(Mix())
    before = weights(model)

    with pytest.raises(LoraError, match=said):
        adapters.read(path, "any")

    adapters.apply(Mix())
    assert same(before, weights(model))
