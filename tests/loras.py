"""Adapters as different tools write them, of the miniature: its own LCM-LoRA, and made-up styles."""

import json
import re

import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from ldm import rename_unet
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fewstep.lora.merge import NETWORKS, WeightMerger
from fewstep.lora.types import Mix
from fewstep.settings import Settings

FOLDER = Settings().weights_root / "miniature"
LORA = FOLDER / "lcm_lora.safetensors"
ALPHA = 8.0
LAYERS = 169  # of the UNet that it changes
MODULE = re.compile(r"unet\.(.*)\.lora_([AB])\.weight")
UNFIT = "modules that do not fit this model"


def load_unet(dtype=torch.float32):
    return UNet2DConditionModel.from_pretrained(
        FOLDER, subfolder="unet", torch_dtype=dtype, use_safetensors=True, local_files_only=True
    )


def load_model():
    return StableDiffusionXLPipeline.from_pretrained(
        FOLDER, dtype=torch.float32, use_safetensors=True, local_files_only=True, add_watermarker=False
    )


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


def weights(model):
    states = {name: getattr(model, name).state_dict() for name in NETWORKS["sdxl"]}
    return {f"{name}.{key}": value.clone() for name, part in states.items() for key, value in part.items()}


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
