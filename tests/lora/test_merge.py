"""Adapters: exact to rounding, and taken back without a trace."""

import re
from itertools import combinations
from pathlib import Path

import pytest
import torch
from loras import (
    ALPHA,
    FOLDER,
    LAYERS,
    LORA,
    STYLED,
    UNET,
    fuse,
    load_model,
    load_unet,
    modules,
    same,
    state,
    weights,
    write,
    write_style,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

from fewstep.lora import merge
from fewstep.lora.merge import NETWORKS, WeightMerger
from fewstep.lora.types import Mix


@pytest.mark.parametrize("scale", [1.0, 0.5, -0.7])
@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.numeric), torch.float16, torch.bfloat16]
)
def test_fused_is_base_plus_lora_in_float64_rounded_once(tmp_path, dtype, scale):
    unet = load_unet(dtype)
    before, in_file = state(unet), load_file(FOLDER / "unet" / "diffusion_pytorch_model.safetensors")
    count = fuse(unet, write(tmp_path / "lora.safetensors", "kohya", ALPHA), scale)
    after = state(unet)

    assert count == len(modules()) == LAYERS
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    for name, matrices in modules().items():
        weight = in_file[f"{name}.weight"]
        a, b = (matrices[matrix].double().numpy().reshape(len(matrices[matrix]), -1) for matrix in "AB")
        exact = weight.double() + scale * ALPHA / len(a) * torch.from_numpy(b @ a).reshape(weight.shape)
        error = (after[f"{name}.weight"].double() - exact).abs()
        nearest = (exact.to(dtype).double() - exact).abs()  # but for ties, and the order of the sum
        assert (error <= nearest + 1e-14).all(), name
        changed.discard(f"{name}.weight")
    assert not changed, "only the LoRA's layers may change"


@pytest.mark.parametrize("alpha", [8.0, 32.0, 5.0])
def test_whoever_wrote_the_file_the_fused_weights_are_bit_identical(tmp_path, alpha):
    before, states = state(load_unet()), []
    for style in ("kohya", "peft", "unet only", "diffusers"):
        unet = load_unet()
        fuse(unet, write(tmp_path / f"{style}.safetensors", style, alpha))
        states.append(state(unet))
        assert not any(isinstance(module, BaseTunerLayer) for module in unet.modules())
    assert all(same(states[0], one) for one in states[1:])
    assert not same(states[0], before)
    dtypes = [{name: value.dtype for name, value in each.items()} for each in (before, states[0])]
    assert dtypes[0] == dtypes[1]


@pytest.mark.parametrize("style", ["kohya", "peft"])
@pytest.mark.numeric
def test_it_is_what_diffusers_and_peft_fuse(tmp_path, style):
    path = write(tmp_path / "lora.safetensors", style, ALPHA)
    theirs = load_model()
    theirs.load_lora_weights(tmp_path, weight_name=path.name, local_files_only=True)
    theirs.fuse_lora(components=["unet"])
    theirs.unload_lora_weights()
    ours = load_unet()
    fuse(ours, path)
    expected = state(theirs.unet)
    for name, value in state(ours).items():
        assert torch.allclose(value, expected[name], atol=1e-5), name


def test_styles_come_and_go_without_a_trace(model, adapters, tmp_path):
    a, b = (adapters.read(write_style(model, tmp_path / f"{i}", seed=i), f"hash {i}") for i in (1, 2))
    mixes = {
        "none": Mix(),
        "a": Mix(((a, 0.8),)),
        "b": Mix(((b, 0.8),)),
        "a again": Mix(((a, 0.8),)),
        "less of a": Mix(((a, 0.3),)),
        "both": Mix(((a, 0.8), (b, 0.5))),
        "less of the LCM-LoRA": Mix(((a, 0.8), (b, 0.5)), lcm_scale=0.7),
        "a scale of 0": Mix(((a, 0.0),)),
        "none again": Mix(),
    }
    states, buffers = {}, [value.data_ptr() for value in model.unet.state_dict().values()]
    for name, mix in mixes.items():
        adapters.apply(mix)
        states[name] = weights(model)
    alike = {("a", "a again"), *combinations(("none", "a scale of 0", "none again"), 2)}
    for one, other in combinations(mixes, 2):
        assert same(states[one], states[other]) == ((one, other) in alike), (one, other)
    assert buffers == [value.data_ptr() for value in model.unet.state_dict().values()]


@pytest.mark.numeric
def test_a_mix_is_the_sum_of_what_is_in_it(model, adapters, tmp_path):
    paths = [write_style(model, tmp_path / f"{i}", seed=i) for i in (1, 2)]
    a, b = (adapters.read(path, path.name) for path in paths)
    adapters.apply(Mix(((a, 0.8), (b, -0.5)), lcm_scale=0.7))

    def product(state, stem, ends):
        down, up = (state[f"{stem}.{end}.weight"].double().flatten(1) for end in ends)
        return up @ down

    kohya = ("lora_down", "lora_up")
    styles, lcm = [load_file(path) for path in paths], load_file(LORA)
    for name in UNET:
        exact = load_file(FOLDER / "unet" / "diffusion_pytorch_model.safetensors")[f"{name}.weight"].double()
        stem = "lora_unet_" + name.replace(".", "_")
        added = 0.8 * product(styles[0], stem, kohya) - 0.5 * product(styles[1], stem, kohya)
        factor = adapters.lcm_lora.modules["unet." + name.replace(".", "_")].factor
        added += 0.7 * factor * product(lcm, f"unet.{name}", ("lora_A", "lora_B"))
        exact += added.view_as(exact)
        weight = model.unet.get_submodule(name).weight.double()
        assert torch.allclose(weight, exact, rtol=1e-7, atol=1e-9), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_layout_of_a_style_makes_no_difference(model, adapters, tmp_path, dtype):
    states, layers = [], [*STYLED, *(("unet", name) for name in modules() if name not in UNET)]
    for layout in ("kohya", "ldm", "peft"):
        path = write_style(model, tmp_path / layout, seed=3, layers=layers, layout=layout, dtype=dtype)
        adapters.apply(Mix(((adapters.read(path, layout), 1.0),)))
        states.append(weights(model))
    assert same(states[0], states[1]) and same(states[0], states[2])


