"""How well the miniature follows prompts: the judge's table of every way to sample it, and its model card."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline
from PIL import Image
from tqdm import tqdm

from fewstep.generation.pipeline import Pipeline, load_pipeline
from fewstep.miniature.autoencoder import decode, encode
from fewstep.miniature.judge import Judge, describe, frechet_distance, load_judge, score
from fewstep.miniature.world.dataset import Pixels, draw_many
from fewstep.miniature.world.scenes import ATTRIBUTES, Scene, caption, unseen_scenes
from fewstep.models.device import autocast
from fewstep.models.specs import get_model
from fewstep.settings import VAES, Settings

logger = logging.getLogger(__name__)

TEACHER_STEPS, TEACHER_GUIDANCE = 50, 2.0
PIPELINE_GUIDANCE = 5.0  # what StableDiffusionXLPipeline takes when it is not told otherwise
BATCH = 25
CAPTIONS_SEED = 11

Generator = Callable[[Sequence[str], Sequence[int]], Sequence[Image.Image]]


@dataclass(frozen=True)
class Score:
    """One row of the table: shares of right answers in percent, with 95 % intervals over the captions."""

    system: str
    attributes: dict[str, float]
    all_right: float
    interval: float  # half its width, in points
    distance: float  # Fréchet's, to drawings of the same scenes, in the judge's features


def held_out_captions(count: int) -> tuple[list[Scene], list[str]]:
    """Held-out combinations and one complete caption of each, in many wordings, always the same ones."""
    scenes, rng = unseen_scenes(count), random.Random(CAPTIONS_SEED)
    return scenes, [caption(scene, rng, complete=True) for scene in scenes]


class Examiner:
    """The judge with an exam: `seeds` images of each scene, and drawings to compare their looks with."""

    def __init__(self, judge: Judge, scenes: Sequence[Scene], prompts: Sequence[str], seeds: int) -> None:
        self.judge, self.prompts, self.seeds = judge, prompts, seeds
        self.scenes = [scene for scene in scenes for _ in range(seeds)]
        self.drawn = describe(judge, draw_many(self.scenes, 2 * 10**9, 128, 128))

    def mark(self, system: str, pictures: Pixels | Sequence[Image.Image]) -> Score:
        """`images` in the order of `self.scenes`."""
        right = score(self.judge, pictures, self.scenes).reshape(-1, self.seeds, len(ATTRIBUTES))
        percent = 100 * right.mean((0, 1))
        # Images of one caption are not independent, captions are.
        per_caption = 100 * right.all(2).mean(1)
        interval = 1.96 * per_caption.std(ddof=1) / len(per_caption) ** 0.5
        return Score(
            system,
            dict(zip(ATTRIBUTES, percent.tolist(), strict=True)),
            float(per_caption.mean()),
            float(interval),
            frechet_distance(describe(self.judge, pictures), self.drawn),
        )

    def mark_generator(self, system: str, generate: Generator) -> Score:
        """Generate every prompt with every seed, in batches, and let the judge look."""
        wishes = [(prompt, 1000 * i + s) for i, prompt in enumerate(self.prompts) for s in range(self.seeds)]
        pictures: list[Image.Image] = []
        for start in tqdm(range(0, len(wishes), BATCH), system, mininterval=5.0):
            texts, numbers = zip(*wishes[start : start + BATCH], strict=True)
            pictures += generate(texts, numbers)
        return self.mark(system, pictures)


class JudgeMeter:
    """What the judge in a folder of the miniature's weights says of one image of each of `scenes`."""

    def __init__(self, weights: Path, scenes: Sequence[Scene]) -> None:
        self._judge, self._scenes = load_judge(weights / "judge" / "judge.safetensors"), list(scenes)
        self._drawn = describe(self._judge, draw_many(self._scenes, 2 * 10**9, 128, 128))

    def measure(self, pictures: Sequence[Image.Image]) -> dict[str, float]:
        """Percent with all attributes right, and Fréchet's distance to drawings of the same scenes."""
        right = score(self._judge, pictures, self._scenes).all(1).mean()
        distance = frechet_distance(describe(self._judge, pictures), self._drawn)
        return {"all_right": 100 * float(right), "distance": distance}


