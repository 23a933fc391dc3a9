"""Distil a diffusion model into an LCM-LoRA: Algorithm 1 of "Latent Consistency Models" (arXiv 2310.04378)
with the student's weights as a LoRA over the frozen teacher (arXiv 2311.05556)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor

from fewstep.training import consistency as cm
from fewstep.training.loop import Schedule, optimise, step_generator

# The modules of the published LCM-LoRAs: all attention and feed-forward layers, and the convolutions of every
# block.
LORA_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)


@dataclass(frozen=True)
class Batch:
    """Clean latents and what they show; N images.

    `latents` (N, C, H, W) are scaled to unit variance; `prompt_embeds` (N, T, D), `pooled` (N, P) and
    `time_ids` (N, 6) are SDXL's conditioning.
    """

    latents: Tensor
    prompt_embeds: Tensor
    pooled: Tensor
    time_ids: Tensor

    def without_prompt(self) -> Batch:
        """The unconditional batch: SDXL's zeroed embeddings (`force_zeros_for_empty_prompt`)."""
        zeros = torch.zeros_like
        return Batch(self.latents, zeros(self.prompt_embeds), zeros(self.pooled), self.time_ids)


@dataclass(frozen=True)
class LoraStudent:
    """What is distilled, and how: w is drawn uniformly from `guidance` = (low, high).

    The teacher's ODE has `solver_steps` timesteps, and one consistency step goes back `skip` of them: LCM's k
    is skip * 1000 / solver_steps. A longer k carries what is known of clean pictures to pure noise in fewer
    links, each a coarser solution of the ODE. With `inverse_sigma`, answers are compared after a division by
    sigma at the noisier timestep: a network that predicts v has its say in x_0 times sigma, and would
    otherwise unlearn the last, least noisy part of the way, so that more steps paint worse pictures. There, a
    larger `huber_c` pulls large errors back with more force than small ones.
    """

    rank: int = 64
    guidance: tuple[float, float] = (
        6.5,
        6.5,
    )  # w; the LCM-LoRA report's fixed guidance scale of 7.5 is 1 + w
    solver_steps: int = 50
    skip: int = 1
    inverse_sigma: bool = False
    huber_c: float = 1e-3


def add_lora(unet: UNet2DConditionModel, student: LoraStudent) -> None:
    """Freeze `unet` and give it a fresh LoRA, which at first changes nothing."""
    unet.add_adapter(LoraConfig(r=student.rank, lora_alpha=student.rank, target_modules=list(LORA_TARGETS)))


def predict(unet: UNet2DConditionModel, z_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
    """The network's output for `z_t` at timesteps `t` (N,), fp32."""
    added = {"text_embeds": batch.pooled, "time_ids": batch.time_ids}
    with torch.autocast(z_t.device.type, dtype=torch.bfloat16):
        output = unet(z_t, t, encoder_hidden_states=batch.prompt_embeds, added_cond_kwargs=added).sample
    return output.float()  # type: ignore[no-any-return]


def consistency_loss(
    unet: UNet2DConditionModel,
    batch: Batch,
    alphas_cumprod: Tensor,
    prediction_type: str,
    student: LoraStudent,
    generator: torch.Generator,
) -> Tensor:
    """One step of Algorithm 1: the pseudo-Huber distance between the student at t_{n+k} and itself at t_n."""
    device, count = batch.latents.device, len(batch.latents)

    def original(output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (cm.spread(c, z) for c in cm.signal_and_noise(alphas_cumprod, t))
        return cm.predicted_original(output, z, alpha, sigma, prediction_type)

    def consistency_function(z: Tensor, t: Tensor) -> Tensor:
        c_skip, c_out = (cm.spread(c, z) for c in cm.boundary_scalings(t))
        return c_skip * z + c_out * original(predict(unet, z, t, batch), z, t)

    # 1. Draw n, the noise and w.
    timesteps = cm.solver_timesteps(len(alphas_cumprod), student.solver_steps)
    index = torch.randint(student.solver_steps, (count,), generator=generator)
    t_next = timesteps[index].to(device)  # t_{n+k}
    before = timesteps[(index - student.skip).clamp(min=0)]
    t = torch.where(index >= student.skip, before, -torch.ones_like(index)).to(
        device
    )  # t_n; -1 is clean data
    noise = torch.randn(batch.latents.shape, generator=generator).to(device)
    low, high = student.guidance
    w = (torch.rand(count, generator=generator) * (high - low) + low).to(device)

    # 2. z_{t_{n+k}}, the noisy latent.
    alpha, sigma = (cm.spread(c, noise) for c in cm.signal_and_noise(alphas_cumprod, t_next))
    z_next = alpha * batch.latents + sigma * noise

    # 3. The student's answer at t_{n+k}.
    prediction = consistency_function(z_next, t_next)

    with torch.no_grad():
        # 4. The teacher's guided estimate of x_0 and of the noise.
        unet.disable_adapters()
        conditional = predict(unet, z_next, t_next, batch)
        unconditional = predict(unet, z_next, t_next, batch.without_prompt())
        unet.enable_adapters()
        output = cm.guided_estimate(conditional, unconditional, w)
        x_0 = original(output, z_next, t_next)
        eps = cm.predicted_noise(output, z_next, alpha, sigma, prediction_type)

        # 5. One DDIM step back to t_n, and the student's own answer there.
        alpha_prev, sigma_prev = (cm.spread(c, noise) for c in cm.signal_and_noise(alphas_cumprod, t))
        z = cm.ddim_step(x_0, eps, alpha_prev, sigma_prev)
        target = consistency_function(z, t.clamp(min=0))
        target = torch.where(cm.spread(t < 0, z).bool(), z, target)  # the boundary condition: f(z, 0) = z

    # 6. Both must say the same.
    weight = 1 / sigma if student.inverse_sigma else torch.ones_like(sigma)
    return cm.pseudo_huber(weight * prediction, weight * target, student.huber_c)


def distill_lora(
    unet: UNet2DConditionModel,
    next_batch: Callable[[int], Batch],
    alphas_cumprod: Tensor,
    prediction_type: str,
    student: LoraStudent,
    schedule: Schedule,
    checkpoint: Path,
) -> None:
    """Train the LoRA that `add_lora` gave to `unet`; `next_batch(step)` supplies data. Resumes from
    `checkpoint`."""

    def loss(step: int) -> Tensor:
        generator = step_generator(5, step)
        return consistency_loss(unet, next_batch(step), alphas_cumprod, prediction_type, student, generator)

    optimise("LCM-LoRA", unet, loss, schedule, checkpoint)
