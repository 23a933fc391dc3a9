"""Many callers of one server: images a second, and what a caller waits, of the miniature in 4 steps."""

from __future__ import annotations

import base64
import io
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fewstep.benchmark.measure import in_turns, only, serving, spread
from fewstep.benchmark.systems import PROMPT, SYSTEMS, Scenario, prompts_and_seeds
from fewstep.coglet.server import ROOT, Server
from fewstep.evaluation.figures import Panel, lines_of, plot_lines

PLAIN = Path(__file__).parent / "plain"
SLOTS = 8  # as many requests as the server takes at a time, and images in a batch
CLIENTS = (1, 2, 4, 8, 16)
REQUESTS = 96  # of each number of callers
# After the server said that it has no room, doubled from the one up to the other. It has room for a caller
# again a moment after the caller has its answer.
RETRY_S = (0.001, 0.2)
GENERATE = Scenario(256, batch=SLOTS)
# In a round, of SLOTS callers between images of `Pipeline.generate`; they ask for twice as many images as
# others do, since the first batch of a load and the last are seldom full.
TURNS = 4

# Each with the folder of its predict.py and its dtype.
SERVERS: dict[str, tuple[Path, str]] = {
    "fewstep": (ROOT, "auto"),
    "fewstep-fp32": (ROOT, "fp32"),
    "diffusers-bf16": (PLAIN, "bf16"),
    "diffusers": (PLAIN, "fp32"),
}


@dataclass(frozen=True)
class LoadResult:
    """What callers got, each of whom asks again as soon as it is answered."""

    seconds: float
    waited: list[float]  # of each answered request, in seconds
    lost: int
    together: float  # images in the batch of an answer, on average
    alone: float = 0.0  # images a second that `Pipeline.generate` makes right before and after; 0: not asked

    @property
    def images_per_s(self) -> float:
        return len(self.waited) / self.seconds


def served(name: str, weights: Path, max_batch: int = SLOTS) -> AbstractContextManager[Server]:
    """Run the server `name`, ready, until the end."""
    root, dtype = SERVERS[name]
    return serving(only(weights, DTYPE=dtype, MAX_BATCH=str(max_batch)), root)


@dataclass(frozen=True)
class Reply:
    """What a caller got."""

    file: bytes | None  # None: it was lost
    seconds: float
    batch: int = 1  # how many images were generated together


def ask(server: Server, number: int, **more: Any) -> Reply:
    """Ask for image `number`, as often as the server has no room for it."""
    inputs = {"prompt": f"{PROMPT} {number}", "seed": number, **more}
    started, (pause, longest) = time.perf_counter(), RETRY_S
    while True:
        status, answer = server.post("/predictions", {"input": inputs})
        if status != 409:
            break
        time.sleep(pause)
        pause = min(2 * pause, longest)
    seconds = time.perf_counter() - started
    if status != 200 or answer["status"] != "succeeded":
        return Reply(None, seconds)
    [url] = answer["output"]
    return Reply(base64.b64decode(url.partition(",")[2]), seconds, answer["metrics"].get("batch_size", 1))


def put_load(server: Server, clients: int, numbers: Iterable[int]) -> LoadResult:
    """Ask for the images of these `numbers`, by `clients` callers; the server has seen none before."""
    with ThreadPoolExecutor(clients) as callers:
        started = time.perf_counter()
        answers = list(callers.map(partial(ask, server), numbers))
        seconds = time.perf_counter() - started
    images = [answer for answer in answers if answer.file is not None]
    together = statistics.fmean(answer.batch for answer in images) if images else 0.0
    return LoadResult(seconds, [answer.seconds for answer in images], len(answers) - len(images), together)


def differences(server: Server, requests: int) -> dict[str, float]:
    """Compare images that were generated beside others to the same alone: the most that any value differs, of
    255, and the share of the values that differ by more than 1, in percent."""
    lossless = partial(ask, server, output_format="png")
    with ThreadPoolExecutor(SLOTS) as callers:
        answers = list(callers.map(lossless, range(requests)))
    together = [i for i, answer in enumerate(answers) if answer.batch > 1]
    far = np.abs(np.array([_values(answers[i]) - _values(lossless(i)) for i in together]))
    return {"most_apart": int(far.max()), "percent_above_1": round(float(100 * (far > 1).mean()), 4)}


def _values(answer: Reply) -> Any:
    if answer.file is None:
        raise ValueError("a picture was lost")
    return np.asarray(Image.open(io.BytesIO(answer.file)), dtype=int)


def lone_waits(weights: Path, requests: int) -> dict[int, float]:
    """Return the median wait of a caller who is alone, in seconds, by how many images the server would put
    into a batch; the servers are asked in turns."""
    with ExitStack() as stack:
        measured = {}
        for limit in (SLOTS, 1):
            server, numbers = stack.enter_context(served("fewstep", weights, limit)), count(10_000)
            measured[limit] = partial(_wait_s, server, numbers)
        waits = in_turns(measured, requests, warm_up=SLOTS)
    return {limit: statistics.median(seconds) for limit, seconds in waits.items()}