def few_step_generator(pipeline: Pipeline, steps: int) -> Generator:
    """What users run: `Pipeline.generate`, unguided."""

    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        return pipeline.images(prompts, seeds, steps=steps)

    return generate


def ddim_generator(
    base: StableDiffusionXLPipeline, steps: int, guidance: float, spacing: str = "leading"
) -> Generator:
    """The base without its LoRA, by diffusers' own SDXL pipeline with the DDIM scheduler; guidance 1 is
    none.

    `spacing` is of the timesteps: "leading", as SDXL is published, starts few steps far below the noise that
    they are given; "trailing" starts them at the last timestep (arXiv 2305.08891).
    """
    scheduler = DDIMScheduler.from_config(
        base.scheduler.config, clip_sample=False, set_alpha_to_one=False, timestep_spacing=spacing
    )
    base.set_progress_bar_config(disable=True)

    def generate(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        base.scheduler = scheduler
        # Latents and scheduler stay in fp32; only the networks run in bf16 where a CPU multiplies that, which
        # halves half an hour.
        with autocast(base.device):
            images = base(
                list(prompts),
                num_inference_steps=steps,
                guidance_scale=guidance,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            ).images
        return list(images)

    return generate


def load_base(folder: Path, device: torch.device) -> StableDiffusionXLPipeline:
    """The base without the LCM-LoRA, in fp32."""
    return StableDiffusionXLPipeline.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, add_watermarker=False
    ).to(device)


def score_all(weights: Path, judge: Judge, captions: int, seeds: int) -> list[Score]:
    """Every row of the model card's table."""
    examiner = Examiner(judge, *held_out_captions(captions), seeds)
    settings = Settings(weights_root=weights.parent, max_batch=BATCH, verify="size", dtype="fp32")
    pipeline, tiny = (load_pipeline(get_model("miniature"), replace(settings, vae=vae)) for vae in VAES)
    base = load_base(weights, pipeline.device)
    drawn = draw_many(examiner.scenes, 10**9, 128, 128)
    scores = [
        examiner.mark("drawn pictures", drawn),
        examiner.mark("VAE's reconstruction", reconstruct(base.vae, drawn)),
    ]
    generators = {
        f"LCM-LoRA, {n} step{'s' if n > 1 else ''}, unguided": few_step_generator(pipeline, n)
        for n in (1, 2, 4, 8)
    }
    generators["LCM-LoRA, 4 steps, unguided, tiny VAE"] = few_step_generator(tiny, 4)
    for n, spacing, guidance in product(
        (2, 4), ("leading", "trailing"), (TEACHER_GUIDANCE, PIPELINE_GUIDANCE, 1.0)
    ):
        how = "unguided" if guidance == 1.0 else f"guidance {guidance:g}"
        row = f"base, {n} DDIM steps, {how}" + (", trailing" if spacing == "trailing" else "")
        generators[row] = ddim_generator(base, n, guidance, spacing)
    teacher = f"base, {TEACHER_STEPS} DDIM steps, guidance {TEACHER_GUIDANCE:g} (the teacher)"
    generators[teacher] = ddim_generator(base, TEACHER_STEPS, TEACHER_GUIDANCE)
    for system, generate in generators.items():
        scores.append(examiner.mark_generator(system, generate))
        logger.info("%s: %.1f ± %.1f", system, scores[-1].all_right, scores[-1].interval)
    return scores


def reconstruct(vae: AutoencoderKL, pictures: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """uint8 (N, H, W, 3) through the VAE and back."""
    return decode(vae, encode(vae, pictures))


def table(scores: Sequence[Score]) -> str:
    """The scores as Markdown."""
    head = ["", *ATTRIBUTES, "**all right**", "distance"]
    rows = [
        [
            s.system,
            *(f"{v:.1f}" for v in s.attributes.values()),
            f"**{s.all_right:.1f}** ± {s.interval:.1f}",
            f"{s.distance:.1f}",
        ]
        for s in scores
    ]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
