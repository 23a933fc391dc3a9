"""The model: load its weights, fuse the LCM-LoRA, paint batches of requests.

    pipeline = load_pipeline(get_model("miniature"), Settings.from_env())
    paintings = pipeline.generate([Request.create(pipeline.spec, prompt="a red house in the snow")])

A pipeline belongs to the thread that uses it: diffusers' are not thread-safe, and nothing here is either.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor

from fewstep.adapters import fuse_lcm_lora
from fewstep.errors import FewstepError, GenerationError, SettingsError, Stopped
from fewstep.models import ModelSpec
from fewstep.request import Request
from fewstep.settings import Settings
from fewstep.weights import verify_weights

logger = logging.getLogger(__name__)

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


@dataclass(frozen=True)
class Prompt:
    """What both text encoders make of one prompt: states (1, T, D) and pooled (1, P)."""

    states: Tensor
    pooled: Tensor

    def zeros(self) -> Prompt:
        """SDXL's embedding of no prompt at all (`force_zeros_for_empty_prompt`)."""
        return Prompt(torch.zeros_like(self.states), torch.zeros_like(self.pooled))


def load_pipeline(spec: ModelSpec, settings: Settings) -> Pipeline:
    """Verify the weights of `spec`, load them straight to the device and fuse the LCM-LoRA.

    Raises WeightsError that names a missing or damaged file and its remedy, SettingsError for a device that
    is not there. Nothing is fetched: what is not in the folder does not exist.
    """
    folder = settings.weights_root / spec.name
    verify_weights(folder, remedy=spec.remedy, mode="size" if settings.verify == "size" else "sha256")
    device, dtype = _device_and_dtype(settings)
    diffusion = StableDiffusionXLPipeline.from_pretrained(
        folder, dtype=dtype, use_safetensors=True, local_files_only=True, add_watermarker=False
    ).to(device)
    if spec.lcm_lora:
        modules = fuse_lcm_lora(diffusion, folder / "lcm_lora.safetensors", spec.remedy)
        logger.info("fused the LCM-LoRA into %d modules", modules)
    for module in (diffusion.unet, diffusion.vae, diffusion.text_encoder, diffusion.text_encoder_2):
        module.eval().requires_grad_(False)
    return Pipeline(spec, diffusion, settings.max_batch)


def _device_and_dtype(settings: Settings) -> tuple[torch.device, torch.dtype]:
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise SettingsError("FEWSTEP_DEVICE is cuda, but torch sees no CUDA device; set it to cpu or auto")
    automatic = "fp16" if name == "cuda" else "fp32"
    return torch.device(name), DTYPES[automatic if settings.dtype == "auto" else settings.dtype]


class Pipeline:
    """A loaded SDXL with its LCM-LoRA fused."""

    def __init__(self, spec: ModelSpec, diffusion: StableDiffusionXLPipeline, max_batch: int) -> None:
        self.spec = spec
        self.diffusion = diffusion
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
        jobs = [job for i, request in enumerate(requests) for job in self._jobs(i, request)]
        limit = self.max_images(requests[0])
        passes = [jobs[i : i + limit] for i in range(0, len(jobs), limit)]
        metrics: dict[str, int | float] = {"batch_size": len(passes[0]), "text_ms": _ms_since(started)}
        images: list[Image.Image | None] = []
        for group in passes:
            started = time.perf_counter()
            latents = self._few_steps(group, requests[0], stopped)
            metrics["steps_ms"] = metrics.get("steps_ms", 0.0) + _ms_since(started)
            started = time.perf_counter()
            images += self._decode(latents)
            metrics["decode_ms"] = metrics.get("decode_ms", 0.0) + _ms_since(started)
        painted = groupby(zip(jobs, images, strict=True), key=lambda pair: pair[0].request)
        return [_painting([image for _, image in pairs], metrics) for _, pairs in painted]

    def _jobs(self, place: int, request: Request) -> list[_Job]:
        prompt = self._encode(request.prompt)
        negative = None
        if request.guided:
            negative = self._encode(request.negative_prompt) if request.negative_prompt else prompt.zeros()
        return [_Job(place, prompt, negative, request.guidance, seed) for seed in request.seeds]

    def _encode(self, text: str) -> Prompt:
        # One prompt at a time: in a batch, the mates' number would choose the kernels and so the last bits.
        states, _, pooled, _ = self.diffusion.encode_prompt(
            text, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return Prompt(states, pooled)

    def _few_steps(self, jobs: Sequence[_Job], request: Request, stopped: Callable[[], bool]) -> Tensor:
        """Multistep latent consistency sampling (Luo et al., arXiv 2310.04378, Algorithm 3): scaled
        latents."""
        generators = [torch.Generator().manual_seed(job.seed) for job in jobs]
        height, width = request.height // 8, request.width // 8
        channels = self.diffusion.unet.config.in_channels
        noise = [torch.randn((1, channels, height, width), generator=g) for g in generators]
        latents = torch.cat(noise).to(self.device, self.dtype)  # (N, C, H / 8, W / 8)
        prompts = [job.prompt for job in jobs]
        if request.guided:
            prompts = [job.negative for job in jobs if job.negative is not None] + prompts
        states = torch.cat([prompt.states for prompt in prompts])
        size = (request.height, request.width)
        time_ids = torch.tensor([(*size, 0, 0, *size)] * len(prompts), dtype=self.dtype, device=self.device)
        added = {"text_embeds": torch.cat([prompt.pooled for prompt in prompts]), "time_ids": time_ids}
        guidance = torch.tensor([job.guidance for job in jobs], dtype=self.dtype, device=self.device)[
            :, None, None, None
        ]
        scheduler = LCMScheduler.from_config(self.diffusion.scheduler.config)
        scheduler.set_timesteps(request.steps, device=self.device)
        for t in scheduler.timesteps:
            if stopped():
                raise Stopped("every caller of this batch has left")
            sample = torch.cat([latents, latents]) if request.guided else latents
            output = self.diffusion.unet(
                sample, t, encoder_hidden_states=states, added_cond_kwargs=added
            ).sample
            if request.guided:
                unconditional, conditional = output.chunk(2)
                output = unconditional + guidance * (conditional - unconditional)
            latents = scheduler.step(output, t, latents, generator=generators, return_dict=False)[0]
        return latents

    def _decode(self, latents: Tensor) -> list[Image.Image | None]:
        """Scaled latents -> RGB images; None where a value is not finite, which would come out black."""
        vae = self.diffusion.vae
        pixels = vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample.float()
        finite = pixels.isfinite().flatten(1).all(1).tolist()
        rgb = (
            (pixels / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        )
        return [Image.fromarray(row) if sound else None for row, sound in zip(rgb, finite, strict=True)]


def _painting(images: list[Image.Image | None], metrics: dict[str, int | float]) -> Painting | FewstepError:
    sound = [image for image in images if image is not None]
    if len(sound) < len(images):
        return GenerationError(
            "the model's numbers left their range, so there is no picture; try another seed"
        )
    return Painting(sound, dict(metrics))


def _ms_since(started: float) -> float:
    return round(1000 * (time.perf_counter() - started), 1)
