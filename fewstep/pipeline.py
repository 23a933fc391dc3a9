"""The model: load its weights, fuse the LCM-LoRA, paint batches of requests.

    pipeline = load_pipeline(get_model("miniature"), Settings.from_env())
    paintings = pipeline.generate([Request.create(pipeline.spec, prompt="a red house in the snow")])

A pipeline belongs to the thread that uses it: diffusers' are not thread-safe, and nothing here is either.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import LCMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image, ImageFilter
from torch import Tensor

from fewstep.adapters import NETWORKS, Adapters, Lora
from fewstep.errors import FewstepError, GenerationError, SettingsError, Stopped, WeightsError
from fewstep.models import ModelSpec
from fewstep.request import SCHEDULE_STEPS, Mix, Request
from fewstep.settings import Settings
from fewstep.sources import LCM_LORA
from fewstep.styles import AdapterError
from fewstep.weights import Manifest, check_hashes, verify_weights

logger = logging.getLogger(__name__)

Diffusion: TypeAlias = StableDiffusionXLPipeline | StableDiffusionPipeline

PIPELINES = {"sdxl": StableDiffusionXLPipeline, "sd": StableDiffusionPipeline}
SEAM_PX = 2  # over which what is repainted and what is kept run into each other
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Painting:
    """What one request gets: its images in the order of their seeds, and what making them cost."""

    images: list[Image.Image]
    metrics: dict[str, int | float]


@dataclass(frozen=True)
class _Job:
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


@dataclass(frozen=True)
class Prompt:
    """What the text encoders make of one prompt: states (1, T, D); of SDXL's second also pooled (1, P)."""

    states: Tensor
    pooled: Tensor | None


def load_pipeline(spec: ModelSpec, settings: Settings) -> Pipeline:
    """Load the weights of `spec` straight to the device, verify them meanwhile, and fuse the LCM-LoRA.

    Raises WeightsError that names a missing or damaged file and its remedy, SettingsError for a device that
    is not there. Nothing is fetched: what is not in the folder does not exist.
    """
    folder = settings.weights_root / spec.name
    device, dtype = _device_and_dtype(settings)
    manifest = verify_weights(folder, remedy=spec.remedy, mode="size")
    diffusion = _load_verified(folder, spec, manifest, settings.verify, device, dtype)
    for module in (part for part in diffusion.components.values() if isinstance(part, torch.nn.Module)):
        module.eval().requires_grad_(False)
    adapters = Adapters(folder, {name: diffusion.components[name] for name in NETWORKS[spec.family]})
    if spec.lcm_lora:
        adapters.lcm_lora = _read_lcm_lora(adapters, folder, manifest, spec.remedy)
        logger.info("fused the LCM-LoRA into %d layers", adapters.apply(Mix()))
    return Pipeline(spec, diffusion, adapters, settings.max_batch, manifest.revision)


def _read_lcm_lora(adapters: Adapters, folder: Path, manifest: Manifest, remedy: str) -> Lora:
    (listed,) = (file for file in manifest.files if file.path == LCM_LORA)
    try:
        return adapters.read(folder / LCM_LORA, listed.sha256)
    except AdapterError as error:
        shown = f"weights/{folder.name}/{LCM_LORA}"
        raise WeightsError(f"{shown} {error}; run: {manifest.remedy(remedy)}") from None


def _load_verified(
    folder: Path,
    spec: ModelSpec,
    manifest: Manifest,
    verify: str,
    device: torch.device,
    dtype: torch.dtype,
) -> Diffusion:
    """Hash every file while it is loaded: both read the disk, and together no longer than either alone."""

    def load() -> Diffusion:
        return PIPELINES[spec.family].from_pretrained(
            folder,
            dtype=dtype,
            device_map=device.type,
            use_safetensors=True,
            local_files_only=True,
            **({"add_watermarker": False} if spec.family == "sdxl" else {"safety_checker": None}),
        )

    if verify == "size":
        logger.warning("FEWSTEP_VERIFY is size: a damaged file of the right length will not be noticed")
        return load()
    with ThreadPoolExecutor(1, "verify") as thread:
        hashed = thread.submit(check_hashes, folder, manifest, remedy=spec.remedy)
        try:
            diffusion = load()
        finally:
            hashed.result()  # when loading failed because of damaged bytes, this says so, and which
    return diffusion


def _device_and_dtype(settings: Settings) -> tuple[torch.device, torch.dtype]:
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise SettingsError("FEWSTEP_DEVICE is cuda, but torch sees no CUDA device; set it to cpu or auto")
    automatic = "fp16" if name == "cuda" else "fp32"
    return torch.device(name), DTYPES[automatic if settings.dtype == "auto" else settings.dtype]


