"""Images of prompts, by every way to sample a model: our own pipeline's, and diffusers' as the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from diffusers import DDIMScheduler, LCMScheduler
from PIL import Image
from tqdm import tqdm

from fewstep.generation.pipeline import Pipeline
from fewstep.generation.reference import BATCH, generate_images
from fewstep.models.load import Diffusion

SEED = 1000

# An image of each prompt, each with its own seed.
Generate: TypeAlias = Callable[[Sequence[str], Sequence[int]], list[Image.Image]]


@dataclass(frozen=True)
class Sampler:
    """A way to generate with diffusers' own pipeline: a loaded one, the scheduler and the guidance."""

    name: str
    diffusion: Diffusion
    guidance: float
    scheduler: Any = None  # the pipeline's own

    def generate(
        self, prompts: Sequence[str], seeds: Sequence[int] | None = None, *, steps: int
    ) -> list[Image.Image]:
        """Generate one image of each of `prompts`, with the same seeds every time unless they are given."""
        seeds = range(SEED, SEED + len(prompts)) if seeds is None else seeds
        how: dict[str, Any] = {"steps": steps, "guidance": self.guidance, "scheduler": self.scheduler}
        return list(generate_images(self.diffusion, prompts, seeds, **how, progress=f"{self.name}, {steps}"))


def ddim(diffusion: Diffusion, guidance: float, spacing: str | None = None) -> Sampler:
    """Return the DDIM sampler of a base; guidance 1 is none."""
    options = {"clip_sample": False, "set_alpha_to_one": False}
    return spaced("DDIM", DDIMScheduler, diffusion, guidance, spacing, **options)


def spaced(
    name: str, scheduler: Any, diffusion: Diffusion, guidance: float, spacing: str | None, **options: Any
) -> Sampler:
    """Return the sampler of a base with a class of schedulers.

    `spacing` is of the timesteps, the base's own if None: "leading", as SDXL is published, starts few steps
    far below the noise that they are given; "trailing" starts at the last timestep (arXiv 2305.08891).
    """
    if spacing:
        name, options = f"{name}, {spacing}", {**options, "timestep_spacing": spacing}
    return Sampler(name, diffusion, guidance, scheduler.from_config(diffusion.scheduler.config, **options))


def lcm_lora(diffusion: Diffusion, lora: Path | None) -> Sampler:
    """Fuse an LCM-LoRA into a base, if there is one, and return the sampler of both."""
    if lora:
        fuse_lora(diffusion, lora)
    return Sampler("LCM-LoRA", diffusion, 1.0, LCMScheduler.from_config(diffusion.scheduler.config))


def fuse_lora(diffusion: Any, lora: Path, scale: float = 1.0) -> None:
    """Add the LoRA in a file to the weights, for good."""
    diffusion.load_lora_weights(lora.parent, weight_name=lora.name)
    diffusion.fuse_lora(lora_scale=scale)
    diffusion.unload_lora_weights()


def few_steps(pipeline: Pipeline, steps: int, progress: str | None = None, **inputs: Any) -> Generate:
    """Return what users run: `Pipeline.images` with other inputs of a request, in batches."""

    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        images: list[Image.Image] = []
        starts = range(0, len(prompts), BATCH)
        for start in tqdm(starts, progress, mininterval=5.0, disable=progress is None):
            part = slice(start, start + BATCH)
            images += pipeline.images(prompts[part], seeds[part], steps=steps, **inputs)
        return images

    return generate
