"""The model: load its weights, fuse the LCM-LoRA, generate batches of requests.

    pipeline = load_pipeline(get_model("miniature"), Settings.from_env())
    paintings = pipeline.generate([Request.create(pipeline.spec, prompt="a red house in the snow")])

A pipeline belongs to the thread that uses it: diffusers' are not thread-safe, and nothing here is either.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from diffusers import AutoencoderTiny
from PIL import Image, ImageFilter
from torch import Tensor, nn

from fewstep.errors import (
    FewstepError,
    GenerationError,
    SafetyError,
    UnsafeImage,
)
from fewstep.generation.engines.compiled import FOLDER as COMPILED
from fewstep.generation.engines.compiled import CompiledEngine
from fewstep.generation.engines.openvino import OpenVinoEngine
from fewstep.generation.engines.openvino_conversion import converted
from fewstep.generation.safety import SafetyChecker, load_safety_checker
from fewstep.generation.sampler import Job, sample
from fewstep.generation.text_encoder import Diffusion, TextEncoder
from fewstep.generation.upsampling import fold_upsamplers
from fewstep.lora.merge import NETWORKS, WeightMerger
from fewstep.lora.types import Mix
from fewstep.models.device import device_and_dtype, order_channels_last
from fewstep.models.load import load_tiny_vae, load_verified, read_lcm_lora, usual_size
from fewstep.models.manifest import verify_weights
from fewstep.models.specs import ModelSpec
from fewstep.request import Request
from fewstep.settings import OPENVINO, Settings

logger = logging.getLogger(__name__)

SEAM_PX = 2  # over which what is repainted and what is kept run into each other


@dataclass(frozen=True)
class GenerationResult:
    """What one request gets: its images, but for those that were flagged, and what making them cost."""

    images: list[Image.Image]
    seeds: list[int]  # of each
    metrics: dict[str, int | float]


def load_pipeline(spec: ModelSpec, settings: Settings) -> Pipeline:
    """Load the weights of `spec` straight to the device, verify them meanwhile, and fuse the LCM-LoRA.

    Raises WeightsError that names a missing or damaged file and its fix, SettingsError for a device that
    is not there. Nothing is fetched: what is not in the folder does not exist.
    """
    folder = settings.weights_root / spec.name
    device, dtype = device_and_dtype(settings)
    size = usual_size(spec, settings)
    manifest = verify_weights(folder, fix=spec.fix, mode="size")
    # First, while nothing else takes memory.
    place = converted(folder, settings, device, dtype) if settings.engine in OPENVINO else None
    diffusion = load_verified(folder, spec, manifest, settings.verify, device, dtype)
    tiny = load_tiny_vae(folder, manifest, spec.fix).to(device, dtype) if settings.vae == "tiny" else None
    for module in (part for part in (*diffusion.components.values(), tiny) if isinstance(part, nn.Module)):
        module.eval().requires_grad_(False)
    if device.type == "cpu":
        fold_upsamplers(diffusion.vae)  # the decoder's; on a GPU it has not been measured
        order_channels_last(diffusion, spec)
        if tiny:
            tiny.to(memory_format=torch.channels_last)
    adapters = WeightMerger(folder, {name: diffusion.components[name] for name in NETWORKS[spec.family]})
    if spec.lcm_lora:
        adapters.lcm_lora = read_lcm_lora(adapters, folder, manifest, spec.fix)
        logger.info("fused the LCM-LoRA into %d layers", adapters.apply(Mix()))
    checker = None
    if settings.safety == "off" or not spec.needs_safety_checker:
        logger.info("pictures of %s are not checked for safety", spec.name)
    else:
        fix = manifest.fix(spec.fix)
        checker = load_safety_checker(folder, settings.safety, device, dtype, fix)
    pipeline = Pipeline(
        spec,
        diffusion,
        adapters,
        settings.max_batch,
        revision=manifest.revision,
        checker=checker,
        allow_unsafe=settings.allow_unsafe,
        tiny_vae=tiny,
        usual_size=size,
        engine=OpenVinoEngine(diffusion, place, settings, dtype, size) if place else None,
    )
    if settings.engine == "compiled":
        pipeline.engine = CompiledEngine(
            diffusion.unet, pipeline.decoder, folder.parent / COMPILED / spec.name
        )
        pipeline.engine.compile_for(pipeline, settings.compiled)
    return pipeline


class Pipeline:
    """A loaded model that generates in few steps: its LCM-LoRA is fused, or it is a full LCM."""

    def __init__(
        self,
        spec: ModelSpec,
        diffusion: Diffusion,
        adapters: WeightMerger,
        max_batch: int,
        *,
        revision: str = "",
        checker: SafetyChecker | None = None,
        allow_unsafe: bool = False,
        tiny_vae: AutoencoderTiny | None = None,
        usual_size: tuple[int, int] | None = None,
        engine: OpenVinoEngine | CompiledEngine | None = None,
    ) -> None:
        self.spec = spec
        self.revision = revision  # of the weights
        self.diffusion = diffusion
        self.text = TextEncoder(diffusion)
        self.adapters = adapters
        self.max_batch = max_batch
        self.checker = checker
        self.allow_unsafe = allow_unsafe
        self.engine = engine
        # In px, of the images that the engine is made for.
        self.usual_size = usual_size or (spec.native_size, spec.native_size)
        self.decoder: Any = tiny_vae or diffusion.vae  # its latents are scaled by its own factor
        self.device: torch.device = diffusion.unet.device
        self.dtype: torch.dtype = diffusion.unet.dtype

    def max_images(self, request: Request) -> int:
        """How many images of this size go through the model at once; `max_batch` at the native size, and one
        where an engine takes them one by one: in a batch, all would wait for the last."""
        if self.engine and self.engine.one_by_one and self.engine.serves(request):
            return 1
        share = self.spec.native_size**2 / (request.width * request.height)
        return max(1, min(self.max_batch, int(self.max_batch * share)))

    def counted(self, request: Request) -> Request:
        """`request` with the number of chunks that its prompts fill, which may be counted on any thread.

        Raises InvalidRequest for a prompt that is too long.
        """
        if request.chunks:
            return request
        chunks = self.text.count_chunks("prompt", request.prompt)
        if request.guided:
            chunks = max(chunks, self.text.count_chunks("negative_prompt", request.negative_prompt))
        return replace(request, chunks=chunks)

    @torch.inference_mode()
    def generate(
        self,
        requests: Sequence[Request],
        stopped: Callable[[], bool] = lambda: False,
        more: Callable[[], Sequence[Request]] = tuple,
    ) -> list[GenerationResult | FewstepError]:
        """Generate `requests`, all of one shape key; an image that failed fails its own request only.

        Whenever prompts are encoded, `more` is asked for requests to add, until it has none. `stopped` is
        asked before every step. Raises Stopped when it says so, ValueError for keys that differ.
        """
        started = time.perf_counter()
        requests = self._of_one_shape(requests)
        self.adapters.apply(requests[0].mix)
        metrics: dict[str, int | float] = {"weights_ms": _ms_since(started)}
        started = time.perf_counter()
        jobs: list[Job] = []
        added = requests
        while added:
            first = len(requests) - len(added)
            jobs += [job for i, one in enumerate(added, first) for job in self._jobs(i, one)]
            added = self._of_one_shape([requests[0], *more()])[1:]
            requests += added
        metrics["text_ms"] = _ms_since(started)
        engine = self.engine if self.engine and self.engine.serves(requests[0]) else None
        limit = self.max_images(requests[0])
        passes = [jobs[i : i + limit] for i in range(0, len(jobs), limit)]
        metrics["batch_size"] = len(passes[0])
        images: list[Image.Image | FewstepError] = []
        for group in passes:
            started = time.perf_counter()
            unet = engine.unet if engine else None
            latents = sample(self.diffusion, self.spec, group, requests[0], stopped, unet)
            metrics["steps_ms"] = metrics.get("steps_ms", 0.0) + _ms_since(started)
            started = time.perf_counter()
            images_of_group = self._decode(
                latents, engine.decode if engine and engine.decodes else self._own_decode
            )
            decoded = [
                _with_kept_parts(image, job) for image, job in zip(images_of_group, group, strict=True)
            ]
            metrics["decode_ms"] = metrics.get("decode_ms", 0.0) + _ms_since(started)
            started = time.perf_counter()
            images += self._checked(decoded, [requests[job.request] for job in group])
            metrics["safety_ms"] = metrics.get("safety_ms", 0.0) + _ms_since(started)
        generated = groupby(zip(jobs, images, strict=True), key=lambda pair: pair[0].request)
        return [_result(list(pairs), metrics) for _, pairs in generated]

    def _of_one_shape(self, requests: Sequence[Request]) -> list[Request]:
        counted = [self.counted(request) for request in requests]
        if len({request.shape_key for request in counted}) > 1:
            raise ValueError("requests of different shape keys cannot share a batch")
        return counted

    def _checked(
        self, images: Sequence[Image.Image | FewstepError], requests: Sequence[Request]
    ) -> list[Image.Image | FewstepError]:
        """Each image, or why it is withheld."""
        if self.checker is None:
            return list(images)
        found = list(images)
        for i, (image, request) in enumerate(zip(images, requests, strict=True)):
            if isinstance(image, FewstepError) or (request.unchecked and self.allow_unsafe):
                continue
            try:  # one by one: a mate's image must not decide, nor fail, another's
                if self.checker.flagged([image])[0]:
                    found[i] = UnsafeImage("every picture was flagged as unsafe; try another prompt or seed")
            except SafetyError as error:
                found[i] = error
        return found

    def _jobs(self, place: int, request: Request) -> list[Job]:
        # One prompt at a time: in a batch, the mates' number would choose the kernels and so the last bits.
        styles = [(lora.sha256, scale) for lora, scale in request.mix.styles if lora.changes_text]
        shape = (request.chunks, request.clip_skip, tuple(styles))
        prompt = self.text.encode(request.prompt, *shape)
        negative = None
        if request.guided:
            negative = (
                self.text.encode(request.negative_prompt, *shape)
                if request.negative_prompt
                else self.text.nothing(prompt, *shape)
            )
        return [
            Job(place, prompt, negative, request.guidance, seed, request.image, request.mask)
            for seed in request.seeds
        ]

    def _own_decode(self, latents: Tensor) -> Tensor:
        pixels: Tensor = self.decoder.decode(latents.to(self.dtype)).sample
        return pixels

    def _decode(
        self, latents: Tensor, decode: Callable[[Tensor], Tensor]
    ) -> list[Image.Image | FewstepError]:
        """Scaled latents -> RGB images; an error where a value is not finite, which would come out black.

        What leaves the range of 16 bits is decoded once more in fp32.
        """
        latents = latents / self.decoder.config.scaling_factor
        pixels = decode(latents).float()
        again = _finite(latents) & ~_finite(pixels)
        if self.dtype != torch.float32 and again.any():
            logger.warning("%d of %d images are decoded again in fp32", again.sum(), len(again))
            pixels[again] = copy.deepcopy(self.decoder).float().decode(latents[again]).sample
        finite = _finite(pixels).tolist()
        rgb = (
            (pixels / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        )
        failed = "the model's numbers left their range, so there is no picture; try another seed"
        return [
            Image.fromarray(row) if sound else GenerationError(failed)
            for row, sound in zip(rgb, finite, strict=True)
        ]


def _finite(values: Tensor) -> Tensor:
    """Of each image, bool (N,)."""
    return values.isfinite().flatten(1).all(1)


def _with_kept_parts(generated: Image.Image | FewstepError, job: Job) -> Image.Image | FewstepError:
    """What the mask keeps, from the caller's own pixels: the VAE would return it slightly changed."""
    if isinstance(generated, FewstepError) or job.image is None or job.mask is None:
        return generated
    return Image.composite(generated, job.image, job.mask.filter(ImageFilter.GaussianBlur(SEAM_PX)))


def _result(
    outcomes: Sequence[tuple[Job, Image.Image | FewstepError]], metrics: dict[str, int | float]
) -> GenerationResult | FewstepError:
    """One request's: flagged images are dropped, all flagged is an error, and so is any other failure."""
    failures = [image for _, image in outcomes if isinstance(image, FewstepError)]
    unsafe = [failure for failure in failures if isinstance(failure, UnsafeImage)]
    if len(unsafe) < len(failures):
        return next(failure for failure in failures if failure not in unsafe)
    if len(unsafe) == len(outcomes):
        return unsafe[0]
    sound = [(job.seed, image) for job, image in outcomes if isinstance(image, Image.Image)]
    seeds, images = zip(*sound, strict=True)
    return GenerationResult(list(images), list(seeds), {**metrics, "flagged": len(unsafe)})


def _ms_since(started: float) -> float:
    return round(1000 * (time.perf_counter() - started), 1)
