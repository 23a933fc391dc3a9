"""The few-step loop: from encoded prompts, seeds and perhaps pictures to latents, with the LCMScheduler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, LCMScheduler
from PIL import Image
from torch import Tensor

from fewstep.errors import Stopped
from fewstep.models import ModelSpec
from fewstep.request import SCHEDULE_STEPS, Request
from fewstep.text_encoding import Diffusion, Prompt


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
    """What sampling begins with, (N, C, H / 8, W / 8) each: noise, and for images the latents to start from
    and the mask, (N, 1, ...), 1 where to repaint."""

    noise: Tensor
    image: Tensor | None
    mask: Tensor | None


def sample(
    diffusion: Diffusion, spec: ModelSpec, jobs: Sequence[Job], request: Request, stopped: Callable[[], bool]
) -> Tensor:
    """Multistep latent consistency sampling (Luo et al., arXiv 2310.04378, Algorithm 3): scaled latents.

    From an image, it begins where noise has covered `strength` of it (SDEdit, arXiv 2108.01073); under a
    mask, what is to be kept is put back after every step (arXiv 2201.09865, without resampling).
    """
    generators = [torch.Generator().manual_seed(job.seed) for job in jobs]
    scheduler = LCMScheduler.from_config(diffusion.scheduler.config)
    # A strength below one step of the schedule still takes that one.
    strength = max(request.strength, 1 / SCHEDULE_STEPS)
    scheduler.set_timesteps(request.real_steps, device=diffusion.unet.device, strength=strength)
    start = _start(diffusion, jobs, request, generators)
    latents = start.noise
    # On SDXL's schedule even the last timestep would leave a trace of the image.
    if start.image is not None and request.strength < 1:
        latents = scheduler.add_noise(start.image, start.noise, scheduler.timesteps[:1])
    condition = _condition(diffusion, spec, jobs, request)
    guidance = torch.tensor(
        [job.guidance for job in jobs], dtype=diffusion.unet.dtype, device=diffusion.unet.device
    )[:, None, None, None]
    for i, t in enumerate(scheduler.timesteps):
        if stopped():
            raise Stopped("every caller of this batch has left")
        given = torch.cat([latents, latents]) if request.guided else latents
        output = diffusion.unet(given, t, **condition).sample
        if request.guided:
            unconditional, conditional = output.chunk(2)
            output = unconditional + guidance * (conditional - unconditional)
        latents = scheduler.step(output, t, latents, generator=generators, return_dict=False)[0]
        if start.mask is not None and start.image is not None:
            after = scheduler.timesteps[i + 1 : i + 2]
            kept = scheduler.add_noise(start.image, start.noise, after) if len(after) else start.image
            latents = start.mask * latents + (1 - start.mask) * kept
    return latents


def _start(
    diffusion: Diffusion, jobs: Sequence[Job], request: Request, generators: Sequence[torch.Generator]
) -> _Start:
    """Noise, and the callers' images and masks as latents. As in diffusers, each image's generator draws
    its latents first and then its noise."""
    unet = diffusion.unet
    images = [
        encode_image(diffusion.vae, job.image, g)
        for job, g in zip(jobs, generators, strict=True)
        if job.image
    ]
    size = (1, unet.config.in_channels, request.height // 8, request.width // 8)
    noise = torch.cat([torch.randn(size, generator=g) for g in generators])
    masks = [mask_of_latents(job.mask) for job in jobs if job.mask]
    return _Start(
        noise.to(unet.device, unet.dtype),
        torch.cat(images).to(unet.device, unet.dtype) if images else None,
        torch.cat(masks).to(unet.device, unet.dtype) if masks else None,
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
    condition: dict[str, Any] = {"encoder_hidden_states": torch.cat([prompt.states for prompt in prompts])}
    pooled = [prompt.pooled for prompt in prompts if prompt.pooled is not None]
    if pooled:
        size = (request.height, request.width)
        time_ids = torch.tensor(
            [(*size, 0, 0, *size)] * len(prompts), dtype=diffusion.unet.dtype, device=diffusion.unet.device
        )
        condition["added_cond_kwargs"] = {"text_embeds": torch.cat(pooled), "time_ids": time_ids}
    if spec.embedded_guidance:
        w = torch.tensor([job.guidance - 1 for job in jobs])  # diffusers' guidance scale is 1 + w
        width = diffusion.unet.config.time_cond_proj_dim
        embedded = diffusion.get_guidance_scale_embedding(w, embedding_dim=width)
        condition["timestep_cond"] = embedded.to(diffusion.unet.device, diffusion.unet.dtype)
    return condition


def mask_of_latents(mask: Image.Image) -> Tensor:
    """(1, 1, H / 8, W / 8): 1 where any of the 8 x 8 px is to be repainted, so that thin strokes count."""
    white = torch.from_numpy(np.array(mask) >= 128).float()[None, None]
    return F.max_pool2d(white, 8)