def _wait_s(server: Server, numbers: Iterator[int]) -> float:
    return ask(server, next(numbers)).seconds


def beside_generate(
    name: str, server: Server, weights: Path, numbers: Iterator[int], requests: int
) -> Iterator[LoadResult]:
    """Put the load of as many callers as it has slots on a server, in turns with `Pipeline.generate` in this
    process: what slows the machine slows both."""
    system, seed = SYSTEMS[name]("miniature", weights, GENERATE.size), count(step=SLOTS)

    def generate(batches: int) -> float:
        started = time.perf_counter()
        for _ in range(batches):
            system.generate(GENERATE, *prompts_and_seeds(GENERATE, next(seed)))
        return time.perf_counter() - started

    generate(2)
    batches = max(1, requests // SLOTS // 2)
    before = generate(batches)
    for _ in range(TURNS):
        load, after = put_load(server, SLOTS, islice(numbers, requests)), generate(batches)
        yield replace(load, alone=2 * SLOTS * batches / (before + after))
        before = after


def measure(weights: Path, rounds: int, report: Callable[[str], None]) -> list[dict[str, Any]]:
    """Put every load on every server in every round, and return a row for each."""
    loads, far = run(weights, rounds, REQUESTS, report)
    report("a caller who is alone")
    return rows_of(loads, far, lone_waits(weights, 2 * REQUESTS))


def run(
    weights: Path, rounds: int, requests: int, report: Callable[[str], None]
) -> tuple[dict[tuple[str, int], list[LoadResult]], dict[str, dict[str, float]]]:
    """Return the loads by server and number of clients, and of fewstep how far batched images are from lone
    ones."""
    loads: dict[tuple[str, int], list[LoadResult]] = {}
    far: dict[str, dict[str, float]] = {}
    for i in range(rounds):
        for name, (root, _) in SERVERS.items():
            report(f"round {i + 1} of {rounds}: {name}")
            with served(name, weights) as server:
                numbers = count(10_000)  # words that are in no cache
                put_load(server, SLOTS, islice(numbers, 2 * SLOTS))
                for clients in CLIENTS:
                    if root == ROOT and clients == SLOTS:
                        taken = list(beside_generate(name, server, weights, numbers, 2 * requests))
                    else:
                        taken = [put_load(server, clients, islice(numbers, requests))]
                    loads.setdefault((name, clients), []).extend(taken)
                if root == ROOT and i == 0:
                    far[name] = differences(server, 4 * SLOTS)
    return loads, far


def rows_of(
    loads: dict[tuple[str, int], list[LoadResult]], far: dict[str, dict[str, float]], lone: dict[int, float]
) -> list[dict[str, Any]]:
    """Return a row for each server and number of clients, the medians over the rounds; `of_generate` is the
    median share that a load got of what `generate` made beside it, in percent."""
    rows: list[dict[str, Any]] = []
    generated: list[dict[str, Any]] = []
    for (name, clients), rounds in loads.items():
        waits = [1000 * wait for load in rounds for wait in load.waited]
        shares = [100 * load.images_per_s / load.alone for load in rounds if load.alone]
        row = {
            "system": name,
            "clients": clients,
            **spread("images_per_s", [load.images_per_s for load in rounds], 2),
            "of_generate": round(statistics.median(shares), 1) if shares else "",
            "wait_ms": round(statistics.median(waits), 1),
            "wait_p95_ms": round(float(np.percentile(waits, 95)), 1),
            "requests": sum(len(load.waited) + load.lost for load in rounds),
            "lost": sum(load.lost for load in rounds),
            "together": round(statistics.fmean(load.together for load in rounds), 1),
        }
        rows.append(row | (far.get(name, {}) if clients == SLOTS else {}))
        if shares:
            rates = spread("images_per_s", [load.alone for load in rounds], 2)
            generated.append({"system": f"{name}-generate", "clients": "", **rates})
    alone = [(f"fewstep-lone-max-batch-{limit}", round(1000 * wait, 2)) for limit, wait in lone.items()]
    return rows + generated + [{"system": name, "clients": 1, "wait_ms": wait} for name, wait in alone]


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw images a second against the number of callers, beside what a batch takes without a server."""
    loads = lines_of([row for row in rows if row.get("requests")], "system", "clients", "images_per_s")
    levels = {
        name: row["images_per_s"] for name in loads for row in rows if row["system"] == f"{name}-generate"
    }
    y = f"images a second, {rows[0]['cpu']}, {rows[0]['cores']} cores"
    panel = Panel(
        loads,
        "callers at a time",
        y,
        ticks=True,
        y_range=(0, None),
        levels=levels,
        levels_are=f"without a server, batches of {SLOTS}",
    )
    plot_lines([[panel]], path, (8, 5), legend="lower center")
