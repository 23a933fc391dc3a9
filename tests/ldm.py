"""A diffusers folder as one checkpoint in the layout of the original releases: what people train and share.

The names are those of the CompVis (SD) and Stability (SDXL) code; diffusers' own converter reads them back.
"""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]


def _pairs(table: str) -> list[tuple[str, ...]]:
    return [tuple(pair.split("=")) for pair in table.split()]


# Diffusers' name, and the original's.
RESNET = _pairs("""norm1=in_layers.0 conv1=in_layers.2 time_emb_proj=emb_layers.1 norm2=out_layers.0
conv2=out_layers.3 conv_shortcut=skip_connection""")
ENDS = _pairs("""time_embedding.linear_1=time_embed.0 time_embedding.linear_2=time_embed.2
add_embedding.linear_1=label_emb.0.0 add_embedding.linear_2=label_emb.0.2
conv_norm_out=out.0 conv_out=out.2 conv_in=input_blocks.0.0""")
VAE = _pairs("""mid_block.attentions.0.group_norm=mid.attn_1.norm mid_block.attentions.0.to_q=mid.attn_1.q
mid_block.attentions.0.to_k=mid.attn_1.k mid_block.attentions.0.to_v=mid.attn_1.v
mid_block.attentions.0.to_out.0=mid.attn_1.proj_out mid_block.resnets.0=mid.block_1
mid_block.resnets.1=mid.block_2 downsamplers.0=downsample upsamplers.0=upsample resnets=block down_blocks=down
conv_shortcut=nin_shortcut conv_norm_out=norm_out""")
OPEN_CLIP = _pairs("""text_model.embeddings.token_embedding.weight=token_embedding.weight
text_model.embeddings.position_embedding.weight=positional_embedding text_model.final_layer_norm=ln_final
text_model.encoder.layers=transformer.resblocks layer_norm1=ln_1 layer_norm2=ln_2
mlp.fc1=mlp.c_fc mlp.fc2=mlp.c_proj self_attn.out_proj=attn.out_proj""")


def save_checkpoint(folder: Path, path: Path) -> Path:
    """Write UNet, VAE and text encoders of `folder` into one safetensors file."""
    state = {f"model.diffusion_model.{key}": value for key, value in _unet(folder / "unet").items()}
    state |= {f"first_stage_model.{key}": value for key, value in _vae(folder / "vae").items()}
    first = _weights(folder / "text_encoder")
    if (folder / "text_encoder_2").exists():
        state |= {f"conditioner.embedders.0.transformer.{key}": value for key, value in first.items()}
        second = _open_clip(_weights(folder / "text_encoder_2"))
        state |= {f"conditioner.embedders.1.model.{key}": value for key, value in second.items()}
    else:
        state |= {f"cond_stage_model.transformer.{key}": value for key, value in first.items()}
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return path


def _weights(folder: Path) -> State:
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def _renamed(key: str, pairs: list[tuple[str, ...]]) -> str:
    for ours, theirs in pairs:
        key = key.replace(ours, theirs)
    return key


def _unet(folder: Path) -> State:
    layers = json.loads((folder / "config.json").read_text())["layers_per_block"]
    return rename_unet(_weights(folder), layers)


def rename_unet(state: State, layers: int) -> State:
    """Diffusers' keys as LDM's, for a UNet of `layers` layers a block."""
    attended = {int(match[1]) for key in state if (match := re.match(r"up_blocks\.(\d+)\.attentions", key))}

    def place(key: str) -> str:
        if not key.startswith(("down_blocks", "mid_block", "up_blocks")):
            return _renamed(key, ENDS)
        if key.startswith("mid_block"):
            for ours, theirs in (("resnets.0", "0"), ("attentions.0", "1"), ("resnets.1", "2")):
                key = key.replace(f"mid_block.{ours}", f"middle_block.{theirs}")
            return key if ".1." in key[:16] else _renamed(key, RESNET)
        side, block, kind, index, rest = re.match(r"(\w+)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.*)", key).groups()
        first = int(block) * (layers + 1)
        if kind == "downsamplers":
            return f"input_blocks.{first + layers + 1}.0.op.{rest.removeprefix('conv.')}"
        if kind == "upsamplers":
            return f"output_blocks.{first + layers}.{2 if int(block) in attended else 1}.{rest}"
        row = first + int(index) + (1 if side == "down" else 0)
        name = f"{'input' if side == 'down' else 'output'}_blocks.{row}"
        return f"{name}.0.{_renamed(rest, RESNET)}" if kind == "resnets" else f"{name}.1.{rest}"

    return {place(key): value for key, value in state.items()}


def _vae(folder: Path) -> State:
    state = _weights(folder)
    down = (re.match(r"encoder\.down_blocks\.(\d+)", key) for key in state)
    blocks = 1 + max(int(match[1]) for match in down if match)
    found = {}
    for key, value in state.items():
        name = _renamed(key, VAE)
        name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up.{blocks - 1 - int(match[1])}", name)
        projection = "attn_1" in name and value.ndim == 2
        found[name] = value[:, :, None, None] if projection else value  # once 1 x 1 convolutions
    return found


def _open_clip(state: State) -> State:
    found = {
        _renamed(key, OPEN_CLIP): value
        for key, value in state.items()
        if ".self_attn.o" in key or "attn" not in key
    }
    found["text_projection"] = found.pop("text_projection.weight").T
    for layer in {match[1] for key in state if (match := re.search(r"layers\.(\d+)\.", key))}:
        for kind in ("weight", "bias"):
            parts = [state[f"text_model.encoder.layers.{layer}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            found[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
    return found
