"""Adapters: exact to rounding, complete or refused with the count, and taken back without a trace."""

import json
import os
import re
from itertools import combinations
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from ldm import rename_unet
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fewstep.errors import LoraError
from fewstep.lora import merge
from fewstep.lora.merge import NETWORKS, WeightMerger
from fewstep.lora.types import Mix
from fewstep.settings import Settings

FOLDER = Settings().weights_root / "miniature"
LORA = FOLDER / "lcm_lora.safetensors"
ALPHA = 8.0
LAYERS = 169  # of the UNet that it changes
MODULE = re.compile(r"unet\.(.*)\.lora_([AB])\.weight")


def load_unet(dtype=torch.float32):
    return UNet2DConditionModel.from_pretrained(
        FOLDER, subfolder="unet", torch_dtype=dtype, use_safetensors=True, local_files_only=True
    )


def load_model():
    return StableDiffusionXLPipeline.from_pretrained(
        FOLDER, dtype=torch.float32, use_safetensors=True, local_files_only=True, add_watermarker=False
    )


@pytest.fixture(scope="module")
def model():
    return load_model()


def state(unet):
    return {name: value.clone() for name, value in unet.state_dict().items()}


def fuse(unet, path, scale=1.0):
    """Add the LoRA in `path` to the weights of `unet` as setup does; how many layers that changed."""
    adapters = WeightMerger(FOLDER, {"unet": unet})
    adapters.lcm_lora = adapters.read(path, "any")
    return adapters.apply(Mix(lcm_scale=scale))


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def modules():
    """The file's matrices, {module: {"A": (r, in, ...), "B": (out, r, ...)}}."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in load_file(LORA).items():
        name, matrix = MODULE.fullmatch(key).groups()
        found.setdefault(name, {})[matrix] = value
    return found


def write(path, style, alpha):
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


UNFIT, BROKEN = "modules that do not fit this model", "modules that hold values that are not finite"


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


@pytest.fixture
def adapters(model):
    found = WeightMerger(FOLDER, {name: getattr(model, name) for name in NETWORKS["sdxl"]})
    found.lcm_lora = found.read(LORA, "lcm")
    yield found
    found.apply(Mix(lcm_scale=0))  # the model is everybody's


def weights(model):
    states = {name: getattr(model, name).state_dict() for name in NETWORKS["sdxl"]}
    return {f"{name}.{key}": value.clone() for name, part in states.items() for key, value in part.items()}


# Of the UNet, and of the first and the second text encoder, as tools write them.
UNET = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", "mid_block.resnets.1.conv2"
ENCODER = "text_model.encoder.layers.1.self_attn.v_proj", "text_model.encoder.layers.0.mlp.fc2"
STYLED = [("unet", name) for name in UNET] + [
    (network, name) for network in ("text_encoder", "text_encoder_2") for name in ENCODER
]
KOHYA = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}


def write_style(model, path, seed, *, layers=STYLED, layout="kohya", dtype=torch.float16):
    """A style of rank 4; by default for a matrix and a kernel of the UNet and two layers of each encoder."""
    generator, tensors, rank = torch.Generator().manual_seed(seed), {}, 4
    keys = model.unet.state_dict()
    ldm = dict(zip(keys, rename_unet(keys, 1), strict=True)) if layout == "ldm" else {}
    for network, name in layers:
        own = name.removeprefix("text_model.") if network == "text_encoder" else name
        weight = getattr(model, network).get_submodule(own).weight
        down = 0.05 * torch.randn((rank, *weight.shape[1:]), generator=generator)
        up = 0.05 * torch.randn((len(weight), rank, *(1 for _ in weight.shape[2:])), generator=generator)
        stem, ends = f"{network}.{name}", ("lora_A", "lora_B")
        if layout != "peft":
            written = ldm.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")
            stem, ends = KOHYA[network] + written.replace(".", "_"), ("lora_down", "lora_up")
            tensors[f"{stem}.alpha"] = torch.tensor(float(rank), dtype=dtype)
        tensors |= {f"{stem}.{ends[0]}.weight": down.to(dtype), f"{stem}.{ends[1]}.weight": up.to(dtype)}
    save_file(tensors, path)
    return path


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
