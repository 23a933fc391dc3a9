"""The few-step loop: from encoded prompts, seeds and perhaps images to latents, with the LCMScheduler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, LCMScheduler
from PIL import Image
from torch import Tensor

from fewstep.errors import Stopped
from fewstep.generation.text_encoder import Diffusion, Prompt
from fewstep.models.specs import ModelSpec
from fewstep.request import SCHEDULE_STEPS, Request

# Latents, timestep and what `_condition` gives -> the network's output.
UNet: TypeAlias = Callable[[Tensor, Tensor, dict[str, Any]], Tensor]


@dataclass(frozen=True)
class Job:
    """One image of one request."""

    request: int  # its place in the batch
    prompt: Prompt
    negative: Prompt | None  # None: no guidance
    guidance: float
    seed: int
    image: Image.Image | None
    mask: Image.Image | None


@dataclass(frozen=True)
class _Start:
    """What sampling begins with, (N, C, H / 8, W / 8) each: noise; what is added after each step but the
    last, (steps - 1, N, ...); for images their latents, and the mask, (N, 1, ...), 1 where to repaint."""

    noise: Tensor
    fresh: Tensor
    image: Tensor | None
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the sampler on latents x, with the network's output e and fresh noise z:
    x' = of_latents x + of_output e + of_noise z."""

    timestep: int
    of_latents: float
    of_output: float
    of_noise: float  # 0 in the last step
    kept: tuple[float, float]  # how much of an image and of its noise there is after this step


def plan(scheduler: LCMScheduler, count: int, strength: float) -> tuple[tuple[float, float], list[Step]]:
    """What `LCMScheduler.step` would compute, all of it numbers that are known before the first step; and how
    much of an image and of its noise there is at the start.

    With alpha and sigma of the noise schedule at t, and c_skip and c_out of the boundary condition (Song et
    al., arXiv 2303.01469, section 3), a step is x0 = (x - sigma e) / alpha, or alpha x - sigma e of a network
    that predicts v; then x' = alpha' (c_out x0 + c_skip x) + sigma' z.
    """
    scheduler.set_timesteps(count, strength=strength)
    timesteps = scheduler.timesteps.tolist()
    # Of the last step's result nothing is made noise again.
    levels = [scheduler.alphas_cumprod[t].item() for t in timesteps] + [1.0]
    mixes = [(level**0.5, (1 - level) ** 0.5) for level in levels]
    steps = []
    for t, (alpha, sigma), after in zip(timesteps, mixes, mixes[1:], strict=False):
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(t)
        if scheduler.config.prediction_type == "epsilon":
            of_latents, of_output = c_out / alpha + c_skip, -c_out * sigma / alpha
        else:
            of_latents, of_output = c_out * alpha + c_skip, -c_out * sigma
        steps.append(Step(t, after[0] * of_latents, after[0] * of_output, after[1], after))
    return mixes[0], steps


def sample(
    diffusion: Diffusion,
    spec: ModelSpec,
    jobs: Sequence[Job],
    request: Request,
    stopped: Callable[[], bool],
    unet: UNet | None = None,
) -> Tensor:
    """Multistep latent consistency sampling (Luo et al., arXiv 2310.04378, Algorithm 3): scaled latents.

    From an image, it begins where noise has covered `strength` of it (SDEdit, arXiv 2108.01073); under a
    mask, what is to be kept is put back after every step (arXiv 2201.09865, without resampling). Between two
    steps nothing waits for the device. `unet` takes the place of the model's own.
    """
    unet = unet or _own_unet(diffusion)
    # Of the model's dtype and device, for which it looks through all of its layers when asked.
    states = jobs[0].prompt.states
    # A strength below one step of the schedule still takes that one.
    strength = max(request.strength, 1 / SCHEDULE_STEPS)
    first, steps = plan(LCMScheduler.from_config(diffusion.scheduler.config), request.real_steps, strength)
    start = _start(diffusion, jobs, request, len(steps) - 1)
    latents = start.noise
    # On SDXL's schedule even the last timestep would leave a trace of the image.
    if start.image is not None and request.strength < 1:
        latents = first[0] * start.image + first[1] * start.noise
    condition = _condition(diffusion, spec, jobs, request)
    guidance = torch.tensor([job.guidance for job in jobs], device=states.device)[:, None, None, None]
    timesteps = torch.tensor([step.timestep for step in steps], device=states.device)
    for i, step in enumerate(steps):
        if stopped():
            raise Stopped("every caller of this batch has left")
        given = latents.to(states.dtype)
        if request.guided:
            given = torch.cat([given, given])
        output = unet(given, timesteps[i], condition).float()
        if request.guided:
            unconditional, conditional = output.chunk(2)
            output = unconditional + guidance * (conditional - unconditional)
        latents = step.of_latents * latents + step.of_output * output
        if step.of_noise:
            latents += step.of_noise * start.fresh[i]
        if start.mask is not None and start.image is not None:
            kept = step.kept[0] * start.image + step.kept[1] * start.noise
            latents = start.mask * latents + (1 - start.mask) * kept
    return latents


