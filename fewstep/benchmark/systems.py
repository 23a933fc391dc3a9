"""What is compared: fewstep, diffusers as its documentation has it, and what few-step containers set.

Each loads the weights that `save_model` wrote.
"""

from __future__ import annotations

import gc
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline
from PIL import Image

from fewstep.errors import FewstepError
from fewstep.models import get_model
from fewstep.openvino_engine import OpenVinoEngine
from fewstep.pipeline import load_pipeline
from fewstep.placement import name_of
from fewstep.request import Request
from fewstep.settings import Settings
from fewstep.sources import LCM_LORA
from fewstep.text_encoding import Diffusion

PROMPT = "a red house in a meadow with mountains at sunset, in the middle"


@dataclass(frozen=True)
class Wish:
    """A square picture, or `batch` of them at once."""

    size: int
    steps: int = 4
    guidance: float = 1.0
    batch: int = 1


@dataclass(frozen=True)
class System:
    """A loaded model: `paint(wish, seed)` gives the pictures, whose prompts no cache has seen."""

    diffusion: Diffusion
    dtype: str
    paint: Callable[[Wish, int], list[Image.Image]]
    engine: OpenVinoEngine | None = None


Load: TypeAlias = Callable[[str, Path, int], System]  # a model, where its weights are, a size in px


def fewstep(model: str, weights: Path, size: int, dtype: str = "auto", engine: str = "torch") -> System:
    """`Pipeline.generate`, as the container runs it but for the encoding of files."""
    spec = get_model(model)
    settings = Settings(
        model=model,
        weights_root=weights,
        dtype=dtype,
        engine=engine,
        openvino_size=(size, size),
        verify="size",
        safety="off",
    )
    pipeline = load_pipeline(spec, settings)

    def paint(wish: Wish, seed: int) -> list[Image.Image]:
        requests = [
            Request.create(
                spec,
                prompt=f"{PROMPT} {seed + i}",
                seed=seed + i,
                steps=wish.steps,
                guidance=wish.guidance,
                aspect_ratio="custom",
                width=wish.size,
                height=wish.size,
            )
            for i in range(wish.batch)
        ]
        images: list[Image.Image] = []
        for painting in pipeline.generate(requests):
            if isinstance(painting, FewstepError):
                raise painting
            images += painting.images
        return images

    return System(pipeline.diffusion, name_of(pipeline.dtype), paint, pipeline.engine)


def diffusers(model: str, weights: Path, size: int, dtype: torch.dtype = torch.float32) -> System:
    """`StableDiffusionXLPipeline` with `load_lora_weights`, `fuse_lora` and `LCMScheduler`."""
    folder = weights / model
    pipe = StableDiffusionXLPipeline.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, local_files_only=True, add_watermarker=False
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.load_lora_weights(folder, weight_name=LCM_LORA)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    return System(pipe, name_of(dtype), lambda wish, seed: _call(pipe, wish, seed))


def reference(model: str, weights: Path, size: int) -> System:
    """What the few-step container does that is copied most: slices, tiles and an fp32 VAE against a lack of
    memory, channels_last, fused QKV, emptied caches and a PNG with every picture."""
    system = diffusers(model, weights, size)
    pipe: Any = system.diffusion
    pipe.enable_attention_slicing()
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    pipe.vae.to(torch.float32)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.fuse_qkv_projections()

    def paint(wish: Wish, seed: int) -> list[Image.Image]:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        images = _call(pipe, wish, seed)
        for image in images:
            image.save(io.BytesIO(), "png")
        return images

    return System(pipe, system.dtype, paint)


def _call(pipe: Any, wish: Wish, seed: int) -> list[Image.Image]:
    images: list[Image.Image] = pipe(
        [f"{PROMPT} {seed + i}" for i in range(wish.batch)],
        num_inference_steps=wish.steps,
        guidance_scale=wish.guidance,
        width=wish.size,
        height=wish.size,
        generator=[torch.Generator().manual_seed(seed + i) for i in range(wish.batch)],
    ).images
    return images


SYSTEMS: dict[str, Load] = {
    "fewstep": fewstep,
    "fewstep-openvino": partial(fewstep, engine="openvino"),
    "fewstep-openvino-int8": partial(fewstep, engine="openvino-int8"),
    "fewstep-fp32": partial(fewstep, dtype="fp32"),
    "diffusers": diffusers,
    "diffusers-bf16": partial(diffusers, dtype=torch.bfloat16),
    "reference": reference,
}
