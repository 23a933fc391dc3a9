"""From encoded requests to the tensors that sampling takes, and from its latents to finished images."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
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
from fewstep.generation.safety import SafetyChecker, withheld
from fewstep.generation.sampler import Start
from fewstep.generation.stopwatch import Stopwatch
from fewstep.generation.text_encoder import PromptEmbeds
from fewstep.models.device import to_device, to_host
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
    stopwatch: Stopwatch


@dataclass(frozen=True)
class Job:
    """One image of one request."""

    inputs: Inputs
    prompt: PromptEmbeds
    negative: PromptEmbeds | None
    seed: int
    unchecked: bool  # given out whatever the safety checker says


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
    noise = to_device(torch.stack(draws), device)
    masks = [mask_of_latents(job.inputs.mask) for job in jobs if job.inputs.mask]
    image = torch.cat(images).float() if images else None
    return Start(noise[0], noise[1:], image, to_device(torch.cat(masks), device) if masks else None)


def encode_image(vae: AutoencoderKL, image: Image.Image, generator: torch.Generator) -> Tensor:
    """RGB -> scaled latents (1, C, H / 8, W / 8). Not batched: the mates' number would choose the kernels."""
    rgb = to_device(torch.from_numpy(np.array(image)), vae.device)
    distribution = vae.encode(rgb.permute(2, 0, 1)[None].to(vae.dtype) / 127.5 - 1).latent_dist
    drawn = to_device(torch.randn(distribution.mean.shape, generator=generator), vae.device).to(vae.dtype)
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
        time_ids = torch.tensor([(*size, 0, 0, *size)] * len(prompts), dtype=states.dtype)
        time_ids = to_device(time_ids, states.device)
        condition["added_cond_kwargs"] = {"text_embeds": torch.cat(pooled), "time_ids": time_ids}
    if embedded_guidance:
        w = torch.tensor([job.inputs.guidance - 1 for job in jobs])  # diffusers' guidance scale is 1 + w
        width = diffusion.unet.config.time_cond_proj_dim
        embedded = diffusion.get_guidance_scale_embedding(w, embedding_dim=width)
        condition["timestep_cond"] = to_device(embedded.to(states.dtype), states.device)
    return condition


@dataclass(frozen=True)
class _Decoded:
    """Images in the host's memory: RGB (N, H, W, 3) in uint8, whether every value of it was finite, and of
    its latents, (N,), and the safety checker's verdicts (N,), if it was asked."""

    rgb: Tensor
    finite: Tensor
    began_finite: Tensor
    verdicts: Tensor


def decode_latents(
    decode: Callable[[Tensor], Tensor],
    decoder: Any,
    latents: Tensor,
    jobs: Sequence[Job],
    checker: SafetyChecker | None,
    stopwatch: Stopwatch,
) -> list[Image.Image | FewstepError]:
    """Scaled latents (N, ...) -> RGB images, or why there is none: a value that is not finite, which would
    come out black, or the checker's verdict.

    `decode` is the engine's, of `decoder`. What leaves the range of 16 bits is decoded once more by `decoder`
    in fp32. All is computed on the device, and waited for once.
    """
    latents = latents / decoder.config.scaling_factor
    made = _decode(decode, latents, jobs, checker, stopwatch)
    again = (made.began_finite & ~made.finite).nonzero().flatten().tolist()
    if again and decoder.dtype != torch.float32:
        logger.warning("%d of %d images are decoded again in fp32", len(again), len(jobs))
        exact = Engine(None, _in_fp32(decoder))
        for i in again:
            only = slice(i, i + 1)
            one = _decode(exact.decode, latents[only], jobs[only], checker, stopwatch)
            made.rgb[i], made.finite[i], made.verdicts[i] = one.rgb[0], one.finite[0], one.verdicts[0]
    failed = "the model's numbers left their range, so there is no picture; try another seed"
    images: list[Image.Image | FewstepError] = []
    rows = zip(jobs, made.rgb.numpy(), made.finite.tolist(), made.verdicts.tolist(), strict=True)
    for job, rgb, finite, verdict in rows:
        why = None if job.unchecked else withheld(verdict)
        images.append((why if finite else GenerationError(failed)) or Image.fromarray(rgb))
    return images


def _decode(
    decode: Callable[[Tensor], Tensor],
    latents: Tensor,
    jobs: Sequence[Job],
    checker: SafetyChecker | None,
    stopwatch: Stopwatch,
) -> _Decoded:
    """Decode all latents at once on a CPU; on a GPU, whose memory a decoder fills, image by image."""
    device = latents.device
    with stopwatch.stage("decode_ms"):
        parts, finite = [], []
        for part in torch.split(latents, len(jobs) if device.type == "cpu" else 1):
            pixels = decode(part).float()
            finite.append(_finite(pixels))
            rgb = (pixels / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
            parts.append(rgb.permute(0, 2, 3, 1).contiguous())
        single = torch.split(torch.cat(parts), 1)
        kept = [keep_unmasked(rgb, job.inputs) for rgb, job in zip(single, jobs, strict=True)]
        images, all_finite = torch.cat(kept), torch.cat(finite)
    with stopwatch.stage("safety_ms"):
        verdicts = torch.zeros(len(jobs), dtype=torch.uint8, device=device)
        if checker and not all(job.unchecked for job in jobs):
            verdicts = checker.verdicts(images)
    return _Decoded(*to_host(images, all_finite, _finite(latents), verdicts))


def _in_fp32(decoder: Any) -> Any:
    copied = copy.deepcopy(decoder).float()
    for module in copied.modules():
        vars(module).pop("forward", None)  # an engine's, which is bound to what was copied
    return copied


def keep_unmasked(generated: Tensor, inputs: Inputs) -> Tensor:
    """RGB (1, H, W, 3) in uint8 with the caller's own pixels where the mask keeps them, which the VAE changes
    slightly; to the last bit what `PIL.Image.composite` makes."""
    if inputs.image is None or inputs.mask is None:
        return generated
    seam = np.array(inputs.mask.filter(ImageFilter.GaussianBlur(SEAM_PX)), dtype=np.int32)[..., None]
    device = generated.device
    share = to_device(torch.from_numpy(seam), device)
    own = to_device(torch.from_numpy(np.array(inputs.image)), device)
    mixed = share * generated + (255 - share) * own + 128
    return ((mixed >> 8) + mixed >> 8).to(torch.uint8)


def _finite(values: Tensor) -> Tensor:
    """Of each image, bool (N,)."""
    return values.isfinite().flatten(1).all(1)
