"""Compare fewstep with what else there is, in one run: scripts/benchmark miniature

`full` and `full-1024` are SDXL's real shapes with random weights, which scripts/full-size makes first.
`throughput` asks servers of the miniature, of 1 to 16 callers at a time; `startup` starts the miniature's
server; `page` types in a browser, `visitors` are 32 who type at once. `gpu` takes all figures of a GPU in one
process, within a time. What was found is written to benchmarks/SUITE.csv, drawn beside it where that helps,
and printed.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fewstep.cli.run import say, status_of

SUITES = ("miniature", "full", "full-1024", "throughput", "startup", "page", "visitors")
GPU, OF_GPU = "gpu", {"model", "device", "size", "only", "seconds", "out"}
ROUNDS = 3


def main(arguments: Sequence[str] | None = None) -> int:
    """1 when a system does not come up or does not paint, or a stage fails; the reason is on stderr."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", choices=[*SUITES, GPU])
    parser.add_argument("--rounds", type=int, help=f"of starting every system ({ROUNDS}); not of {GPU}")
    gpu = parser.add_argument_group(f"of {GPU} alone")
    gpu.add_argument("--model", choices=["sdxl-random", "miniature"], help="(sdxl-random)")
    gpu.add_argument("--device", choices=["auto", "cpu", "cuda"], help="(auto)")
    gpu.add_argument("--size", type=int, help="of images, in px (the model's native size)")
    gpu.add_argument("--only", help="stages or engines to measure, between commas (all)")
    gpu.add_argument("--seconds", type=float, help="that all of it may take (480)")
    gpu.add_argument("--out", type=Path, help=f"the CSV (benchmarks/{GPU}.csv)")
    chosen = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    suite = chosen.pop("suite")
    if unread := sorted(chosen.keys() - (OF_GPU if suite == GPU else {"rounds"})):
        parser.error(f"the suite {suite} does not read --{unread[0]}")
    failed: list[str] = []
    if suite == GPU:
        status = status_of(lambda: failed.extend(_measure_gpu(started, **chosen)))
    else:
        status = status_of(lambda: _run(suite, chosen.get("rounds", ROUNDS)))
    if failed:
        say(f"{len(failed)} stages failed, and their rows say why: {', '.join(failed)}")
    return status or int(bool(failed))


def _measure_gpu(
    started: float,
    model: str = "sdxl-random",
    only: str = "",
    seconds: float = 480.0,
    out: Path | None = None,
    **chosen: Any,
) -> list[str]:
    # Nothing else of the benchmark is imported, such as what only this repository's own environment has.
    from fewstep.benchmark.gpu_stages import measure
    from fewstep.benchmark.measure import BENCHMARKS
    from fewstep.settings import Settings

    path, weights = out or BENCHMARKS / f"{GPU}.csv", Settings.from_env().weights_root
    names = [name for name in only.split(",") if name]
    return measure(model, weights, path, started + seconds, say, only=names, **chosen)


def _run(name: str, rounds: int) -> None:
    # They import torch and matplotlib, which takes seconds.
    from fewstep.benchmark import page, startup, suites, throughput, visitors
    from fewstep.benchmark.measure import BENCHMARKS, describe_machine, line
    from fewstep.cli.full_size import make
    from fewstep.evaluation.tables import write_csv
    from fewstep.settings import Settings

    weights = Settings.from_env().weights_root
    measured: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "throughput": lambda: throughput.measure(weights, rounds, say),
        "startup": lambda: startup.measure(weights, 3 * rounds),
        "page": lambda: [page.measure(4 * rounds)],
        "visitors": lambda: [visitors.measure(clients=32, seconds=20.0 * rounds)],
    }
    suite = suites.SUITES.get(name)
    if suite and suite.model != "miniature":
        make(suite.model.removesuffix("-random"), again=False)
    machine = describe_machine()
    taken: Iterable[list[dict[str, Any]]] = (
        suites.measure(name, weights, rounds, say) if suite else [measured[name]()]
    )
    rows: list[dict[str, Any]] = []
    for so_far in taken:
        rows = [{**machine, **row} for row in so_far]
        write_csv(BENCHMARKS / f"{name}.csv", rows)
    for row in rows:
        say(line({name: value for name, value in row.items() if name not in machine}))
    if name == "throughput":
        throughput.plot(rows, BENCHMARKS / f"{name}.png")
    if suite:
        suites.plot(rows, BENCHMARKS / f"{name}.png")


if __name__ == "__main__":
    sys.exit(main())
