"""What is measured of fewstep and of plain diffusers while they generate.

Every image has its own seed, and unless its row says otherwise a prompt that no cache has seen. Clocks are
read when the device has done all that was asked of it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.benchmark import gpu_parts
from fewstep.benchmark.clock import forget_peak, now, peak_gb, seconds_of, stopwatches
from fewstep.benchmark.full_size import make_random_style
from fewstep.benchmark.gpu import Run
from fewstep.benchmark.gpu_systems import Extent, Own, Plain, Systems
from fewstep.benchmark.measure import in_turns, spread
from fewstep.benchmark.systems import prompts_and_seeds
from fewstep.benchmark.worker import BATCH, generate_captions
from fewstep.evaluation.metrics import psnr
from fewstep.lora.types import Mix
from fewstep.miniature.judge import load_judge
from fewstep.miniature.scoring import Evaluator
from fewstep.miniature.world.scenes import unseen_scenes
from fewstep.models.specs import RANDOM
from fewstep.settings import REPOSITORY

FRESH = count(1000, 100)  # a number for the prompts of a batch, that none before had
PARTS = {"text": "text", "steps": "unet", "decode": "vae"}  # a System's, by what the column calls them


class Figures:
    """The stages that generate, on what `systems` loads; each writes its rows to `run`."""

    def __init__(self, run: Run, systems: Systems, extent: Extent) -> None:
        self.run, self.systems, self.extent = run, systems, extent
        self._spent: dict[tuple[str, str, int], dict[str, list[float]]] = {}

    def load(self) -> None:
        """From files to a pipeline that generates: the seconds, and the most memory meanwhile."""
        self.systems.root()  # which may make random weights, before the clock starts
        started = now()
        own = self.systems.own()
        seconds = round(now() - started, 2)
        self.run.row("files to a pipeline, unhashed", seconds=seconds, peak_gb=peak_gb(), **_kind(own))
        first = seconds_of(partial(self._generate, own))
        self.run.row("the first image", seconds=round(first, 2), peak_gb=peak_gb(), **self._shape())

    def whole(self, engine: str, vae: str) -> None:
        """From prompts to images in the host's memory, by batch, and with the prompt's encoding cached."""
        own = self.systems.own(engine, vae)
        self._batches(own, "new prompts")
        cached = self.extent.of()
        seeds = count()
        with self.run.attempt("prompt cached", **self._shape()):
            figures = self.run.milliseconds(
                lambda: own.system.generate(cached, ["a lighthouse in a storm"], [next(seeds)])
            )
            self.run.row("prompt cached", **self._shape(), **_rate(figures), **_kind(own))

    def part(self, name: str, engine: str, vae: str) -> None:
        """What one part takes of a batch: `text`, from prompts to embeddings; `steps`, the evaluations of the
        UNet; `decode`, from latents to pixels on the device."""
        own = self.systems.own(engine, vae)
        for batch in (1, max(self.extent.batches)):
            with self.run.attempt(name, **self._shape(batch)):
                spent = self._parts(own, (engine, vae, batch))[PARTS[name]]
                self.run.row(name, **self._shape(batch), **_spread(spent), **_kind(own))

    def quality(self, engine: str, vae: str) -> None:
        """How far images are from those of plain diffusers in fp32, by their PSNR; of a tiny VAE with random
        weights it says nothing."""
        own = self.systems.own(engine, vae)
        images = self.systems.images(own.system)
        ratio = round(psnr(images, self.systems.reference()), 2)
        self.run.row("PSNR to fp32", psnr=ratio, n=len(images), **self._shape(), **_kind(own))

    def judged(self, engine: str) -> None:
        """What the judge says of the miniature's images of captions that it has not seen."""
        own = self.systems.miniature(engine, BATCH)
        own.compile(min(self.run.until, time.monotonic() + 30))
        captions = self.extent.captions
        images = generate_captions(own.system, captions)
        judge = load_judge(self.systems.weights / "miniature")
        right = 100 * float(Evaluator(judge, unseen_scenes(captions)).right(judge.look(images)).mean())
        self.run.row("the judge", right=round(right, 1), n=captions, **_kind(own))

    def compile(self, engine: str, vae: str, most_s: float) -> None:
        """How long the engine takes: until it generates, and until nothing is left to compile; an image's
        milliseconds at either."""
        self.systems.drop()
        started = now()
        own = self.systems.own(engine, vae)
        self._generate(own)
        self.run.row("until the first image", seconds=round(now() - started, 2), peak_gb=peak_gb())
        self._batches(own, "before compiling", batches=(1,))
        started = now()
        own.compile(min(self.run.until, time.monotonic() + most_s))
        self._generate(own)
        self.run.row("until compiled", seconds=round(now() - started, 2), peak_gb=peak_gb(), **_kind(own))

    def plain(self) -> None:
        """Diffusers as documented, in 16 bits: with the VAE in fp32, as SDXL's own has to be, and without."""
        plain = self.systems.plain()
        for upcast in (True, False) if self.run.on_cuda else (False,):
            plain.upcast_vae(upcast)
            what = "as documented, the VAE in fp32" if upcast else f"all in {plain.system.dtype}"
            self._batches(plain, what, (1, 8) if upcast else ())
            if not upcast:
                spent = self._parts(plain, ("diffusers", "full", 1))
                for name, part in PARTS.items():
                    self.run.row(f"{name} of it", **self._shape(), **_spread(spent[part]))
            with self.run.attempt(f"PSNR, {what}", **self._shape()):
                images = self.systems.images(plain.system)
                ratio = round(psnr(images, self.systems.reference()), 2)
                self.run.row(f"PSNR to fp32, {what}", psnr=ratio, n=len(images), **self._shape())

    def plain_compiled(self) -> None:
        """Diffusers with the UNet and the VAE's decoder compiled as it documents, for one image."""
        plain = self.systems.plain()
        plain.upcast_vae(False)
        how: dict[str, Any] = {"mode": "reduce-overhead", "fullgraph": True}
        started = now()
        try:
            plain.pipe.unet = torch.compile(plain.pipe.unet, **how)
            plain.pipe.vae.decode = torch.compile(plain.pipe.vae.decode, **how)
            for _ in range(2):  # the second time, CUDA graphs are recorded
                self._generate(plain)
            self.run.row("until compiled", seconds=round(now() - started, 2), peak_gb=peak_gb())
            self._batches(plain, "compiled, reduce-overhead", batches=(1,))
        finally:
            self.systems.drop()  # since it is not what others ask for

    def styles(self, engine: str) -> None:
        """How long the weights take to another style and back, and whether they come back to the last bit."""
        own = self.systems.own(engine)
        path = self._style()
        merger = own.pipeline.adapters
        started = now()
        style = merger.read(path, "benchmark")
        self.run.row(
            "read and checked", seconds=round(now() - started, 3), value=round(style.size / 1e6, 1), unit="MB"
        )
        unet = own.pipeline.diffusion.unet
        weights = unet.state_dict() | dict(unet.named_buffers())  # the scales of 8 bits among them
        before = {name: weight.clone() for name, weight in weights.items()}
        styled = Mix(styles=((style, 0.8),))
        layers = merger.apply(styled)
        changes = {"applied": styled, "taken back": Mix()}
        turns = {what: partial(seconds_of, partial(merger.apply, mix)) for what, mix in changes.items()}
        merger.apply(Mix())
        for what, seconds in in_turns(turns, 3).items():
            self.run.row(what, **_spread(seconds), value=layers, unit="layers", **_kind(own))
        equal = sum(_same(weights[name], weight) for name, weight in before.items())
        whole = "all" if equal == len(before) else "not all"
        self.run.row("tensors with their bits after it", value=equal, unit=f"of {len(before)}", note=whole)

    def memory(self, gigabytes: int) -> None:
        """What an image costs with the model fitted to a smaller card, by FEWSTEP_MEMORY."""
        try:
            own = self.systems.own(memory_gb=gigabytes)
            self._batches(own, f"fitted to {gigabytes} GB", batches=(1, 4))
        finally:
            if self.run.on_cuda:  # the setting holds for the process
                torch.cuda.set_per_process_memory_fraction(1.0)

    def after(self) -> None:
        """What is left of an image when the networks take no time, and its encoding to a file."""
        gpu_parts.after(self.run, self.systems.own(), self.extent)

    def layouts(self) -> None:
        """The networks in the orders that memory may have."""
        gpu_parts.layouts(self.run, self.systems.own().pipeline, self.extent)
        self.systems.drop()  # since they stay in the last one

    def _style(self) -> Path:
        if not self.systems.model.endswith(RANDOM):
            return REPOSITORY / "styles" / self.systems.model / "flat.safetensors"
        path = self.systems.scratch / "style.safetensors"
        if not path.exists():
            make_random_style(self.systems.model.removesuffix(RANDOM), path, self.run.device)
        return path

    def _generate(self, loaded: Own | Plain, batch: int = 1) -> None:
        scenario = self.extent.of(batch)
        loaded.system.generate(scenario, *prompts_and_seeds(scenario, next(FRESH)))

    def _batches(self, loaded: Own | Plain, what: str, batches: Sequence[int] = ()) -> None:
        """Time batches from new prompts to images."""
        for batch in batches or self.extent.batches:
            with self.run.attempt(what, **self._shape(batch)):
                forget_peak()
                taken = self.run.milliseconds(partial(self._generate, loaded, batch), batch**-0.5)
                figures = _rate(taken, batch) | {"peak_gb": peak_gb()}
                self.run.row(what, **self._shape(batch), **figures, **_kind(loaded))

    def _parts(self, loaded: Own | Plain, key: tuple[str, str, int]) -> dict[str, list[float]]:
        """Return the seconds of each part, of a few batches with a stopwatch round each; measured once."""
        if key not in self._spent:
            batch = key[2]
            self._generate(loaded, batch)
            taken: dict[str, list[float]] = {part: [] for part in PARTS.values()}
            for _ in range(max(2, 5 // batch)):
                with stopwatches(loaded.system.timed) as spent:
                    self._generate(loaded, batch)
                for part, seconds in spent.items():
                    taken[part].append(seconds)
            self._spent[key] = taken
        return self._spent[key]

    def _shape(self, batch: int = 1) -> dict[str, int]:
        return {"batch": batch, "size": self.extent.size, "steps": self.extent.steps}


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether all bits are; of 8 bits, which torch does not compare as numbers everywhere, as bytes."""
    if a.dtype.itemsize == 1:
        a, b = a.view(torch.uint8), b.view(torch.uint8)
    return torch.equal(a, b)


def _kind(loaded: Own | Plain) -> dict[str, str]:
    """The columns that say what generated."""
    return {"dtype": loaded.system.dtype, "note": loaded.note}


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    return spread("ms", [1000 * one for one in seconds], 3) | {"n": len(seconds)}


def _rate(figures: dict[str, float], batch: int = 1) -> dict[str, float]:
    return figures | {"images_per_s": round(1000 * batch / figures["ms"], 2)}
