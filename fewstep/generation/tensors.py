"""From encoded requests to the tensors that sampling takes, and from its latents to finished images."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image, ImageFilter
from torch import Tensor

from fewstep.errors import FewstepError, GenerationError
from fewstep.generation.engines import Engine
from fewstep.generation.sampler import Start
from fewstep.generation.text_encoder import PromptEmbeds
from fewstep.models.load import Diffusion
from fewstep.request import Inputs, Request

logger = logging.getLogger(__name__)

SEAM_PX = 2  # over which what is repainted and what is kept run into each other


@dataclass(frozen=True)
class EncodedRequest:
    """A request with its prompts encoded, and what that cost."""

    request: Request
    prompt: PromptEmbeds
    negative: PromptEmbeds | None  # None: no guidance
    metrics: dict[str, float]  # in ms


@dataclass(frozen=True)
class Job:
    """One image of one request."""

    inputs: Inputs
    prompt: PromptEmbeds
    negative: PromptEmbeds | None
    seed: int


def make_start(diffusion: Diffusion, jobs: Sequence[Job], steps: int) -> Start:
    """All noise, and the callers' images and masks as latents. As in diffusers, each image's generator draws
    its latents first, then what it starts from, then what is added step by step."""
    device, inputs = jobs[0].prompt.states.device, jobs[0].inputs
    generators = [torch.Generator().manual_seed(job.seed) for job in jobs]
    images = [
        encode_image(diffusion.vae, job.inputs.image, generator)
        for job, generator in zip(jobs, generators, strict=True)
        if job.inputs.image
    ]
    size = (1, diffusion.unet.config.in_channels, inputs.height // 8, inputs.width // 8)
    draws = [torch.cat([torch.randn(size, generator=g) for g in generators]) for _ in range(steps)]
    noise = torch.stack(draws).to(device)
    masks = [mask_of_latents(job.inputs.mask) for job in jobs if job.inputs.mask]
    image = torch.cat(images).float() if images else None
    return Start(noise[0], noise[1:], image, torch.cat(masks).to(device) if masks else None)


def encode_image(vae: AutoencoderKL, image: Image.Image, generator: torch.Generator) -> Tensor:
    """RGB -> scaled latents (1, C, H / 8, W / 8). Not batched: the mates' number would choose the kernels."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(vae.device, vae.dtype)
    distribution = vae.encode(pixels / 127.5 - 1).latent_dist
    drawn = torch.randn(distribution.mean.shape, generator=generator).to(distribution.mean)
    latents: Tensor = vae.config.scaling_factor * (distribution.mean + distribution.std * drawn)
    return latents


def mask_of_latents(mask: Image.Image) -> Tensor:
    """(1, 1, H / 8, W / 8): 1 where any of the 8 x 8 px is to be repainted, so that thin strokes count."""
    return F.max_pool2d(torch.from_numpy(np.array(mask) >= 128).float()[None, None], 8)


def make_condition(diffusion: Diffusion, jobs: Sequence[Job], *, embedded_guidance: bool) -> dict[str, Any]:
    """What the UNet is given besides latents and time: the prompts, SDXL's sizes, a full LCM's w."""
    prompts = [job.negative for job in jobs if job.negative] + [job.prompt for job in jobs]
    states = torch.cat([prompt.states for prompt in prompts])
    condition: dict[str, Any] = {"encoder_hidden_states": states}
    pooled = [prompt.pooled for prompt in prompts if prompt.pooled is not None]
    if pooled:
        size = (jobs[0].inputs.height, jobs[0].inputs.width)
        time_ids = torch.tensor([(*size, 0, 0, *size)] * len(prompts)).to(states)
        condition["added_cond_kwargs"] = {"text_embeds": torch.cat(pooled), "time_ids": time_ids}
    if embedded_guidance:
        w = torch.tensor([job.inputs.guidance - 1 for job in jobs])  # diffusers' guidance scale is 1 + w
        width = diffusion.unet.config.time_cond_proj_dim
        condition["timestep_cond"] = diffusion.get_guidance_scale_embedding(w, embedding_dim=width).to(states)
    return condition


def decode_latents(engine: Engine, decoder: Any, latents: Tensor) -> list[Image.Image | FewstepError]:
    """Scaled latents -> RGB images; an error where a value is not finite, which would come out black.

    What leaves the range of 16 bits is decoded once more in fp32, by `decoder`, which `engine` evaluates.
    """
    latents = latents / decoder.config.scaling_factor
    pixels = engine.decode(latents).float()
    again = _finite(latents) & ~_finite(pixels)
    if decoder.dtype != torch.float32 and again.any():
        logger.warning("%d of %d images are decoded again in fp32", again.sum(), len(again))
        pixels[again] = copy.deepcopy(decoder).float().decode(latents[again]).sample
    finite = _finite(pixels).tolist()
    rgb = (pixels / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    failed = "the model's numbers left their range, so there is no picture; try another seed"
    return [
        Image.fromarray(row) if sound else GenerationError(failed)
        for row, sound in zip(rgb, finite, strict=True)
    ]


def keep_unmasked(generated: Image.Image | FewstepError, inputs: Inputs) -> Image.Image | FewstepError:
    """`generated` with the caller's own pixels where the mask keeps them, which the VAE changes slightly."""
    if isinstance(generated, FewstepError) or inputs.image is None or inputs.mask is None:
        return generated
    return Image.composite(generated, inputs.image, inputs.mask.filter(ImageFilter.GaussianBlur(SEAM_PX)))


def _finite(values: Tensor) -> Tensor:
    """Of each image, bool (N,)."""
    return values.isfinite().flatten(1).all(1)
