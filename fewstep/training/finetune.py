"""Latent Consistency Fine-tuning ("Latent Consistency Models", arXiv 2310.04378, section 4.4): a model that
paints in few steps learns a user's pictures, without a teacher, and goes on painting in few steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from diffusers import UNet2DConditionModel
from torch import Tensor

from fewstep.training.distill import Batch, LoraStudent, Roles, consistency_loss, predict
from fewstep.training.loop import Schedule, optimise, step_generator


def finetune_lora(
    unet: UNet2DConditionModel,
    next_batch: Callable[[int], Batch],
    alphas_cumprod: Tensor,
    prediction_type: str,
    student: LoraStudent,
    schedule: Schedule,
    checkpoint: Path,
) -> None:
    """Train the LoRA that `add_lora` gave to `unet`, which paints in few steps without it.

    `next_batch(step)` supplies the pictures. Resumes from `checkpoint`.
    """
    own = partial(predict, unet)
    roles = Roles(student=own, target=own)

    def loss(step: int) -> Tensor:
        generator = step_generator(11, step)
        return consistency_loss(roles, next_batch(step), alphas_cumprod, prediction_type, student, generator)

    optimise("fine-tuning", unet, loss, schedule, checkpoint)
