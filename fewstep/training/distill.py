"""What trainings minimise: the loss that distils a diffusion model into few steps, Algorithm 1 of "Latent
Consistency Models" ("LCM", arXiv 2310.04378), and the plain denoising loss of a style.

Two students are distilled: a LoRA over the frozen teacher (LCM-LoRA, arXiv 2311.05556), and a full LCM, a
copy of the teacher's UNet that takes w and learns from its own slow average. A style's LoRA knows nothing of
few steps; added to the weights together with an LCM-LoRA, it works in few steps all the same (2311.05556,
section 3): tau' = lambda_1 * tau_style + lambda_2 * tau_LCM.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from torch import Tensor

from fewstep.models.device import autocast
from fewstep.training import consistency as cm
from fewstep.training.trainer import Loss, Shard, StepRandom

# The attention of the published style LoRAs, and half of the convolutions, which carry texture.
STYLE_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out"),
    *("conv1", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
)
# The modules of the published LCM-LoRAs: feed-forward layers besides, and the convolutions of every block.
LORA_TARGETS = (*STYLE_TARGETS, "ff.net.0.proj", "ff.net.2", "conv2", "time_emb_proj")
# What a full LCM has and its teacher has not.
GUIDANCE_LAYER = "time_embedding.cond_proj.weight"
SHORT = 32  # latents a side


@dataclass(frozen=True)
class Batch:
    """Clean latents and what they show; N images.

    `latents` (N, C, H, W) are scaled to unit variance; `prompt_embeds` is (N, T, D). SDXL takes `pooled`
    (N, P) and `time_ids` (N, 6), too. `empty` is the encoded empty prompt, (T, D) and for SDXL (P,); without
    it, no prompt is all zeros, as SDXL has it (`force_zeros_for_empty_prompt`).
    """

    latents: Tensor
    prompt_embeds: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    empty: tuple[Tensor, ...] | None = None

    def without_prompt(self) -> Batch:
        """Return what the unconditional answer is asked with."""
        prompt = [part for part in (self.prompt_embeds, self.pooled) if part is not None]
        nothing = self.empty or [torch.zeros_like(part[0]) for part in prompt]
        states, *pooled = (part.expand_as(like) for part, like in zip(nothing, prompt, strict=True))
        return replace(self, prompt_embeds=states, pooled=pooled[0] if pooled else None)


NextBatch: TypeAlias = Callable[[int, Shard], Batch]  # the share of a step


@dataclass(frozen=True)
class Distillation:
    """How a teacher is distilled; w is drawn uniformly from `guidance` = (low, high).

    The teacher's ODE has `solver_steps` timesteps, and one consistency step goes back `skip` of them: LCM's k
    is skip * 1000 / solver_steps. A longer k carries what is known of clean images to pure noise in fewer
    links, each a coarser solution of the ODE. With `inverse_sigma`, answers are compared after a division by
    sigma at the noisier timestep: a network that predicts v has its say in x_0 times sigma, and would
    otherwise unlearn the last, least noisy part of the way, so that more steps make worse images. There, a
    larger `huber_c` pulls large errors back with more force than small ones.
    """

    guidance: tuple[float, float] = (6.5, 6.5)  # the LCM-LoRA report's guidance scale of 7.5 is 1 + w
    solver_steps: int = 50
    skip: int = 1
    inverse_sigma: bool = False
    huber_c: float = 1e-3


@dataclass(frozen=True)
class LoraStudent(Distillation):
    """An LCM-LoRA; its alpha is its rank."""

    targets: ClassVar = LORA_TARGETS
    rank: int = 64


@dataclass(frozen=True)
class FullStudent(Distillation):
    """A full LCM, which takes any w of `guidance`, and whose target is its average over the last steps:
    `Schedule.ema_decay` is LCM's mu."""

    guidance: tuple[float, float] = (2.0, 14.0)  # the paper's range
    width: int = 256  # of the embedding of w


@dataclass(frozen=True)
class StyleStudent:
    """A style's LoRA; its alpha is its rank, so that a scale of 1 is the style as it was learnt."""

    guidance: ClassVar = (0.0, 0.0)  # it has none
    rank: int = 8
    targets: tuple[str, ...] = STYLE_TARGETS


# Of z_t (N, C, H, W), timesteps t (N,), a batch and w (N,), which a full LCM takes: a network's output, fp32.
Answer: TypeAlias = Callable[[Tensor, Tensor, Batch, Tensor], Tensor]


@dataclass(frozen=True)
class Roles:
    """Who answers in Algorithm 1; only the student's answers are differentiated. Without a teacher, its place
    is taken by the image and the noise themselves: Latent Consistency Fine-tuning (LCM, section 4.4)."""

    student: Answer
    target: Answer
    teacher: Answer | None = None


def add_lora(unet: UNet2DConditionModel, student: LoraStudent | StyleStudent) -> None:
    """Freeze `unet` and give it a fresh LoRA, which at first changes nothing."""
    rank, targets = student.rank, list(student.targets)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))


def lora_roles(unet: UNet2DConditionModel, teacher: bool = True) -> Roles:
    """Return roles all of one network: with what `add_lora` gave it, student and target, without, teacher."""
    own = partial(predict, unet)
    return Roles(own, own, partial(predict_without_lora, unet) if teacher else None)


def make_full_student(teacher: UNet2DConditionModel, student: FullStudent) -> UNet2DConditionModel:
    """Return a trainable copy of `teacher` in fp32 that takes w, and at first does not heed it. Raises
    ValueError for a teacher that takes w itself."""
    if teacher.config.time_cond_proj_dim:
        raise ValueError("the teacher is a full LCM already")
    unet: UNet2DConditionModel = UNet2DConditionModel.from_config(
        teacher.config, time_cond_proj_dim=student.width
    ).to(teacher.device)
    unheeded = torch.zeros_like(unet.get_parameter(GUIDANCE_LAYER))
    unet.load_state_dict({**teacher.state_dict(), GUIDANCE_LAYER: unheeded})
    return unet