class Pipeline:
    """A loaded model that paints in few steps: its LCM-LoRA is fused, or it is a full LCM."""

    def __init__(
        self, spec: ModelSpec, diffusion: Diffusion, adapters: Adapters, max_batch: int, revision: str = ""
    ) -> None:
        self.spec = spec
        self.revision = revision  # of the weights
        self.diffusion = diffusion
        self.adapters = adapters
        self.max_batch = max_batch
        self.device: torch.device = diffusion.unet.device
        self.dtype: torch.dtype = diffusion.unet.dtype

    def max_images(self, request: Request) -> int:
        """How many images of this size go through the model at once; `max_batch` at the native size."""
        share = self.spec.native_size**2 / (request.width * request.height)
        return max(1, min(self.max_batch, int(self.max_batch * share)))

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[Request], stopped: Callable[[], bool] = lambda: False
    ) -> list[Painting | FewstepError]:
        """Paint `requests`, all of one shape key; an image that failed fails its own request only.

        `stopped` is asked before every step. Raises Stopped when it says so.
        """
        started = time.perf_counter()
        self.adapters.apply(requests[0].mix)
        metrics: dict[str, int | float] = {"weights_ms": _ms_since(started)}
        started = time.perf_counter()
        jobs = [job for i, request in enumerate(requests) for job in self._jobs(i, request)]
        metrics["text_ms"] = _ms_since(started)
        limit = self.max_images(requests[0])
        passes = [jobs[i : i + limit] for i in range(0, len(jobs), limit)]
        metrics["batch_size"] = len(passes[0])
        images: list[Image.Image | None] = []
        for group in passes:
            started = time.perf_counter()
            latents = self._few_steps(group, requests[0], stopped)
            metrics["steps_ms"] = metrics.get("steps_ms", 0.0) + _ms_since(started)
            started = time.perf_counter()
            images += [
                image and _with_kept_parts(image, job)
                for image, job in zip(self._decode(latents), group, strict=True)
            ]
            metrics["decode_ms"] = metrics.get("decode_ms", 0.0) + _ms_since(started)
        painted = groupby(zip(jobs, images, strict=True), key=lambda pair: pair[0].request)
        return [_painting([image for _, image in pairs], metrics) for _, pairs in painted]

    def _jobs(self, place: int, request: Request) -> list[_Job]:
        prompt = self._encode(request.prompt)
        negative = None
        if request.guided:
            negative = (
                self._encode(request.negative_prompt) if request.negative_prompt else self._nothing(prompt)
            )
        return [
            _Job(place, prompt, negative, request.guidance, seed, request.image, request.mask)
            for seed in request.seeds
        ]

    def _encode(self, text: str) -> Prompt:
        # One prompt at a time: in a batch, the mates' number would choose the kernels and so the last bits.
        states, _, *pooled = self.diffusion.encode_prompt(
            text, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return Prompt(states, pooled[0] if pooled else None)

    def _nothing(self, prompt: Prompt) -> Prompt:
        """No prompt at all: zeros for SDXL (`force_zeros_for_empty_prompt`), the empty text for SD."""
        if prompt.pooled is None:
            return self._encode("")
        return Prompt(torch.zeros_like(prompt.states), torch.zeros_like(prompt.pooled))

    def _few_steps(self, jobs: Sequence[_Job], request: Request, stopped: Callable[[], bool]) -> Tensor:
        """Multistep latent consistency sampling (Luo et al., arXiv 2310.04378, Algorithm 3): scaled latents.

        From an image, it begins where noise has covered `strength` of it (SDEdit, arXiv 2108.01073); under a
        mask, what is to be kept is put back after every step (arXiv 2201.09865, without resampling).
        """
        generators = [torch.Generator().manual_seed(job.seed) for job in jobs]
        scheduler = LCMScheduler.from_config(self.diffusion.scheduler.config)
        # A strength below one step of the schedule still takes that one.
        strength = max(request.strength, 1 / SCHEDULE_STEPS)
        scheduler.set_timesteps(request.real_steps, device=self.device, strength=strength)
        start = self._start(jobs, request, generators)
        latents = start.noise
        if start.image is not None:
            latents = scheduler.add_noise(start.image, start.noise, scheduler.timesteps[:1])
        condition = self._condition(jobs, request)
        guidance = torch.tensor([job.guidance for job in jobs], dtype=self.dtype, device=self.device)[
            :, None, None, None
        ]
        for i, t in enumerate(scheduler.timesteps):
            if stopped():
                raise Stopped("every caller of this batch has left")
            sample = torch.cat([latents, latents]) if request.guided else latents
            output = self.diffusion.unet(sample, t, **condition).sample
            if request.guided:
                unconditional, conditional = output.chunk(2)
                output = unconditional + guidance * (conditional - unconditional)
            latents = scheduler.step(output, t, latents, generator=generators, return_dict=False)[0]
            if start.mask is not None and start.image is not None:
                after = scheduler.timesteps[i + 1 : i + 2]
                kept = scheduler.add_noise(start.image, start.noise, after) if len(after) else start.image
                latents = start.mask * latents + (1 - start.mask) * kept
        return latents

    def _start(self, jobs: Sequence[_Job], request: Request, generators: Sequence[torch.Generator]) -> _Start:
        """Noise, and the callers' images and masks as latents. As in diffusers, each image's generator draws
        its latents first and then its noise."""
        images = [
            self._encode_image(job.image, g) for job, g in zip(jobs, generators, strict=True) if job.image
        ]
        size = (1, self.diffusion.unet.config.in_channels, request.height // 8, request.width // 8)
        noise = torch.cat([torch.randn(size, generator=g) for g in generators]).to(self.device, self.dtype)
        masks = [_mask_of_latents(job.mask) for job in jobs if job.mask]
        return _Start(
            noise,
            torch.cat(images).to(self.device, self.dtype) if images else None,
            torch.cat(masks).to(self.device, self.dtype) if masks else None,
        )

    def _encode_image(self, image: Image.Image, generator: torch.Generator) -> Tensor:
        """RGB -> scaled latents (1, C, H / 8, W / 8). One at a time, for the reason of `_encode`."""
        vae = self.diffusion.vae
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(self.device, vae.dtype)
        found = vae.encode(pixels / 127.5 - 1).latent_dist
        drawn = torch.randn(found.mean.shape, generator=generator).to(found.mean)
        latents: Tensor = vae.config.scaling_factor * (found.mean + found.std * drawn)
        return latents

    def _condition(self, jobs: Sequence[_Job], request: Request) -> dict[str, Any]:
        """What the UNet is told besides latents and time: the prompts, SDXL's sizes, a full LCM's w."""
        prompts = [job.prompt for job in jobs]
        if request.guided:
            prompts = [job.negative for job in jobs if job.negative is not None] + prompts
        condition: dict[str, Any] = {
            "encoder_hidden_states": torch.cat([prompt.states for prompt in prompts])
        }
        pooled = [prompt.pooled for prompt in prompts if prompt.pooled is not None]
        if pooled:
            size = (request.height, request.width)
            time_ids = torch.tensor(
                [(*size, 0, 0, *size)] * len(prompts), dtype=self.dtype, device=self.device
            )
            condition["added_cond_kwargs"] = {"text_embeds": torch.cat(pooled), "time_ids": time_ids}
        if self.spec.embedded_guidance:
            w = torch.tensor([job.guidance - 1 for job in jobs])  # diffusers' guidance scale is 1 + w
            width = self.diffusion.unet.config.time_cond_proj_dim
            embedded = self.diffusion.get_guidance_scale_embedding(w, embedding_dim=width)
            condition["timestep_cond"] = embedded.to(self.device, self.dtype)
        return condition

    def _decode(self, latents: Tensor) -> list[Image.Image | None]:
        """Scaled latents -> RGB images; None where a value is not finite, which would come out black."""
        vae = self.diffusion.vae
        pixels = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample.float()
        finite = pixels.isfinite().flatten(1).all(1).tolist()
        rgb = (
            (pixels / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        )
        return [Image.fromarray(row) if sound else None for row, sound in zip(rgb, finite, strict=True)]


def _mask_of_latents(mask: Image.Image) -> Tensor:
    """(1, 1, H / 8, W / 8): 1 where any of the 8 x 8 px is to be repainted, so that thin strokes count."""
    white = torch.from_numpy(np.array(mask) >= 128).float()[None, None]
    return F.max_pool2d(white, 8)


def _with_kept_parts(painted: Image.Image, job: _Job) -> Image.Image:
    """What the mask keeps, from the caller's own pixels: the VAE would return it slightly changed."""
    if job.image is None or job.mask is None:
        return painted
    return Image.composite(painted, job.image, job.mask.filter(ImageFilter.GaussianBlur(SEAM_PX)))


def _painting(images: list[Image.Image | None], metrics: dict[str, int | float]) -> Painting | FewstepError:
    sound = [image for image in images if image is not None]
    if len(sound) < len(images):
        return GenerationError(
            "the model's numbers left their range, so there is no picture; try another seed"
        )
    return Painting(sound, dict(metrics))


def _ms_since(started: float) -> float:
    return round(1000 * (time.perf_counter() - started), 1)
