"""The loaded model: encode requests, generate batches of them.

    pipeline = load_pipeline(get_model("miniature"), Settings.from_env())  # of generation/load.py
    [image] = pipeline.images(["a red house in the snow"], [7])

A pipeline belongs to the thread that uses it: diffusers' are not thread-safe, and nothing here is either.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import count, islice
from typing import Any

import torch
from diffusers import AutoencoderTiny, LCMScheduler
from PIL import Image
from torch import Tensor

from fewstep.errors import DeviceLost, FewstepError, OutOfMemory, SettingsError, UnsafeImage
from fewstep.generation import tensors
from fewstep.generation.engines import Engine
from fewstep.generation.engines.compiled import CompiledEngine
from fewstep.generation.safety import SafetyChecker
from fewstep.generation.sampler import Step, plan, sample
from fewstep.generation.stopwatch import Stopwatch
from fewstep.generation.tensors import EncodedRequest, Job
from fewstep.generation.text_encoder import TextEncoder
from fewstep.lora.merge import WeightMerger
from fewstep.lora.types import Lora
from fewstep.models.device import is_device_error, is_out_of_memory, to_device
from fewstep.models.load import Diffusion
from fewstep.models.specs import ModelSpec
from fewstep.request import SCHEDULE_STEPS, Inputs, Request
from fewstep.settings import Shape

logger = logging.getLogger(__name__)

# How long a start goes on compiling, in s, before the server takes requests and compiles while it is idle.
COMPILE_AT_START_S = 30.0
NATIVE_BATCHES = (1, 2, 4, 8)
PLANS_KEPT = 256


@dataclass(frozen=True)
class GenerationResult:
    """What one request gets: its images, but for those that were flagged, and what making them cost."""

    images: list[Image.Image]
    seeds: list[int]  # of each
    metrics: dict[str, int | float]


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
        self.text = TextEncoder(diffusion, diffusion.unet.device)  # wherever they are between their calls
        self.decoder: Any = tiny_vae or diffusion.vae  # its latents are scaled by its own factor
        self.eager = Engine(diffusion.unet, self.decoder)
        self.engine = self.eager  # `eager` takes what it does not serve
        self.device: torch.device = diffusion.unet.device
        self.dtype: torch.dtype = diffusion.unet.dtype
        # How many images at once fit where more did not, by what decides about memory.
        self._fits: dict[tuple[int, int, bool], int] = {}
        self._warm_ups = count()
        self._plan = lru_cache(PLANS_KEPT)(self._make_plan)  # it takes a millisecond or two

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

    def warm_up(self, shape: Shape | None = None) -> None:
        """Generate a batch of `shape`, or one image of the usual size, for nobody. Raises as `images`."""
        shape = shape or Shape(*self.usual_size)
        guidance = 2.0 if shape.guided else None
        size: dict[str, Any] = {"aspect_ratio": "custom", "width": shape.width, "height": shape.height}
        with suppress(UnsafeImage):  # it was generated all the same
            # Prompts that are encoded, and not known already.
            prompts, seeds = [f"warm up {next(self._warm_ups)}"] * shape.batch, range(shape.batch)
            self.images(prompts, seeds, steps=1, guidance=guidance, **size)

    def compile(self, engine: CompiledEngine, shapes: Sequence[Shape]) -> None:
        """Let `engine` generate, made ready for batches of each of `shapes`, by default of 1, 2, 4 and 8 of
        the usual size, and compiled for them as far as half a minute goes; `improve` does the rest.

        Raises SettingsError for a batch that can never come.
        """
        for shape in shapes:
            if shape.batch > (most := self._room(shape.width, shape.height)):
                raise SettingsError(
                    f"FEWSTEP_COMPILED lists batches of {shape.batch}; FEWSTEP_MAX_BATCH, or the GPU's memory"
                    f", allows {most}"
                )
        most = self._room(*self.usual_size)
        usual = [Shape(*self.usual_size, batch=batch) for batch in NATIVE_BATCHES if batch <= most]
        self.engine = engine
        started = time.monotonic()
        engine.prepare(shapes or usual, self.warm_up)
        while time.monotonic() - started < COMPILE_AT_START_S and self.improve():
            pass

    def improve(self) -> bool:
        """Do a part, of some seconds, of what makes the engine faster; whether more of it is left."""
        with _device_errors_named():
            return self.engine.improve()

    def max_images(self, request: Request) -> int:
        """How many images of this size go through the model at once; `max_batch` at the native size, and one
        where an engine takes them one by one: in a batch, all would wait for the last."""
        if self._engine_for(request).one_by_one:
            return 1
        inputs = request.inputs
        room = self._room(inputs.width, inputs.height)
        return min(room, self._fits.get(_memory_key(inputs), room))

    def _room(self, width: int, height: int) -> int:
        share = self.spec.native_size**2 / (width * height)
        return max(1, min(self.max_batch, int(self.max_batch * share)))

    def _engine_for(self, request: Request) -> Engine:
        return self.engine if self.engine.serves(request) else self.eager

    @torch.inference_mode()
    def encode(self, request: Request) -> EncodedRequest:
        """Add the request's LoRAs to the weights, and encode its prompts by them.

        Raises DeviceLost, and OutOfMemory.
        """
        with _device_errors_named():
            try:
                return self._encode(request)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            self._release()
            return self._encode(request)

    def _encode(self, request: Request) -> EncodedRequest:
        stopwatch = Stopwatch(self.device)
        with stopwatch.stage("weights_ms"):
            self.adapters.apply(request.mix)
        with stopwatch.stage("text_ms"):
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
        return EncodedRequest(request, prompt, negative, stopwatch)

    @torch.inference_mode()
    def generate(
        self, batch: Sequence[EncodedRequest], stopped: Callable[[], bool] = lambda: False
    ) -> list[GenerationResult | FewstepError]:
        """Generate a batch of one shape key; an image that failed fails its own request only.

        `stopped`, whether every caller has left, is asked before every step. What does not fit the GPU's
        memory goes through in halves. Raises Stopped when it says so, OutOfMemory when not even one image
        fits, DeviceLost, and ValueError for keys that differ.
        """
        request = batch[0].request
        if len({encoded.request.shape_key for encoded in batch}) > 1:
            raise ValueError("requests of different shape keys cannot share a batch")
        jobs = [
            Job(encoded.request.inputs, encoded.prompt, encoded.negative, seed, self._is_unchecked(encoded))
            for encoded in batch
            for seed in encoded.request.inputs.seeds
        ]
        stopwatch = Stopwatch(self.device)
        images: list[Image.Image | FewstepError] = []
        with _device_errors_named():
            with stopwatch.stage("weights_ms"):
                self.adapters.apply(request.mix)
            engine, batch_size = self._engine_for(request), min(self.max_images(request), len(jobs))
            may_release = True
            while len(images) < len(jobs):
                together = jobs[len(images) :][: self.max_images(request)]
                made = self._together(engine, together, stopped, stopwatch)
                if made is not None:
                    images += made
                elif may_release and self._release():
                    may_release = False  # once: it may be enough, and comes back with the next recordings
                else:
                    batch_size = self._halve(request, len(together))
        metrics = _sum_of([encoded.stopwatch.read() for encoded in batch] + [stopwatch.read()])
        in_turn, metrics["batch_size"] = iter(images), batch_size
        return [_result(encoded.request.inputs, in_turn, metrics) for encoded in batch]

    def _together(
        self, engine: Engine, jobs: Sequence[Job], stopped: Callable[[], bool], stopwatch: Stopwatch
    ) -> list[Image.Image | FewstepError] | None:
        """The images of jobs of one shape that go through the model at once; None when memory does not do."""
        engine.begin()
        try:
            with stopwatch.stage("steps_ms"):
                latents = self._sample(engine, jobs, stopped)
            return tensors.decode_latents(engine.decode, self.decoder, latents, jobs, self.checker, stopwatch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            logger.warning("%d images at once do not fit the GPU's memory: %s", len(jobs), error)
        return None  # out of the except clause, whose traceback holds the tensors

    def _halve(self, request: Request, images: int) -> int:
        """How many images like those of `request` go together from now on, after so many did not fit.

        Raises OutOfMemory after one.
        """
        self._release()
        inputs = request.inputs
        if images == 1:
            raise OutOfMemory(
                f"the GPU's memory does not hold an image of {inputs.width}x{inputs.height} px; "
                "ask for a smaller one"
            )
        self._fits[_memory_key(inputs)] = images // 2
        return images // 2

    def _release(self) -> bool:
        """Give back what is held for speed alone; whether there was any."""
        released = self.engine.release()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return released

    def _is_unchecked(self, encoded: EncodedRequest) -> bool:
        return self.allow_unsafe and encoded.request.inputs.unchecked

    def _make_plan(self, count: int, strength: float) -> list[Step]:
        return plan(LCMScheduler.from_config(self.diffusion.scheduler.config), count, strength)

    def _sample(self, engine: Engine, jobs: Sequence[Job], stopped: Callable[[], bool]) -> Tensor:
        """Scaled latents (N, C, H / 8, W / 8) of jobs of one shape."""
        inputs = jobs[0].inputs
        # A strength below one step of the schedule still takes that one.
        steps = self._plan(inputs.real_steps, max(inputs.strength, 1 / SCHEDULE_STEPS))
        guidance = None
        if inputs.guided:
            scales = torch.tensor([job.inputs.guidance for job in jobs])
            guidance = to_device(scales, self.device)[:, None, None, None]
        return sample(
            engine.unet,
            steps,
            tensors.make_start(self.diffusion, jobs, len(steps)),
            tensors.make_condition(self.diffusion, jobs, embedded_guidance=self.spec.embedded_guidance),
            guidance=guidance,
            strength=inputs.strength,
            stopped=stopped,
        )


@contextmanager
def _device_errors_named() -> Iterator[None]:
    """Turn an error after which the device answers nothing more into DeviceLost, and a lack of memory outside
    of a batch into OutOfMemory."""
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemory("the GPU's memory is full; ask again later, or for less") from error
        if is_device_error(error):
            raise DeviceLost("the GPU failed; the server has to be started anew") from error
        raise


def _memory_key(inputs: Inputs) -> tuple[int, int, bool]:
    """What decides how much memory an image takes."""
    return inputs.width, inputs.height, inputs.guided


def _sum_of(parts: Sequence[Mapping[str, float]]) -> dict[str, int | float]:
    total: dict[str, int | float] = defaultdict(float)
    for part in parts:
        for name, value in part.items():
            total[name] += value
    return total


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
