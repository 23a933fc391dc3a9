"""The model: load its weights, encode requests, generate batches of them.

    pipeline = load_pipeline(get_model("miniature"), Settings.from_env())
    [image] = pipeline.images(["a red house in the snow"], [7])

A pipeline belongs to the thread that uses it: diffusers' are not thread-safe, and nothing here is either.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny, LCMScheduler
from PIL import Image
from torch import Tensor

from fewstep.errors import FewstepError, InvalidRequest, SettingsError, UnsafeImage
from fewstep.generation import tensors
from fewstep.generation.engines import Engine
from fewstep.generation.engines.compiled import FOLDER as COMPILED
from fewstep.generation.engines.compiled import CompiledEngine
from fewstep.generation.engines.openvino import OpenVinoEngine
from fewstep.generation.engines.openvino_conversion import converted
from fewstep.generation.safety import SafetyChecker, load_safety_checker, withheld
from fewstep.generation.sampler import plan, sample
from fewstep.generation.tensors import EncodedRequest, Job
from fewstep.generation.text_encoder import TextEncoder
from fewstep.lora.merge import WeightMerger
from fewstep.lora.types import Lora
from fewstep.models.device import device_and_dtype
from fewstep.models.load import Diffusion, load_merged, load_tiny_vae
from fewstep.models.manifest import check_folder
from fewstep.models.specs import ModelSpec
from fewstep.request import SCHEDULE_STEPS, Inputs, Request
from fewstep.settings import OPENVINO, Settings, Shape

logger = logging.getLogger(__name__)


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
    size = _usual_size(spec, settings)
    manifest = check_folder(folder, fix=spec.fix)
    # First, while nothing else takes memory.
    place = converted(folder, settings, device, dtype) if settings.engine in OPENVINO else None
    diffusion, adapters = load_merged(spec, settings, manifest, device, dtype)
    tiny = load_tiny_vae(folder, manifest, spec.fix, device, dtype) if settings.vae == "tiny" else None
    pipeline = Pipeline(spec, diffusion, adapters, settings.max_batch, tiny)
    pipeline.revision, pipeline.usual_size = manifest.revision, size
    pipeline.allow_unsafe = settings.allow_unsafe
    if settings.safety == "off" or not spec.needs_safety_checker:
        logger.info("pictures of %s are not checked for safety", spec.name)
    else:
        fix = manifest.fix(spec.fix)
        pipeline.checker = load_safety_checker(folder, settings.safety, device, dtype, fix)
    if place:
        pipeline.engine = OpenVinoEngine(diffusion, pipeline.decoder, place, settings, dtype, size)
    elif settings.engine == "compiled":
        cache = folder.parent / COMPILED / spec.name
        pipeline.compile(CompiledEngine(diffusion.unet, pipeline.decoder, cache), settings.compiled)
    return pipeline


def _usual_size(spec: ModelSpec, settings: Settings) -> tuple[int, int]:
    """Of the images that the engine is made for, in px. Raises SettingsError for what cannot be generated."""
    name, sizes = "FEWSTEP_COMPILED", [(shape.width, shape.height) for shape in settings.compiled]
    if settings.engine in OPENVINO and settings.openvino_size:
        name, sizes = "FEWSTEP_OPENVINO_SIZE", [settings.openvino_size]
    elif settings.engine != "compiled" or not sizes:
        return spec.native_size, spec.native_size
    for width, height in sizes:
        try:
            Inputs.create(spec, prompt="any", aspect_ratio="custom", width=width, height=height)
        except InvalidRequest as error:
            raise SettingsError(f"{name} has a size that cannot be painted: {error.sentence}") from None
    return sizes[0]


class Pipeline:
    """A loaded model that generates in few steps: its LCM-LoRA is fused, or it is a full LCM."""

    def __init__(
        self,
        spec: ModelSpec,
        diffusion: Diffusion,
        adapters: WeightMerger,
        max_batch: int,
        tiny_vae: AutoencoderTiny | None = None,
    ) -> None:
        self.spec, self.diffusion, self.adapters, self.max_batch = spec, diffusion, adapters, max_batch
        self.revision = ""  # of the weights
        self.checker: SafetyChecker | None = None
        self.allow_unsafe = False
        self.usual_size = (spec.native_size, spec.native_size)  # in px, of images that the engine is made for
        self.text = TextEncoder(diffusion)
        self.decoder: Any = tiny_vae or diffusion.vae  # its latents are scaled by its own factor
        self.eager = Engine(diffusion.unet, self.decoder)
        self.engine = self.eager  # `eager` takes what it does not serve
        self.device: torch.device = diffusion.unet.device
        self.dtype: torch.dtype = diffusion.unet.dtype

    def request(self, inputs: Inputs, loras: Sequence[Lora] = ()) -> Request:
        """The request for `inputs`, whose styles are `loras`, in order; may be called on any thread.

        Raises InvalidRequest for a prompt that fills more chunks than the text encoders are given.
        """
        chunks = self.text.count_chunks("prompt", inputs.prompt_parts)
        if inputs.guided:
            chunks = max(chunks, self.text.count_chunks("negative_prompt", inputs.negative_parts))
        return Request(inputs, tuple(loras), chunks)

    def images(
        self, prompts: Sequence[str], seeds: Sequence[int], *, loras: Sequence[Lora] = (), **inputs: Any
    ) -> list[Image.Image]:
        """Generate one image for each prompt and seed, all of one shape; `loras` are those that `inputs`,
        the other inputs of `Inputs.create`, name as styles.

        Raises the FewstepError of the first that failed, ValueError for shapes that differ.
        """
        requests = [
            self.request(Inputs.create(self.spec, prompt=prompt, seed=seed, **inputs), loras)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        images: list[Image.Image] = []
        for result in self.generate([self.encode(request) for request in requests]):
            if isinstance(result, FewstepError):
                raise result
            images += result.images
        return images

    def warm_up(self, shape: Shape | None = None, steps: int = 1) -> None:
        """Generate a batch of `shape`, or one image of the usual size, for nobody. Raises as `images`."""
        shape = shape or Shape(*self.usual_size)
        guidance = 2.0 if shape.guided else None
        size: dict[str, Any] = {"aspect_ratio": "custom", "width": shape.width, "height": shape.height}
        with suppress(UnsafeImage):  # it was generated all the same
            prompts, seeds = ["warm up"] * shape.batch, range(shape.batch)
            self.images(prompts, seeds, steps=steps, guidance=guidance, **size)

    def compile(self, engine: CompiledEngine, shapes: Sequence[Shape]) -> None:
        """Let `engine` generate, compiled for batches of each of `shapes`, by default one of the usual size.

        Raises SettingsError for a batch that can never come.
        """
        for shape in shapes:
            if shape.batch > (most := self._room(shape.width, shape.height)):
                raise SettingsError(
                    f"FEWSTEP_COMPILED lists batches of {shape.batch}; FEWSTEP_MAX_BATCH allows {most}"
                )
        self.engine = engine
        engine.compile_for(shapes or (Shape(*self.usual_size),), partial(self.warm_up, steps=2))

    def max_images(self, request: Request) -> int:
        """How many images of this size go through the model at once; `max_batch` at the native size, and one
        where an engine takes them one by one: in a batch, all would wait for the last."""
        if self._engine_for(request).one_by_one:
            return 1
        return self._room(request.inputs.width, request.inputs.height)

    def _room(self, width: int, height: int) -> int:
        share = self.spec.native_size**2 / (width * height)
        return max(1, min(self.max_batch, int(self.max_batch * share)))

    def _engine_for(self, request: Request) -> Engine:
        return self.engine if self.engine.serves(request) else self.eager

    @torch.inference_mode()
    def encode(self, request: Request) -> EncodedRequest:
        """Add the request's LoRAs to the weights, and encode its prompts by them."""
        metrics: dict[str, float] = defaultdict(float)
        with _timed(metrics, "weights_ms"):
            self.adapters.apply(request.mix)
        with _timed(metrics, "text_ms"):
            # One at a time: in a batch, the mates' number would choose the kernels and so the last bits.
            inputs = request.inputs
            styles = [(lora.sha256, scale) for lora, scale in request.mix.styles if lora.changes_text]
            how = (request.chunks, inputs.clip_skip, tuple(styles))
            prompt, negative = self.text.encode(inputs.prompt_parts, *how), None
            if inputs.guided:
                negative = (
                    self.text.encode(inputs.negative_parts, *how)
                    if inputs.negative_prompt
                    else self.text.encode_nothing(prompt, *how)
                )
        return EncodedRequest(request, prompt, negative, metrics)

    @torch.inference_mode()
    def generate(
        self, batch: Sequence[EncodedRequest], stopped: Callable[[], bool] = lambda: False
    ) -> list[GenerationResult | FewstepError]:
        """Generate a batch of one shape key; an image that failed fails its own request only.

        `stopped`, whether every caller has left, is asked before every step. Raises Stopped when it says so,
        ValueError for keys that differ.
        """
        request = batch[0].request
        if len({encoded.request.shape_key for encoded in batch}) > 1:
            raise ValueError("requests of different shape keys cannot share a batch")
        metrics: dict[str, float] = defaultdict(float)
        for encoded in batch:
            for name, ms in encoded.metrics.items():
                metrics[name] += ms
        with _timed(metrics, "weights_ms"):
            self.adapters.apply(request.mix)
        jobs = [
            Job(encoded.request.inputs, encoded.prompt, encoded.negative, seed)
            for encoded in batch
            for seed in encoded.request.inputs.seeds
        ]
        engine, limit = self._engine_for(request), self.max_images(request)
        metrics["batch_size"] = min(limit, len(jobs))
        images: list[Image.Image | FewstepError] = []
        for first in range(0, len(jobs), limit):
            together = jobs[first : first + limit]
            inputs = [job.inputs for job in together]
            with _timed(metrics, "steps_ms"):
                latents = self._sample(engine, together, stopped)
            with _timed(metrics, "decode_ms"):
                decoded = tensors.decode_latents(engine, self.decoder, latents)
                decoded = [tensors.keep_unmasked(*pair) for pair in zip(decoded, inputs, strict=True)]
            with _timed(metrics, "safety_ms"):
                images += [self._checked(*pair) for pair in zip(decoded, inputs, strict=True)]
        in_turn = iter(images)
        return [_result(encoded.request.inputs, in_turn, metrics) for encoded in batch]

    def _sample(self, engine: Engine, jobs: Sequence[Job], stopped: Callable[[], bool]) -> Tensor:
        """Scaled latents (N, C, H / 8, W / 8) of jobs of one shape."""
        inputs = jobs[0].inputs
        scheduler = LCMScheduler.from_config(self.diffusion.scheduler.config)
        # A strength below one step of the schedule still takes that one.
        steps = plan(scheduler, inputs.real_steps, max(inputs.strength, 1 / SCHEDULE_STEPS))
        guidance = None
        if inputs.guided:
            scales = torch.tensor([job.inputs.guidance for job in jobs], device=self.device)
            guidance = scales[:, None, None, None]
        return sample(
            engine.unet,
            steps,
            tensors.make_start(self.diffusion, jobs, len(steps)),
            tensors.make_condition(self.diffusion, jobs, embedded_guidance=self.spec.embedded_guidance),
            guidance=guidance,
            strength=inputs.strength,
            stopped=stopped,
        )

    def _checked(self, image: Image.Image | FewstepError, inputs: Inputs) -> Image.Image | FewstepError:
        """The image, or why it is withheld."""
        allowed = inputs.unchecked and self.allow_unsafe
        if self.checker is None or allowed or isinstance(image, FewstepError):
            return image
        pixels = torch.from_numpy(np.array(image))[None].to(self.device)
        return withheld(int(self.checker.verdicts(pixels))) or image


@contextmanager
def _timed(metrics: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    metrics[name] += 1000 * (time.perf_counter() - started)


def _result(
    inputs: Inputs, images: Iterator[Image.Image | FewstepError], metrics: dict[str, float]
) -> GenerationResult | FewstepError:
    """One request's, of the next of `images`: flagged ones are dropped, all flagged is an error, and so is
    any other failure."""
    own = dict(zip(inputs.seeds, islice(images, inputs.num_outputs), strict=True))
    failures = [image for image in own.values() if isinstance(image, FewstepError)]
    for failure in failures:
        if not isinstance(failure, UnsafeImage) or len(failures) == len(own):
            return failure
    sound = {seed: image for seed, image in own.items() if isinstance(image, Image.Image)}
    known = {"seed": inputs.seed, "width": inputs.width, "height": inputs.height, "steps": inputs.real_steps}
    return GenerationResult(list(sound.values()), list(sound), {**known, **metrics, "flagged": len(failures)})
