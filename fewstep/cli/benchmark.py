"""Compare fewstep with what else there is, in one run: scripts/benchmark miniature

`full` and `full-1024` are SDXL's real shapes with random weights, which scripts/full-size makes first.
`throughput` asks servers of the miniature, of 1 to 16 callers at a time; `encoding` writes files; `startup`
starts the miniature's server; `page` types in a browser, `visitors` are 32 who type at once. What was found
is written to benchmarks/SUITE.csv, drawn beside it where that helps, and printed.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fewstep.cli.run import say, status_of
from fewstep.coglet.server import ROOT

REQUESTS = 96  # of each number of callers
BENCHMARKS = ROOT / "benchmarks"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one suite: 1 when a system does not come up or does not paint; the reason is one sentence on
    stderr."""
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    others: dict[str, Callable[[Path, int], list[dict[str, Any]]]] = {
        "throughput": _throughput, "encoding": _encoding, "startup": _startup, "page": _page,
        "visitors": _visitors,
    }  # fmt: skip
    parser.add_argument("suite", choices=("miniature", "full", "full-1024", *others))
    parser.add_argument("--rounds", type=int, default=3, help="of starting every system (%(default)s)")
    chosen = parser.parse_args(arguments)

    def work() -> None:
        from fewstep.settings import Settings

        weights = Settings.from_env().weights_root
        if chosen.suite in others:
            _write(others[chosen.suite](weights, chosen.rounds), chosen.suite)
        else:
            _compare(chosen.suite, weights, chosen.rounds)

    return status_of(work)


def _compare(name: str, weights: Path, rounds: int) -> None:
    from fewstep.benchmark.roofline import roofline  # imports torch, which takes seconds
    from fewstep.benchmark.suites import SUITES, plot, plot_costs, run, summarised
    from fewstep.cli.full_size import make

    suite = SUITES[name]
    if suite.model != "miniature":
        make(suite.model.removesuffix("-random"), again=False)
    samples, qualities = run(suite, weights, rounds, say)
    rows: list[dict[str, Any]] = [
        {
            "suite": name,
            "system": system,
            **vars(scenario),
            **summarised(taken),
            **{"psnr": "", "right": "", **qualities.get((system, scenario), {})},
        }
        for (system, scenario), taken in samples.items()
    ]
    dtype = next(row["dtype"] for row in rows if row["system"] == "fewstep")
    rows += [{"suite": name, **row} for row in roofline(weights / suite.model, suite.scenarios, dtype)]
    rows = _write(rows, name)
    plot(rows, BENCHMARKS / f"{name}.png")
    if len({scenario.size for scenario in suite.scenarios}) > 1:
        plot_costs(rows, BENCHMARKS / f"{name}-costs.png")


def _throughput(weights: Path, rounds: int) -> list[dict[str, Any]]:
    from fewstep.benchmark.measure import describe_machine
    from fewstep.benchmark.throughput import lone_waits, plot, rows_of, run

    results = run(weights, rounds, REQUESTS, say)
    say("a caller who is alone")
    rows = rows_of(*results, lone_waits(weights, 2 * REQUESTS))
    machine = describe_machine()
    plot([{**machine, **row} for row in rows], BENCHMARKS / "throughput.png")
    return rows


def _encoding(weights: Path, rounds: int) -> list[dict[str, Any]]:
    from fewstep.benchmark.costs import SIDE, measure_encoders
    from fewstep.benchmark.systems import fewstep
    from fewstep.benchmark.worker import generate_captions
    from fewstep.evaluation.figures import grid

    system, columns = fewstep("miniature", weights, 128), SIDE // 128
    return measure_encoders(grid(generate_captions(system, columns**2), columns, gap=0), 5 * rounds)


def _startup(weights: Path, rounds: int) -> list[dict[str, Any]]:
    from fewstep.benchmark.costs import measure_starts

    return measure_starts(weights, 3 * rounds)


def _page(weights: Path, rounds: int) -> list[dict[str, Any]]:
    from fewstep.benchmark.page import measure

    return measure(4 * rounds)


def _visitors(weights: Path, rounds: int) -> list[dict[str, Any]]:
    from fewstep.benchmark.visitors import measure

    return [measure(clients=32, seconds=20.0 * rounds)]


def _write(rows: Sequence[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Write benchmarks/NAME.csv, print it, and return the rows with the machine that they are of."""
    from fewstep.benchmark.measure import describe_machine
    from fewstep.evaluation.tables import write_csv

    machine = describe_machine()
    full = [{**machine, **row} for row in rows]
    write_csv(BENCHMARKS / f"{name}.csv", full)
    for row in rows:
        say(line(row))
    return full


def line(row: Mapping[str, Any]) -> str:
    """Return what there is of a row, as one line."""
    values = {name: f"{value:g}" if isinstance(value, float) else value for name, value in row.items()}
    return ", ".join(f"{name} {value}" for name, value in values.items() if value != "")


if __name__ == "__main__":
    sys.exit(main())