@pytest.mark.numeric
def test_a_style_is_what_diffusers_and_peft_make_of_it(model, adapters, tmp_path):
    # In kohya's layout they lose the text encoders' attention: its old names are none of transformers 5's.
    path = write_style(model, tmp_path / "style.safetensors", seed=4, layout="peft")
    adapters.apply(Mix(((adapters.read(path, "a"), 0.6),), lcm_scale=0))
    ours = weights(model)
    adapters.apply(Mix(lcm_scale=0))
    base = weights(model)
    model.load_lora_weights(tmp_path, weight_name=path.name, local_files_only=True)
    model.fuse_lora(components=list(NETWORKS["sdxl"]), lora_scale=0.6)
    model.unload_lora_weights()
    theirs = weights(model)
    for name in NETWORKS["sdxl"]:  # unfused by hand: diffusers' way back is not exact
        state = {k.removeprefix(f"{name}."): v for k, v in base.items() if k.startswith(f"{name}.")}
        getattr(model, name).load_state_dict(state)
    changed = {name for name in base if not torch.equal(base[name], ours[name])}
    assert len(changed) == len(STYLED)
    for name in base:
        assert torch.allclose(ours[name], theirs[name], atol=1e-6), name


def test_a_failure_in_the_middle_is_made_good_by_the_next_call(model, adapters, tmp_path, monkeypatch):
    style = adapters.read(write_style(model, tmp_path / "style", seed=5), "style")
    adapters.apply(Mix())
    expected, calls, add_to = weights(model), [], merge.add_to

    def fails_at_the_third(*given):
        calls.append(given)
        if len(calls) == 3:
            raise MemoryError
        add_to(*given)

    with monkeypatch.context() as patch:
        patch.setattr("fewstep.lora.merge.add_to", fails_at_the_third)
        with pytest.raises(MemoryError):
            adapters.apply(Mix(((style, 1.0),)))
    half_done = weights(model)
    adapters.apply(Mix(((style, 1.0),)))
    styled = weights(model)
    adapters.apply(Mix())
    assert same(expected, weights(model))
    adapters.apply(Mix(((style, 1.0),)))
    assert same(styled, weights(model))
    assert not same(half_done, styled) and not same(half_done, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_kept_weights_are_the_files_and_stay_so(tmp_path, dtype):
    """Once kept, no file is looked at; where it holds more than the network, as in fp16, it is the file's."""
    plain, kept = load_unet(dtype), load_unet(dtype)
    mergers = [
        WeightMerger(FOLDER, {"unet": unet}, keep=keep) for unet, keep in ((plain, False), (kept, True))
    ]
    for merger in mergers:
        merger.lcm_lora = merger.read(LORA, "lcm")
    style = mergers[0].read(write(tmp_path / "style", "kohya", 2 * ALPHA), "style")
    for mix in (Mix(), Mix(((style, 0.5),)), Mix(lcm_scale=0.0), Mix(((style, -1.0),), 0.7), Mix()):
        assert len({merger.apply(mix) for merger in mergers}) == 1
        assert same(state(plain), state(kept))
    in_file, held = (merger._pristine for merger in mergers)
    assert same(in_file, held) and any(held[name] is not in_file[name] for name in held)


def test_what_is_forgotten_is_written_anew_whoever_changed_it(model, adapters):
    adapters.apply(Mix())
    before = weights(model)
    untouched = model.unet.time_embedding.linear_1.weight.data
    untouched.zero_()
    adapters.apply(Mix())
    assert not same(before, weights(model))
    adapters.forget()
    adapters.apply(Mix())
    assert same(before, weights(model))


def test_a_file_written_over_in_place_does_not_change_what_was_read(model, adapters, tmp_path):
    path = write_style(model, tmp_path / "style", seed=9)
    style = adapters.read(path, "style")
    before = {name: module.up.clone() for name, module in style.modules.items()}
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(path.stat().st_size // 2))
    assert all(torch.equal(before[name], module.up) for name, module in style.modules.items())


def test_only_layers_that_change_are_written(model, adapters, tmp_path):
    style = adapters.read(write_style(model, tmp_path / "style", seed=6), "style")
    assert adapters.apply(Mix()) == LAYERS
    assert adapters.apply(Mix()) == 0
    assert adapters.apply(Mix(((style, 0.8),))) == len(STYLED)
    assert adapters.apply(Mix(((style, 0.9),))) == len(STYLED)
    assert adapters.apply(Mix(((style, 0.9),), lcm_scale=0.9)) == LAYERS


def test_200_changes_of_style_leave_memory_flat(model, adapters, tmp_path):
    styles = [adapters.read(write_style(model, tmp_path / f"{i}", seed=i), f"{i}") for i in range(2)]

    def change(times):
        for i in range(times):
            adapters.apply(Mix(((styles[i % 2], 0.1 + i / 1000),) if i % 3 else ()))
        return int(re.search(r"VmRSS:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    before = change(20)
    assert change(200) - before < 5e6
