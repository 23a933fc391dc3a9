"""What is measured, and how one run of it goes: every round starts each system anew, one after the other."""

from __future__ import annotations

import base64
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image

from fewstep.benchmark.measure import only, predict, serving, spread
from fewstep.benchmark.roofline import roofline
from fewstep.benchmark.systems import ON_CUDA, PROMPT, Scenario
from fewstep.errors import ServerFailed
from fewstep.evaluation.figures import plot_bars
from fewstep.evaluation.metrics import psnr
from fewstep.miniature.judge import load_judge
from fewstep.miniature.scoring import Evaluator
from fewstep.miniature.world.scenes import unseen_scenes

HTTP = "fewstep-http"  # the container's server, from the request to the bytes of the image in hand
EXACT = "diffusers"  # the system that the others' images are compared with: plain diffusers in fp32
ROOFLINE = "FLOPs at the rate of matmul"
Sample: TypeAlias = dict[str, Any]
Measured: TypeAlias = tuple[str, Scenario]  # a system and what it generates
# The networks that stopwatches go round, by what the server calls the stage.
PARTS = {"unet": "steps", "vae": "decode", "text": "text", "encode": "encode"}
LABELS = {"unet": "UNet", "vae": "VAE", "text": "text encoders", "encode": "encoding", "other": "all else"}


@dataclass(frozen=True)
class Suite:
    """Systems and scenarios that are compared; `repeats` images of each are timed in a round.

    The judge reads the images of `captions` prompts more, generated as `JUDGED`.
    """

    model: str
    systems: tuple[str, ...]
    scenarios: tuple[Scenario, ...]
    repeats: int
    captions: int = 0

    def of(self, system: str) -> Sequence[Scenario]:
        """Return the scenarios for `system`: fewstep's OpenVINO is compiled for the first one's size, and
        takes torch for the others."""
        size, one_size = self.scenarios[0].size, system.startswith("fewstep-openvino")
        return [scenario for scenario in self.scenarios if scenario.size == size or not one_size]

    def on(self, cuda: bool) -> Suite:
        """Return what a machine with or without CUDA compares: OpenVINO is for CPUs."""
        if not cuda:
            return self
        systems = [name for name in self.systems if "openvino" not in name]
        return replace(self, systems=(*systems, *ON_CUDA))


@dataclass
class Results:
    """What has been measured so far."""

    samples: dict[Measured, list[Sample]] = field(default_factory=lambda: defaultdict(list))
    qualities: dict[Measured, dict[str, float]] = field(default_factory=dict)  # of the first round's images
    failures: dict[str, str] = field(default_factory=dict)  # of systems: the sentence


JUDGED = Scenario(256)
COMPARED = (
    "fewstep",
    "fewstep-openvino",
    "fewstep-openvino-int8",
    "fewstep-openvino-int8-tiny-vae",
    HTTP,
    "openvino",
    "diffusers-bf16",
    "diffusers",
    "reference",
)
SUITES = {
    "miniature": Suite(
        "miniature",
        COMPARED,
        (
            *(
                Scenario(size, steps, guidance)
                for size in (256, 128, 192, 384)  # OpenVINO is compiled for the first
                for steps in (1, 2, 4, 8)
                for guidance in (1.0, 1.5)
            ),
            Scenario(256, batch=8),
        ),
        repeats=3,
        captions=300,
    ),
    "full": Suite("sdxl-random", COMPARED, (Scenario(512),), repeats=1),
    "full-1024": Suite("sdxl-random", COMPARED, (Scenario(1024, steps=1),), repeats=1),
}


def measure(
    name: str, weights: Path, rounds: int, report: Callable[[str], None]
) -> Iterator[list[dict[str, Any]]]:
    """Yield, after every round, a row for every system and scenario of a suite, for every system that failed,
    which has an `error` and no figures of later rounds, and for the roofline."""
    suite = SUITES[name].on(cuda=torch.cuda.is_available())
    bounds: list[dict[str, Any]] = []
    for results in run(suite, weights, rounds, report):
        rows = [
            {"suite": name, "system": system, **vars(scenario), **summarised(taken), "psnr": "", "right": ""}
            | results.qualities.get((system, scenario), {})
            for (system, scenario), taken in results.samples.items()
        ]
        dtypes = [row["dtype"] for row in rows if row["system"] == "fewstep"]
        if dtypes and not bounds:
            bounds = roofline(weights / suite.model, suite.scenarios, dtypes[0])
        rows += [{"suite": name, "system": system, "error": why} for system, why in results.failures.items()]
        yield rows + [{"suite": name, **row} for row in bounds]


