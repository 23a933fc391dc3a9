"""An ordinary style LoRA: the base's own denoising loss on images of one style, with the base frozen.

It knows nothing of few steps. Added to the weights together with an LCM-LoRA, it works in few steps all the
same (arXiv 2311.05556, section 3): tau' = lambda_1 * tau_style + lambda_2 * tau_LCM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor

from fewstep.training import consistency as cm
from fewstep.training.distill import NextBatch, add_noise, predict
from fewstep.training.trainer import Loss, Shard, StepRandom

# The attention of the published style LoRAs, and half of the convolutions, which carry texture.
STYLE_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out"),
    *("conv1", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
)


@dataclass(frozen=True)
class StyleStudent:
    """What is trained; alpha is the rank, so that a scale of 1 is the style as it was learnt."""

    guidance: ClassVar = (0.0, 0.0)  # it has none
    rank: int = 8
    targets: tuple[str, ...] = STYLE_TARGETS


def add_style(unet: UNet2DConditionModel, student: StyleStudent) -> None:
    """Freeze `unet` and give it a fresh LoRA, which at first changes nothing."""
    unet.add_adapter(
        LoraConfig(r=student.rank, lora_alpha=student.rank, target_modules=list(student.targets))
    )


def style_training(
    unet: UNet2DConditionModel, next_batch: NextBatch, noise_schedule: cm.NoiseSchedule, seed: int
) -> Loss:
    """Return what `optimise` minimises to train the LoRA that `add_style` gave to `unet`: the mean squared
    error of what it predicts, noise or v, at timesteps spread evenly over the schedule.

    Raises ValueError for a network that predicts something else.
    """
    kind = noise_schedule.prediction_type
    if kind not in ("epsilon", "v_prediction"):
        raise ValueError(f"a network that predicts {kind} cannot be trained here")

    def loss(step: int, share: Shard) -> Tensor:
        batch = next_batch(step, share)
        t, z_t, noise = add_noise(batch, noise_schedule, StepRandom(seed, step, share))
        alpha, sigma = noise_schedule.signal_and_noise(t, noise)
        target = noise if kind == "epsilon" else alpha * noise - sigma * batch.latents
        return F.mse_loss(predict(unet, z_t, t, batch), target)

    return loss