def _own_unet(diffusion: Diffusion) -> UNet:
    def unet(latents: Tensor, timestep: Tensor, condition: dict[str, Any]) -> Tensor:
        output: Tensor = diffusion.unet(latents, timestep, **condition, return_dict=False)[0]
        return output

    return unet


def _start(diffusion: Diffusion, jobs: Sequence[Job], request: Request, fresh: int) -> _Start:
    """All noise, and the callers' images and masks as latents. As in diffusers, each image's generator draws
    its latents first, then what it starts from, then what is added step by step."""
    device = jobs[0].prompt.states.device
    generators = [torch.Generator().manual_seed(job.seed) for job in jobs]
    images = [
        encode_image(diffusion.vae, job.image, g)
        for job, g in zip(jobs, generators, strict=True)
        if job.image
    ]
    size = (1, diffusion.unet.config.in_channels, request.height // 8, request.width // 8)
    noise = torch.stack(
        [torch.cat([torch.randn(size, generator=g) for g in generators]) for _ in range(1 + fresh)]
    )
    noise = noise.to(device)
    masks = [mask_of_latents(job.mask) for job in jobs if job.mask]
    return _Start(
        noise[0],
        noise[1:],
        torch.cat(images).float() if images else None,
        torch.cat(masks).to(device) if masks else None,
    )


def encode_image(vae: AutoencoderKL, image: Image.Image, generator: torch.Generator) -> Tensor:
    """RGB -> scaled latents (1, C, H / 8, W / 8). Not batched: the mates' number would choose the kernels."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(vae.device, vae.dtype)
    found = vae.encode(pixels / 127.5 - 1).latent_dist
    drawn = torch.randn(found.mean.shape, generator=generator).to(found.mean)
    latents: Tensor = vae.config.scaling_factor * (found.mean + found.std * drawn)
    return latents


def _condition(
    diffusion: Diffusion, spec: ModelSpec, jobs: Sequence[Job], request: Request
) -> dict[str, Any]:
    """What the UNet is told besides latents and time: the prompts, SDXL's sizes, a full LCM's w."""
    prompts = [job.prompt for job in jobs]
    if request.guided:
        prompts = [job.negative for job in jobs if job.negative is not None] + prompts
    states = torch.cat([prompt.states for prompt in prompts])
    condition: dict[str, Any] = {"encoder_hidden_states": states}
    pooled = [prompt.pooled for prompt in prompts if prompt.pooled is not None]
    if pooled:
        size = (request.height, request.width)
        time_ids = torch.tensor(
            [(*size, 0, 0, *size)] * len(prompts), dtype=states.dtype, device=states.device
        )
        condition["added_cond_kwargs"] = {"text_embeds": torch.cat(pooled), "time_ids": time_ids}
    if spec.embedded_guidance:
        w = torch.tensor([job.guidance - 1 for job in jobs])  # diffusers' guidance scale is 1 + w
        width = diffusion.unet.config.time_cond_proj_dim
        embedded = diffusion.get_guidance_scale_embedding(w, embedding_dim=width)
        condition["timestep_cond"] = embedded.to(states)
    return condition


def mask_of_latents(mask: Image.Image) -> Tensor:
    """(1, 1, H / 8, W / 8): 1 where any of the 8 x 8 px is to be repainted, so that thin strokes count."""
    white = torch.from_numpy(np.array(mask) >= 128).float()[None, None]
    return F.max_pool2d(white, 8)