def run(suite: Suite, weights: Path, rounds: int, report: Callable[[str], None]) -> Iterator[Results]:
    """Yield all results so far after every round; a system that has failed is left out of those that follow.

    Raises ServerFailed when none is left.
    """
    results = Results()
    with tempfile.TemporaryDirectory() as folder:
        for i in range(rounds):
            for system in [name for name in suite.systems if name not in results.failures]:
                report(f"round {i + 1} of {rounds}: {system}")
                captions = 0 if i else suite.captions
                try:
                    if system == HTTP:
                        taken = _served(suite, weights)
                    else:
                        taken = _in_process(system, suite, weights, Path(folder, str(i), system), captions)
                    for scenario, sample in list(taken):  # all or none
                        results.samples[system, scenario].append(sample)
                except ServerFailed as error:
                    results.failures[system] = str(error)
                    report(str(error))
            if len(results.failures) == len(suite.systems):
                raise ServerFailed(f"none of the systems came up: {'; '.join(results.failures.values())}")
            if i == 0:
                results.qualities = _qualities(suite, weights, Path(folder, "0"), results.failures)
            yield results


def _in_process(
    system: str, suite: Suite, weights: Path, images: Path, captions: int
) -> Iterator[tuple[Scenario, Sample]]:
    """Start `system` anew and time it; what it generates is left in `images`."""
    scenarios = suite.of(system)
    command = [sys.executable, "-P", "-m", "fewstep.benchmark.worker", system, suite.model, weights]
    command += [suite.repeats, captions, images, *(json.dumps(asdict(scenario)) for scenario in scenarios)]
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ServerFailed(f"{system} ended with status {done.returncode}; its message is above")
    for i, line in enumerate(done.stdout.splitlines()):
        yield scenarios[i // suite.repeats], json.loads(line)


def _served(suite: Suite, weights: Path) -> Iterator[tuple[Scenario, Sample]]:
    environ = only(weights, MODEL=suite.model, VERIFY="size", SAFETY="off", DEADLINE_S="3600")
    with serving(environ) as server:
        seed = 0
        for scenario in suite.scenarios:
            if scenario.batch > 4:  # more than one request may ask for
                continue
            for timed in (False, *[True] * suite.repeats):
                seed += 100
                inputs = {**scenario.inputs, "num_outputs": scenario.batch}
                inputs |= {"prompt": f"{PROMPT} {seed}", "seed": seed, **({} if timed else {"steps": 1})}
                started = time.perf_counter()
                answer = predict(server, **inputs)
                [base64.b64decode(url.partition(",")[2]) for url in answer["output"]]
                seconds = time.perf_counter() - started
                if timed:  # the server's own stopwatches go round each stage and not the networks alone
                    parts = {part: answer["metrics"][f"{name}_ms"] / 1000 for part, name in PARTS.items()}
                    yield scenario, {"seconds": seconds, **parts}


def _qualities(
    suite: Suite, weights: Path, images: Path, failures: Container[str]
) -> dict[Measured, dict[str, float]]:
    """Judge the images of all but what failed and HTTP, whose files are compressed and come from the same
    pipeline."""
    qualities: dict[Measured, dict[str, float]] = defaultdict(dict)
    systems = [system for system in suite.systems if system != HTTP and system not in failures]
    for system in systems:
        for scenario in suite.of(system):
            row = qualities[system, scenario]
            if system != EXACT and EXACT in systems:
                both = [_load(images / name, scenario.name) for name in (system, EXACT)]
                row["psnr"] = round(psnr(*both), 1)
            if scenario == JUDGED and suite.captions:
                evaluator = Evaluator(load_judge(weights / "miniature"), unseen_scenes(suite.captions))
                right = evaluator.right(evaluator.judge.look(_load(images / system, "caption")))
                row["right"] = round(100 * float(right.mean()), 1)
    return qualities


def _load(folder: Path, name: str) -> list[Image.Image]:
    """Load what the worker saved, in its order."""
    paths = sorted(folder.glob(f"{name}-*.png"), key=lambda path: int(path.stem.rpartition("-")[2]))
    return [Image.open(path) for path in paths]


def summarised(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return medians with the spread of the whole, in seconds; `other` is what no part accounts for."""
    first = samples[0]
    figures = {part: [sample[part] for sample in samples] for part in PARTS if part in first}
    figures["other"] = [sample["seconds"] - sum(sample[part] for part in figures) for sample in samples]
    return {
        "dtype": first.get("dtype", ""),
        "samples": len(samples),
        **spread("seconds", [sample["seconds"] for sample in samples], 4),
        **dict.fromkeys(PARTS, ""),
        **{part: round(statistics.median(values), 4) for part, values in figures.items()},
        "peak_gb": round(max(sample["peak_gb"] for sample in samples), 2) if "peak_gb" in first else "",
    }


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw a bar for each system, of the plain scenario: first size, unguided, in 4 steps if there are."""
    size = rows[0]["size"]
    steps = 4 if any(row["steps"] == 4 for row in rows) else rows[0]["steps"]
    plain = vars(Scenario(size, steps))
    shown = [row for row in rows if plain.items() <= row.items()]
    bars = {}
    for row in shown:
        name = f"{row['system'].removesuffix('-bf16')} {row['dtype']}".strip()
        bars[name] = {label: float(row.get(part) or 0) for part, label in LABELS.items()}
        if row["system"] == "floor":
            bars[name] = {ROOFLINE: row["seconds"]}
    x = f"seconds for one picture of {size} px in {steps} steps, {rows[0]['cpu']}, {rows[0]['cores']} cores"
    plot_bars(bars, [row["seconds"] for row in shown], x, path)
