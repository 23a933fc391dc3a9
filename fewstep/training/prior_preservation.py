"""Against forgetting: while a few images are learnt, a model rehearses what it generated before.

DreamBooth's prior preservation (arXiv 2208.12242) trains on a model's own images, too. Here its own answers
are kept (Learning without Forgetting, arXiv 1606.09282): on noisy versions of those images, the network
with its LoRA is to say what it says without.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor

from fewstep.miniature.world.dataset import pick_scenes
from fewstep.miniature.world.scenes import caption, training_scenes
from fewstep.models.load import Diffusion
from fewstep.training import consistency as cm
from fewstep.training.datasets import METADATA
from fewstep.training.distill import NextBatch, predict, predict_without_lora
from fewstep.training.samples import generate
from fewstep.training.trainer import Loss, Shard, StepRandom

logger = logging.getLogger(__name__)

FULL_LCM_GUIDANCE = 8.0  # what LCM_Dreamshaper_v7 is published with

# Far apart rather than many: what lies between is kept with them.
_MEDIA = ("a photo of", "an oil painting of", "a watercolour of", "a pencil drawing of", "a film still of")
_SUBJECTS = (
    *("a woman", "an old man", "two children", "a crowd", "a knight", "a robot", "a dancer", "a face"),
    *("a dog", "a cat", "a horse", "a bird", "a fish", "an insect", "a dragon", "an elephant"),
    *("a house", "a castle", "a bridge", "a tower", "a car", "a ship", "a train", "a bicycle"),
    *("a tree", "flowers", "a bowl of fruit", "a cake", "a teapot", "a chair", "a guitar", "an open book"),
)
_PLACES = (
    *("in a kitchen", "in a library", "in a city street", "in a desert", "in a forest", "under water"),
    *("on a beach", "on a mountain", "on a wooden table", "in the snow", "in the rain", "at night"),
    *("at sunset", "in fog", "in a garden", "before a plain wall"),
)


def prompts_of(model: str, count: int) -> list[str]:
    """`count` prompts of many kinds, always the same, for `model`."""
    rng = random.Random(17)
    if model == "miniature":
        return [caption(scene, rng) for scene in pick_scenes(training_scenes(), count, seed=17)]
    every = [" ".join(words) for words in product(_MEDIA, _SUBJECTS, _PLACES)]
    return [text for _ in range(0, count, len(every)) for text in rng.sample(every, len(every))][:count]


def generate_prior_images(folder: Path, prompts: Sequence[str], diffusion: Diffusion) -> None:
    """An image of each of `prompts` in `folder`, with captions in metadata.jsonl, by `diffusion`, which
    generates in few steps; kept, so that a run that goes on sees the same ones."""
    listed = folder / METADATA
    rows = [{"file_name": f"{i:05}.png", "text": text} for i, text in enumerate(prompts)]
    wanted = "".join(f"{json.dumps(row)}\n" for row in rows)
    if listed.exists() and listed.read_text(encoding="utf-8") == wanted:
        return
    logger.info("painting %d pictures to rehearse", len(prompts))
    guidance = FULL_LCM_GUIDANCE if diffusion.unet.config.time_cond_proj_dim else 1.0
    folder.mkdir(parents=True, exist_ok=True)
    for row, image in zip(rows, generate(diffusion, diffusion.unet, prompts, guidance=guidance), strict=True):
        image.save(folder / row["file_name"])
    part = listed.with_suffix(".part")
    part.write_text(wanted, encoding="utf-8")
    part.replace(listed)


def keeping_training(
    unet: UNet2DConditionModel,
    next_batch: NextBatch,
    noise_schedule: cm.NoiseSchedule,
    guidance: tuple[float, float],
    seed: int,
) -> Loss:
    """What `optimise` minimises for `unet` to go on saying what it says without its LoRA: the mean squared
    error between both outputs, at timesteps spread evenly over the schedule.

    A full LCM is told a w drawn uniformly from `guidance`.
    """
    low, high = guidance

    def loss(step: int, share: Shard) -> Tensor:
        batch, draws = next_batch(step, share), StepRandom(seed, step, share)
        count, device = len(batch.latents), batch.latents.device
        t = (draws.stratified(count) * len(noise_schedule.alphas_cumprod)).long().to(device)
        noise = draws.normal(*batch.latents.shape).to(device)
        w = (draws.uniform(count) * (high - low) + low).to(device)
        alpha, sigma = noise_schedule.signal_and_noise(t, noise)
        z_t = alpha * batch.latents + sigma * noise
        with torch.no_grad():
            before = predict_without_lora(unet, z_t, t, batch, w)
        return F.mse_loss(predict(unet, z_t, t, batch, w), before)

    return loss


def in_turns(learnt: Loss, kept: Loss) -> Loss:
    """Every other step is for what is kept."""

    def loss(step: int, share: Shard) -> Tensor:
        return (learnt, kept)[step % 2](step // 2, share)

    return loss
