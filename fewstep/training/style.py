"""An ordinary style LoRA: the base's own denoising loss on pictures of one style, with the base frozen.

It knows nothing of few steps. Added to the weights together with an LCM-LoRA, it is painted in few steps all
the same (arXiv 2311.05556, section 3): tau' = lambda_1 * tau_style + lambda_2 * tau_LCM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor

from fewstep.training import consistency as cm
from fewstep.training.distill import Batch, predict
from fewstep.training.loop import Schedule, optimise, step_generator

# The attention of the published style LoRAs, and half of the convolutions, which carry texture.
STYLE_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out"),
    *("conv1", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
)


@dataclass(frozen=True)
class StyleStudent:
    """What is trained; alpha is the rank, so that a scale of 1 is the style as it was learnt."""

    rank: int = 8
    targets: tuple[str, ...] = STYLE_TARGETS


def add_style(unet: UNet2DConditionModel, student: StyleStudent) -> None:
    """Freeze `unet` and give it a fresh LoRA, which at first changes nothing."""
    unet.add_adapter(
        LoraConfig(r=student.rank, lora_alpha=student.rank, target_modules=list(student.targets))
    )


def style_loss(
    unet: UNet2DConditionModel,
    batch: Batch,
    alphas_cumprod: Tensor,
    prediction_type: str,
    generator: torch.Generator,
) -> Tensor:
    """Mean squared error of what the network predicts, noise or v, at timesteps spread evenly over the
    schedule."""
    count, device = len(batch.latents), batch.latents.device
    u = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    t = (u * len(alphas_cumprod)).long().to(device)
    noise = torch.randn(batch.latents.shape, generator=generator).to(device)
    alpha, sigma = (cm.spread(c, noise) for c in cm.signal_and_noise(alphas_cumprod, t))
    output = predict(unet, alpha * batch.latents + sigma * noise, t, batch)
    if prediction_type not in ("epsilon", "v_prediction"):
        raise ValueError(f"a network that predicts {prediction_type} cannot be trained here")
    target = noise if prediction_type == "epsilon" else alpha * noise - sigma * batch.latents
    return F.mse_loss(output, target)


def train_style(
    name: str,
    unet: UNet2DConditionModel,
    next_batch: Callable[[int], Batch],
    alphas_cumprod: Tensor,
    prediction_type: str,
    schedule: Schedule,
    checkpoint: Path,
) -> None:
    """Train the LoRA that `add_style` gave to `unet`; `next_batch(step)` supplies pictures of the style.

    Resumes from `checkpoint`.
    """

    def loss(step: int) -> Tensor:
        return style_loss(unet, next_batch(step), alphas_cumprod, prediction_type, step_generator(6, step))

    optimise(name, unet, loss, schedule, checkpoint)
