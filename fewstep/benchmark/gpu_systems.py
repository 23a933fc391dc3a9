"""What a run of figures loads: fewstep in each of its ways, and plain diffusers; one of them at a time."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast
from unittest.mock import patch

import torch
from PIL import Image

from fewstep.benchmark.clock import forget_peak, now
from fewstep.benchmark.full_size import make_random
from fewstep.benchmark.gpu import Run
from fewstep.benchmark.systems import (
    Scenario,
    System,
    compile_all,
    load_own,
    load_plain,
    plain_system_of,
    prompts_and_seeds,
    system_of,
)
from fewstep.generation.load import LEAST_PSNR
from fewstep.generation.pipeline import Pipeline
from fewstep.models import fp8
from fewstep.models.device import fast_dtype
from fewstep.models.specs import RANDOM, get_model
from fewstep.settings import COMPILED, Shape

T = TypeVar("T")

MEMORY = Path("/dev/shm")  # Linux's disk in memory
ROOM_BYTES = 12 * 10**9  # for SDXL's files, twice as much as the largest, and what else is there
SEED = 7  # of the images whose quality is compared


@dataclass(frozen=True)
class Extent:
    """How much is measured: squares of `size` px in `steps` steps."""

    size: int
    images: int = 4  # whose quality is compared with fp32's
    captions: int = 300  # that the judge reads
    matrix: int = 8192  # its side
    batches: tuple[int, ...] = (1, 4, 8)
    steps: int = 4

    def of(self, batch: int = 1) -> Scenario:
        """Return `batch` images."""
        return Scenario(self.size, self.steps, batch=batch)


class Own:
    """A loaded `Pipeline`; `compiler` says whether its engine has something to compile."""

    def __init__(self, pipeline: Pipeline, compiler: bool) -> None:
        self.pipeline, self.compiler = pipeline, compiler
        self.system: System = system_of(pipeline)
        self._compiled = False

    @property
    def note(self) -> str:
        """What its figures are of, if that is not what its engine is for, and how many layers have 8 bits."""
        small = sum(isinstance(layer, fp8.Stored) for layer in self.pipeline.diffusion.unet.modules())
        notes = ["not all is compiled"] if self.compiler and not self._compiled else []
        return "; ".join(notes + ([f"{small} layers in 8 bits"] if small else []))

    def compile(self, until: float) -> None:
        """Compile all, unless `time.monotonic()` passes `until`."""
        self._compiled = compile_all(self.pipeline, until)


class Plain:
    """Diffusers' pipeline in `dtype`, with the VAE in fp32 as SDXL is published or not."""

    note = ""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.pipe = load_plain(folder, dtype, device.type)
        self.system: System = plain_system_of(self.pipe, dtype)
        timed = {"unet": (self.pipe.unet, "forward"), "vae": (self.pipe.vae, "decode")}
        self.system.timed.update({part: [method] for part, method in timed.items()})
        self.system.timed["text"] = [(self.pipe, "encode_prompt")]

    def upcast_vae(self, upcast: bool) -> None:
        """Decode in fp32 from now on, as SDXL's own VAE has to, or in the pipeline's dtype."""
        self.pipe.vae.register_to_config(force_upcast=upcast)


class Systems:
    """Loads what stages ask for, unless it is loaded; the last is dropped before another is loaded, so that
    memory's peaks are its own. After a `with` of it, nothing is left."""

    def __init__(self, run: Run, model: str, weights: Path, extent: Extent) -> None:
        self.run, self.model, self.extent = run, model, extent
        self.weights = weights
        self._loaded: tuple[Hashable, object] | None = None
        self._reference: list[Image.Image] = []
        self._folders = ExitStack()

    def __enter__(self) -> Systems:
        return self

    def __exit__(self, *_: object) -> None:
        self._loaded = None
        self._folders.close()

    @cached_property
    def scratch(self) -> Path:
        """A folder for this run, in memory if that has room."""
        in_memory = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > ROOM_BYTES
        folder = tempfile.TemporaryDirectory(dir=MEMORY if in_memory else None, prefix="fewstep-")
        return Path(self._folders.enter_context(folder))

    def root(self) -> Path:
        """Return the folder that holds the model's; one of random weights is made if there is none."""
        if not self.model.endswith(RANDOM) or (self.weights / self.model).exists():
            return self.weights
        if not (self.scratch / self.model).exists():
            started = time.perf_counter()
            folder = make_random(self.model.removesuffix(RANDOM), self.scratch, self.run.device)
            seconds = round(time.perf_counter() - started, 2)
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9
            self.run.row("random weights made", seconds=seconds, value=round(size, 2), unit="GB")
        return self.scratch

    def own(self, engine: str = "torch", vae: str = "full", **settings: Any) -> Own:
        """Return fewstep with this engine and VAE; `settings` are of Settings."""
        return self._own(
            self.model, self.root(), self.extent.size, self.extent.batches, engine, vae, **settings
        )

    def miniature(self, engine: str, batch: int) -> Own:
        """Return the miniature, made for batches of so many."""
        size = get_model("miniature").native_size
        return self._own("miniature", self.weights, size, (batch,), engine, "full")

    def _own(
        self,
        model: str,
        weights: Path,
        size: int,
        batches: Sequence[int],
        engine: str,
        vae: str,
        **settings: Any,
    ) -> Own:
        options = {"device": self.run.device.type, "engine": engine, "vae": vae, **settings}
        if engine in COMPILED:
            options["compiled"] = tuple(Shape(size, size, batch) for batch in batches)
        key = (model, *sorted(options.items()))
        # Of noise, 8 bits make other noise; how far it is from that of 16 is a figure of its own.
        least = -math.inf if model.endswith(RANDOM) else LEAST_PSNR
        with patch("fewstep.generation.load.LEAST_PSNR", least):
            return self._only(key, lambda: Own(load_own(model, weights, size, **options), engine in COMPILED))

    def plain(self, dtype: torch.dtype | None = None) -> Plain:
        """Return diffusers in `dtype`, by default in what fewstep takes on this device."""
        dtype = dtype or fast_dtype(self.run.device)
        return self._only(dtype, lambda: Plain(self.root() / self.model, dtype, self.run.device))

    def drop(self) -> None:
        """Let go what is loaded."""
        self._loaded = None
        forget_peak()

    def reference(self) -> list[Image.Image]:
        """Return what quality is measured by: images of plain diffusers in fp32, made once, beside what is
        loaded."""
        if not self._reference:
            with _exact_fp32():
                plain = Plain(self.root() / self.model, torch.float32, self.run.device)
                started = now()
                self._reference = self.images(plain.system)
            self.run.row(
                "the reference: diffusers in fp32",
                engine="diffusers",
                dtype="fp32",
                n=len(self._reference),
                seconds=round(now() - started, 2),
            )
        return self._reference

    def images(self, system: System) -> list[Image.Image]:
        """Return the images whose quality is compared, each generated alone."""
        scenario = self.extent.of()
        seeds = range(SEED, SEED + self.extent.images)
        return [system.generate(scenario, *prompts_and_seeds(scenario, seed))[0] for seed in seeds]

    def _only(self, key: Hashable, load: Callable[[], T]) -> T:
        if self._loaded is None or self._loaded[0] != key:
            self.drop()
            self._loaded = key, load()
        return cast(T, self._loaded[1])


@contextmanager
def _exact_fp32() -> Iterator[None]:
    """Multiply fp32 in fp32: by default, cuDNN rounds what it multiplies to TF32."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = False
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before
