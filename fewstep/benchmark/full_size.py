"""The real models' shapes with random weights: to load, fuse, run and time at full size on any machine.

    make_random("sdxl", weights_root)

What is made stands in for a download, file by file: `save_model` and `load_pipeline` do with it what they do
with the real weights. The images are noise.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, EulerDiscreteScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from fewstep.models.hub import Download, Expected
from fewstep.models.save import save_model
from fewstep.models.sources import LCM_LORA, TINY_VAE
from fewstep.models.specs import ModelSpec, get_model
from fewstep.settings import Settings
from fewstep.training.distill import LORA_TARGETS

# The published LCM-LoRAs: rank 64 with alpha 8, so that B A counts an eighth.
RANK, ALPHA = 64, 8.0

SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
UNETS: dict[str, dict[str, Any]] = {
    "sdxl": SDXL_UNET,
    # Distilled block by block out of SDXL: fewer transformers, and one resnet in the middle.
    "ssd-1b": {
        **SDXL_UNET,
        "transformer_layers_per_block": (1, (2, 2), (4, 4)),
        "reverse_transformer_layers_per_block": ((4, 4, 10), (2, 1, 1), 1),
        "mid_block_type": "UNetMidBlock2D",
    },
    "sd15": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
    },
}
UNETS["lcm-dreamshaper-v7"] = {**UNETS["sd15"], "time_cond_proj_dim": 256}
VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "sample_size": 512,
}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
BIG_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
}


def make_random(name: str, weights_root: Path) -> Path:
    """Write `weights/<name>-random/`, in fp16, and return it; the miniature lends its tokenizer."""
    spec = get_model(f"{name}-random")
    tokenizer = Settings().weights_root / "miniature" / "tokenizer"
    with _temporary(weights_root / f".{name}-random") as folder:
        _make_parts(name, spec, tokenizer, folder)
        files = [
            Download(
                replace(repo, name="fewstep", revision="random", licence="none"),
                file,
                folder / file.place,
                Expected(0, "", "", pinned=False),
            )
            for repo in get_model(name).sources
            for file in repo.files
            if (folder / file.place).exists()  # all but the safety checker
        ]
        return save_model(spec, files, weights_root)


@contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _make_parts(name: str, spec: ModelSpec, tokenizer: Path, folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[name])
    _save(unet, folder / "unet", "diffusion_pytorch_model", generator)
    if spec.lcm_lora:
        save_file(_random_lora(unet, generator), folder / LCM_LORA, metadata={"format": "pt"})
    del unet
    with torch.device("meta"):
        vae = AutoencoderKL(**VAE, scaling_factor=0.13025 if spec.family == "sdxl" else 0.18215)
    _save(vae, folder / "vae", "diffusion_pytorch_model", generator)
    encoders: dict[str, tuple[type[Any], dict[str, Any]]] = {"text_encoder": (CLIPTextModel, CLIP_L)}
    if spec.family == "sdxl":
        encoders["text_encoder_2"] = (CLIPTextModelWithProjection, BIG_G)
    for part, (kind, sizes) in encoders.items():
        config = CLIPTextConfig(vocab_size=49408, projection_dim=sizes["hidden_size"], **sizes)
        with torch.device("meta"):
            encoder = kind(config)
        _save(encoder, folder / part, "model", generator)
        shutil.copytree(tokenizer, folder / part.replace("text_encoder", "tokenizer"))
    with torch.device("meta"):
        tiny = AutoencoderTiny()  # the published ones have its usual shape
    _save(tiny, folder / TINY_VAE, "diffusion_pytorch_model", generator)
    EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    ).save_config(folder / "scheduler")


def _save(module: nn.Module, folder: Path, stem: str, generator: torch.Generator) -> None:
    folder.mkdir()
    config = module.config
    text = config.to_json_string() if isinstance(config, CLIPTextConfig) else module.to_json_string()  # type: ignore[operator]
    (folder / "config.json").write_text(json.dumps(json.loads(text), indent=2) + "\n")
    # The published files have the names that all CLIP models had before transformers 5.
    prefix = "text_model." if isinstance(module, CLIPTextModel) else ""
    tensors = {prefix + key: _random(key, value.shape, generator) for key, value in module.named_parameters()}
    save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})


def _random(key: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Return weights that keep the variance of what passes through, so that nothing overflows in fp16."""
    if len(shape) < 2:
        return torch.ones(shape, dtype=torch.float16) if key.endswith("weight") else torch.zeros(shape).half()
    scale = 0.02 if "embedding" in key else 0.5 * shape[1:].numel() ** -0.5
    return torch.randn(shape, generator=generator).mul_(scale).half()


def _random_lora(unet: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Return Kohya's keys with diffusers' names and F16 throughout, as latent-consistency/lcm-lora-sdxl has
    them."""
    tensors = {}
    for path, module in unet.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d) or not path.endswith(LORA_TARGETS):
            continue
        name = "lora_unet_" + path.replace(".", "_")
        rest = module.weight.shape[1:]
        up = (module.weight.shape[0], RANK, *(1 for _ in rest[1:]))
        tensors[f"{name}.lora_down.weight"] = _random("down", torch.Size((RANK, *rest)), generator)
        tensors[f"{name}.lora_up.weight"] = _random("up", torch.Size(up), generator).mul_(0.02)
        tensors[f"{name}.alpha"] = torch.tensor(ALPHA, dtype=torch.float16)
    return tensors
