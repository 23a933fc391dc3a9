"""The real models' shapes with random weights: to load, fuse, run and time at full size on any machine.

    make_random("sdxl", weights_root)

What is made stands in for a download, file by file: `save_model` and `load_pipeline` do with it what they do
with the real weights. The images are noise.
"""

from __future__ import annotations

import shutil
import tomllib
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

SHAPES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
UNETS, VAE, CLIP_L, BIG_G = (SHAPES[name] for name in ("unets", "vae", "clip_l", "big_g"))
for name, base in (("ssd-1b", "sdxl"), ("lcm-dreamshaper-v7", "sd15")):
    UNETS[name] = UNETS[base] | UNETS[name]


def make_random(name: str, weights_root: Path, device: str | torch.device = "cpu") -> Path:
    """Write `weights/<name>-random/`, in fp16, and return it; the miniature lends its tokenizer.

    The numbers are drawn on `device`, each kind of which has its own: SDXL's 3.4 billion take a CPU a minute.
    """
    spec = get_model(f"{name}-random")
    folder = weights_root / f".{name}-random"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    folder.mkdir(parents=True)
    try:
        _make_parts(name, spec, folder, torch.Generator(device).manual_seed(0))
        files = []
        for repo in get_model(name).sources:
            made = replace(repo, name="fewstep", revision="random", licence="none")
            for file in repo.files:
                if (path := folder / file.place).exists():  # all but the safety checker
                    files.append(Download(made, file, path, Expected(0, "", "")))
        return save_model(spec, files, weights_root)
    finally:
        shutil.rmtree(folder)


def make_random_style(name: str, path: Path, device: str | torch.device = "cpu") -> None:
    """Write a style LoRA for the model `name` that changes as many layers as its LCM-LoRA, at its rank."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[name])
    save_file(_random_lora(unet, torch.Generator(device).manual_seed(1)), path, metadata={"format": "pt"})


def _make_parts(name: str, spec: ModelSpec, folder: Path, generator: torch.Generator) -> None:
    is_sdxl = spec.family == "sdxl"
    clips = [("text_encoder", CLIPTextModel, CLIP_L), ("text_encoder_2", CLIPTextModelWithProjection, BIG_G)]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNETS[name])
        parts = {"vae": AutoencoderKL(**VAE, scaling_factor=0.13025 if is_sdxl else 0.18215)}
        for part, kind, sizes in clips if is_sdxl else clips[:1]:
            parts[part] = kind(CLIPTextConfig(projection_dim=sizes["hidden_size"], **sizes))
        parts[TINY_VAE] = AutoencoderTiny()  # the published ones have its usual shape
    _save(unet, folder / "unet", generator)
    if spec.lcm_lora:
        save_file(_random_lora(unet, generator), folder / LCM_LORA, metadata={"format": "pt"})
    for part, module in parts.items():
        _save(module, folder / part, generator)
        if part.startswith("text_encoder"):
            tokenizer = Settings().weights_root / "miniature" / "tokenizer"
            shutil.copytree(tokenizer, folder / part.replace("text_encoder", "tokenizer"))
    EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    ).save_config(folder / "scheduler")


def _save(module: Any, folder: Path, generator: torch.Generator) -> None:
    folder.mkdir()
    is_clip = isinstance(module.config, CLIPTextConfig)
    (folder / "config.json").write_text((module.config if is_clip else module).to_json_string())
    # The published files have the names that all CLIP models had before transformers 5.
    prefix = "text_model." if isinstance(module, CLIPTextModel) else ""
    tensors = {prefix + key: _random(key, value.shape, generator) for key, value in module.named_parameters()}
    stem = "model" if is_clip else "diffusion_pytorch_model"
    save_file(tensors, folder / f"{stem}.safetensors", metadata={"format": "pt"})


def _random(key: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Return weights, on the CPU, that keep the variance of what passes through, so that nothing overflows in
    fp16."""
    if len(shape) < 2:
        return torch.ones(shape, dtype=torch.float16) if key.endswith("weight") else torch.zeros(shape).half()
    scale = 0.02 if "embedding" in key else 0.5 * shape[1:].numel() ** -0.5
    return torch.randn(shape, generator=generator, device=generator.device).mul_(scale).half().cpu()


def _random_lora(unet: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Return Kohya's keys with diffusers' names, all F16, as latent-consistency/lcm-lora-sdxl has them."""
    tensors = {}
    for path, module in unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and path.endswith(LORA_TARGETS):
            name, (rows, *rest) = "lora_unet_" + path.replace(".", "_"), module.weight.shape
            up = torch.Size((rows, RANK, *(1 for _ in rest[1:])))
            tensors[f"{name}.lora_down.weight"] = _random("down", torch.Size((RANK, *rest)), generator)
            tensors[f"{name}.lora_up.weight"] = _random("up", up, generator).mul_(0.02)
            tensors[f"{name}.alpha"] = torch.tensor(ALPHA, dtype=torch.float16)
    return tensors