def order_for_training(unet: UNet2DConditionModel) -> None:
    """Order the memory of `unet` as convolutions want it; and on a CPU, in bf16 and for sequences as short as
    the miniature's, take plain attention: the fused kernel's backward is a quarter of the whole step."""
    unet.to(memory_format=torch.channels_last)
    if unet.device.type == "cpu" and unet.config.sample_size <= SHORT:
        unet.set_attn_processor(AttnProcessor())


def predict(
    unet: UNet2DConditionModel, z_t: Tensor, t: Tensor, batch: Batch, w: Tensor | None = None
) -> Tensor:
    """Return the network's output for `z_t` at timesteps `t` (N,), fp32; w (N,) is for one that takes it.

    It runs in the dtype of the caller's autocast, or without one in what the device trains in.
    """
    conditions: dict[str, Any] = {"encoder_hidden_states": batch.prompt_embeds}
    if batch.pooled is not None:
        conditions["added_cond_kwargs"] = {"text_embeds": batch.pooled, "time_ids": batch.time_ids}
    if unet.config.time_cond_proj_dim and w is not None:
        conditions["timestep_cond"] = cm.guidance_embedding(w, unet.config.time_cond_proj_dim)
    with nullcontext() if torch.is_autocast_enabled(z_t.device.type) else autocast(z_t.device):
        output = unet(z_t, t, **conditions).sample
    return output.float()  # type: ignore[no-any-return]


def predict_without_lora(
    unet: UNet2DConditionModel, z_t: Tensor, t: Tensor, batch: Batch, w: Tensor | None = None
) -> Tensor:
    """Return what `predict` does, of the network as it was before it got a LoRA."""
    unet.disable_adapters()
    try:
        return predict(unet, z_t, t, batch, w)
    finally:
        unet.enable_adapters()


def add_noise(
    batch: Batch, noise_schedule: cm.NoiseSchedule, draws: StepRandom
) -> tuple[Tensor, Tensor, Tensor]:
    """Return timesteps t (N,) spread evenly over the schedule, the latents with noise at t, and the noise."""
    latents = batch.latents
    t = (draws.stratified(len(latents)) * len(noise_schedule.alphas_cumprod)).long().to(latents.device)
    noise = draws.normal(*latents.shape).to(latents.device)
    return t, noise_schedule.mix(latents, noise, t), noise


def consistency_loss(
    roles: Roles, batch: Batch, noise_schedule: cm.NoiseSchedule, how: Distillation, draws: StepRandom
) -> Tensor:
    """Return the loss of one step of Algorithm 1: the distance between the student at t_{n+k} and the target
    at t_n."""
    device, count = batch.latents.device, len(batch.latents)

    def consistency_function(network: Answer, z: Tensor, t: Tensor) -> Tensor:
        c_skip, c_out = (cm.spread(c, z) for c in cm.boundary_scalings(t))
        x_0, _ = noise_schedule.estimates(network(z, t, batch, w), z, t)
        return c_skip * z + c_out * x_0

    # 1. Draw n, the noise and w.
    timesteps = cm.solver_timesteps(len(noise_schedule.alphas_cumprod), how.solver_steps)
    index = draws.below(how.solver_steps, count)
    t_next = timesteps[index].to(device)  # t_{n+k}
    before = timesteps[(index - how.skip).clamp(min=0)]
    t = torch.where(index >= how.skip, before, -torch.ones_like(index)).to(device)  # t_n; -1 is clean data
    noise = draws.normal(*batch.latents.shape).to(device)
    w = draws.uniform(count, *how.guidance).to(device)

    # 2. z_{t_{n+k}}, the noisy latent.
    z_next = noise_schedule.mix(batch.latents, noise, t_next)

    # 3. The student's answer at t_{n+k}.
    prediction = consistency_function(roles.student, z_next, t_next)

    with torch.no_grad():
        # 4. The teacher's guided estimate of x_0 and of the noise.
        x_0, eps = batch.latents, noise
        if roles.teacher:
            conditional = roles.teacher(z_next, t_next, batch, w)
            unconditional = roles.teacher(z_next, t_next, batch.without_prompt(), w)
            output = cm.guided_estimate(conditional, unconditional, w)
            x_0, eps = noise_schedule.estimates(output, z_next, t_next)

        # 5. One DDIM step back to t_n, and the target's answer there.
        z = noise_schedule.mix(x_0, eps, t)
        target = consistency_function(roles.target, z, t.clamp(min=0))
        target = torch.where(cm.spread(t < 0, z).bool(), z, target)  # the boundary condition: f(z, 0) = z

    # 6. Both must say the same.
    _, sigma = noise_schedule.signal_and_noise(t_next, noise)
    weight = 1 / sigma if how.inverse_sigma else torch.ones_like(sigma)
    return cm.pseudo_huber(weight * prediction, weight * target, how.huber_c)


def consistency_training(
    roles: Roles, next_batch: NextBatch, noise_schedule: cm.NoiseSchedule, how: Distillation, seed: int
) -> Loss:
    """Return what `optimise` minimises: `consistency_loss` of each step's own batch and random numbers."""
    return lambda step, share: consistency_loss(
        roles, next_batch(step, share), noise_schedule, how, StepRandom(seed, step, share)
    )


def style_training(
    unet: UNet2DConditionModel, next_batch: NextBatch, noise_schedule: cm.NoiseSchedule, seed: int
) -> Loss:
    """Return what `optimise` minimises to train a style that `add_lora` gave to `unet`: the mean squared
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
