"""What is measured, and how one run of it goes: every round starts each system anew, one after the other."""

from __future__ import annotations

import base64
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from fewstep.benchmark.quality import EXACT, all_right, load, psnr
from fewstep.benchmark.systems import PROMPT, Wish
from fewstep.coglet.server import ROOT, Server, ServerFailed, code_and_sentence, free_port, running_server

HTTP = "fewstep-http"  # the container's server, from the request to the bytes of the image in hand
Sample: TypeAlias = dict[str, Any]
PARTS = ("unet", "vae", "text", "encode")


@dataclass(frozen=True)
class Suite:
    """Systems and wishes that are compared; `repeats` images of each wish are timed in a round.

    The judge reads the images of `captions` prompts more, generated as `JUDGED`.
    """

    model: str
    systems: tuple[str, ...]
    wishes: tuple[Wish, ...]
    repeats: int
    captions: int = 0

    def of(self, system: str) -> Suite:
        """With the wishes for `system`: fewstep's OpenVINO is compiled for one size; others are torch's."""
        one_size = system.startswith("fewstep-openvino")
        asked = (wish for wish in self.wishes if not one_size or wish.size == self.wishes[0].size)
        return replace(self, wishes=tuple(asked))


JUDGED = Wish(128)
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
                Wish(size, steps, guidance)
                for size in (128, 64, 192, 256)  # OpenVINO is compiled for the first
                for steps in (1, 2, 4, 8)
                for guidance in (1.0, 1.5)
            ),
            Wish(128, batch=8),
        ),
        repeats=3,
        captions=300,
    ),
    "full": Suite("sdxl-random", COMPARED, (Wish(512),), repeats=1),
    "full-1024": Suite("sdxl-random", COMPARED, (Wish(1024, steps=1),), repeats=1),
}


def run(
    suite: Suite, weights: Path, rounds: int, told: Callable[[str], None]
) -> tuple[dict[tuple[str, Wish], list[Sample]], dict[tuple[str, Wish], dict[str, float]]]:
    """Every system's samples of every wish, over all rounds, and what the first round's images
    are worth."""
    found: dict[tuple[str, Wish], list[Sample]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(rounds):
            for system in suite.systems:
                told(f"round {i + 1} of {rounds}: {system}")
                images = Path(folder, str(i), system)
                captions = 0 if i else suite.captions
                for wish, sample in samples_of(system, suite.of(system), weights, images, captions):
                    found.setdefault((system, wish), []).append(sample)
        return found, _qualities(suite, weights, Path(folder, "0"))


def samples_of(
    system: str, suite: Suite, weights: Path, images: Path, captions: int
) -> Iterator[tuple[Wish, Sample]]:
    """Start `system` anew and time it; what it generates is left in `images`."""
    if system == HTTP:
        yield from _served(suite, weights)
        return
    texts = [json.dumps(asdict(wish)) for wish in suite.wishes]
    command = [sys.executable, "-P", "-m", "fewstep.benchmark.worker", system, suite.model, str(weights)]
    command += [str(suite.repeats), str(captions), str(images), *texts]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise ServerFailed(f"{system} ended with status {done.returncode}; its message is above")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    for i, row in enumerate(rows):
        yield suite.wishes[i // suite.repeats], row


def _qualities(suite: Suite, weights: Path, images: Path) -> dict[tuple[str, Wish], dict[str, float]]:
    """Of all but HTTP, whose files are compressed and come from the same pipeline."""
    found: dict[tuple[str, Wish], dict[str, float]] = {}
    for system in suite.systems:
        if not (images / system).is_dir():
            continue
        for wish in suite.of(system).wishes:
            row = found.setdefault((system, wish), {})
            if system != EXACT and EXACT in suite.systems:
                both = [
                    [image for i in range(suite.repeats) for image in load(images / name, f"{wish.name}-{i}")]
                    for name in (system, EXACT)
                ]
                row["psnr"] = round(psnr(*both), 1)
            if wish == JUDGED and suite.captions:
                row["right"] = round(all_right(images / system, suite.captions, weights), 1)
    return found


def _served(suite: Suite, weights: Path) -> Iterator[tuple[Wish, Sample]]:
    variables = {"MODEL": suite.model, "VERIFY": "size", "SAFETY": "off", "DEADLINE_S": "3600"}
    with serving(weights, ROOT, **variables) as server:
        seed = 0
        for wish in suite.wishes:
            if wish.batch > 4:  # more than one request may ask for
                continue
            for timed in (False, *(True,) * suite.repeats):
                seed += 100
                inputs = {
                    "prompt": f"{PROMPT} {seed}",
                    "seed": seed,
                    "steps": wish.steps if timed else 1,
                    "guidance": wish.guidance,
                    "aspect_ratio": "custom",
                    "width": wish.size,
                    "height": wish.size,
                    "num_outputs": wish.batch,
                }
                started = time.perf_counter()
                status, answer = server.post("/predictions", {"input": inputs})
                if status != 200 or answer["status"] != "succeeded":
                    raise ServerFailed(code_and_sentence(str(answer.get("error", answer))))
                [base64.b64decode(url.partition(",")[2]) for url in answer["output"]]
                seconds = time.perf_counter() - started
                if timed:
                    yield wish, {"seconds": seconds, **_stages(answer["metrics"])}


@contextmanager
def serving(weights: Path, root: Path, **variables: str) -> Iterator[Server]:
    """The server of the predict.py in `root`, ready; of all FEWSTEP_ variables, it has these."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        environ = {name: value for name, value in os.environ.items() if not name.startswith("FEWSTEP_")}
        environ |= {f"FEWSTEP_{name}": value for name, value in variables.items()}
        environ |= {"FEWSTEP_WEIGHTS": str(weights), "PYTHONPATH": str(ROOT), "TMPDIR": folder}
        with running_server(port=free_port(), log=log, environ=environ, root=root) as server:
            server.wait_ready()
            yield server


def _stages(metrics: Mapping[str, float]) -> Sample:
    """The server's own stopwatches, which go round each stage and not round the networks alone."""
    names = {"unet": "steps", "vae": "decode", "text": "text", "encode": "encode"}
    return {part: metrics[f"{name}_ms"] / 1000 for part, name in names.items()}


def summarised(samples: Sequence[Sample]) -> dict[str, Any]:
    """Medians with the spread of the whole, in seconds; `other` is what no part accounts for."""
    whole = [sample["seconds"] for sample in samples]
    rests = [one["seconds"] - sum(one[part] for part in PARTS if part in one) for one in samples]
    row: dict[str, Any] = {
        "dtype": samples[0].get("dtype", ""),
        "samples": len(samples),
        "seconds": _median(whole),
        "least": round(min(whole), 4),
        "most": round(max(whole), 4),
    }
    for part in PARTS:
        row[part] = _median([one[part] for one in samples]) if part in samples[0] else ""
    row["other"] = _median(rests)
    row["peak_gb"] = round(max(one["peak_gb"] for one in samples), 2) if "peak_gb" in samples[0] else ""
    return row


def _median(values: Sequence[float]) -> float:
    return round(statistics.median(values), 4)
