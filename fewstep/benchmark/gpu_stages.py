"""Which figures `scripts/benchmark gpu` takes, and in which order: what matters most comes first."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from fewstep.benchmark import gpu_parts
from fewstep.benchmark.gpu import Run, Stage, run_stages
from fewstep.benchmark.gpu_figures import PARTS, Figures
from fewstep.benchmark.gpu_systems import Extent, Systems
from fewstep.benchmark.measure import nvidia_smi
from fewstep.errors import Refused
from fewstep.models.device import device_and_dtype
from fewstep.models.specs import get_model
from fewstep.settings import COMPILED, Settings

MEMORIES = (8, 12)  # GB, of cards that people have


def measure(
    model: str,
    weights: Path,
    path: Path,
    until: float,
    report: Callable[[str], None],
    *,
    device: str = "auto",
    size: int = 0,
    only: Collection[str] = (),
) -> list[str]:
    """Write every row to the CSV at `path`, until `time.monotonic()` is `until`, and return what failed.

    `device` is as Settings has it, `size` the side of images in px, or 0 for the model's native one; `only`
    names stages or engines, of which alone there are to be rows. Raises SettingsError for a device that is
    not there, Refused for a name that no stage has.
    """
    where, _ = device_and_dtype(Settings(device=device))
    extent = Extent(size or get_model(model).native_size)
    if where.type == "cpu":
        extent = replace(extent, images=2, captions=40, matrix=1024)
    machine = {"date": time.strftime("%Y-%m-%d"), "gpu": "", "driver": "", "torch": torch.__version__}
    if where.type == "cuda":
        machine |= {"gpu": nvidia_smi("name"), "driver": nvidia_smi("driver_version")}
    run = Run(where, path, until, machine, report)
    with Systems(run, model, weights, extent) as systems:
        return run_stages(run, _chosen(stages_of(run, systems, extent), only))


def _chosen(stages: list[Stage], only: Collection[str]) -> list[Stage]:
    names = [{stage.name, stage.columns.get("engine", "")} - {""} for stage in stages]
    known = sorted(set().union(*names))
    if unknown := set(only) - set(known):
        raise Refused(f"no stage or engine is {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    return [stage for stage, of_it in zip(stages, names, strict=True) if not only or of_it & set(only)]


def stages_of(run: Run, systems: Systems, extent: Extent) -> list[Stage]:
    """Return all, in their order. How long they may take is said for a GPU: on a CPU, as long as there is."""
    stages = list(_stages(run, systems, extent))
    return stages if run.on_cuda else [replace(stage, needs=0.0, limit=math.inf) for stage in stages]


def _stages(run: Run, systems: Systems, extent: Extent) -> Iterator[Stage]:
    """`needs` and `limit` are of an H200, with SDXL at 1024 px."""
    figures = Figures(run, systems, extent)
    torch_is = {"model": systems.model, "engine": "torch", "vae": "full"}
    diffusers_is = torch_is | {"engine": "diffusers"}
    yield Stage("machine", partial(gpu_parts.machine, run, extent), limit=30)
    yield Stage("load", figures.load, limit=120, columns=torch_is)
    yield from _of_engine(figures, "torch")
    yield Stage("after", figures.after, 5, 30, torch_is)
    yield _styles(figures, "torch")
    yield from _of_engine(figures, "compiled", compile_s=110)
    yield Stage("diffusers", figures.plain, 35, 90, diffusers_is)
    yield from _of_engine(figures, "compiled-fp8", compile_s=80)
    yield _styles(figures, "compiled-fp8")
    yield _judged(figures, "torch")
    yield Stage("attention", partial(gpu_parts.attention, run, extent), 5, 20)
    yield from _of_engine(figures, "torch", "tiny")
    yield from _of_engine(figures, "compiled", "tiny", compile_s=40)
    yield _judged(figures, "compiled-fp8")
    yield _judged(figures, "compiled")
    yield Stage("layouts", figures.layouts, 15, 30, torch_is)
    for gigabytes in MEMORIES:
        yield Stage("memory", partial(figures.memory, gigabytes), 20, 45, torch_is, cuda=True)
    yield Stage("diffusers", figures.plain_compiled, 70, columns=diffusers_is, cuda=True)


def _of_engine(figures: Figures, engine: str, vae: str = "full", compile_s: float = 0.0) -> Iterator[Stage]:
    """What is asked of an engine with a VAE; with the tiny one, only the whole."""
    columns = {"model": figures.systems.model, "engine": engine, "vae": vae}
    cuda = engine in COMPILED
    if compile_s:
        work = partial(figures.compile, engine, vae, compile_s)
        yield Stage("compile", work, 45, compile_s + 80, columns, cuda)
    yield Stage("whole", partial(figures.whole, engine, vae), 15, 60, columns, cuda)
    if vae == "full":
        for part in PARTS:
            yield Stage(part, partial(figures.part, part, engine, vae), 10, 40, columns, cuda)
        yield Stage("quality", partial(figures.quality, engine, vae), 15, 75, columns, cuda)


def _styles(figures: Figures, engine: str) -> Stage:
    columns = {"model": figures.systems.model, "engine": engine, "vae": "full"}
    return Stage("styles", partial(figures.styles, engine), 10, 45, columns, engine in COMPILED)


def _judged(figures: Figures, engine: str) -> Stage:
    columns = {"model": "miniature", "engine": engine, "vae": "full"}
    return Stage("judge", partial(figures.judged, engine), 15, 110, columns, engine in COMPILED)
