"""Prior preservation: while it learns a few images, a model rehearses what it generated before.

DreamBooth's prior preservation (arXiv 2208.12242) trains on a model's own images, too. Here its own answers
are kept (Learning without Forgetting, arXiv 1606.09282): on noisy versions of those images, the network
with its LoRA is to say what it says without.
"""

from __future__ import annotations

import logging
import random
import tomllib
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import LCMScheduler, UNet2DConditionModel
from PIL import Image
from torch import Tensor

from fewstep.generation.reference import generate_images
from fewstep.models.load import Diffusion
from fewstep.training import consistency as cm
from fewstep.training.data import write_captioned
from fewstep.training.distill import NextBatch, add_noise, predict, predict_without_lora
from fewstep.training.trainer import Loss, Shard, StepRandom

logger = logging.getLogger(__name__)

PROMPTS = Path(__file__).with_name("prior_prompts.toml")
FEW_STEPS = 4
FULL_LCM_GUIDANCE = 8.0  # what LCM_Dreamshaper_v7 is published with


def varied_prompts(count: int) -> list[str]:
    """Return `count` prompts of many kinds, always the same, for a model of photographs and paintings."""
    rng = random.Random(17)
    words = tomllib.loads(PROMPTS.read_text(encoding="utf-8"))
    every = [" ".join(each) for each in product(words["media"], words["subjects"], words["places"])]
    return [text for _ in range(0, count, len(every)) for text in rng.sample(every, len(every))][:count]


def generate_prior_images(folder: Path, prompts: Sequence[str], diffusion: Diffusion) -> None:
    """Write an image of each of `prompts` into `folder`, with captions in metadata.jsonl, by `diffusion`,
    which generates in few steps; once, so that a run that goes on sees the same ones."""
    guidance = FULL_LCM_GUIDANCE if diffusion.unet.config.time_cond_proj_dim else 1.0
    seeds, scheduler = range(len(prompts)), LCMScheduler.from_config(diffusion.scheduler.config)

    def images() -> Iterator[Image.Image]:
        logger.info("generating %d images to rehearse", len(prompts))
        return generate_images(  # one at a time: a training leaves little memory
            diffusion, prompts, seeds, steps=FEW_STEPS, guidance=guidance, scheduler=scheduler, batch=1
        )

    write_captioned(folder, prompts, images)


def prior_loss(
    unet: UNet2DConditionModel,
    next_batch: NextBatch,
    noise_schedule: cm.NoiseSchedule,
    guidance: tuple[float, float],
    seed: int,
) -> Loss:
    """Return what `optimise` minimises for `unet` to go on saying what it says without its LoRA: the mean
    squared error between both outputs, at timesteps spread evenly over the schedule.

    A full LCM takes a w drawn uniformly from `guidance`.
    """

    def loss(step: int, share: Shard) -> Tensor:
        batch, draws = next_batch(step, share), StepRandom(seed, step, share)
        t, z_t, _ = add_noise(batch, noise_schedule, draws)
        w = draws.uniform(len(t), *guidance).to(t.device)
        with torch.no_grad():
            before = predict_without_lora(unet, z_t, t, batch, w)
        return F.mse_loss(predict(unet, z_t, t, batch, w), before)

    return loss


def in_turns(new: Loss, prior: Loss) -> Loss:
    """Return a loss of which every other step is for the prior."""
    return lambda step, share: (new, prior)[step % 2](step // 2, share)
