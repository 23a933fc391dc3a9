"""Compare fewstep with what else there is, in one run: scripts/benchmark miniature

`full` and `full-1024` are SDXL's real shapes with random weights, which scripts/full-size makes first.
`throughput` asks servers of the miniature, of 1 to 16 callers at a time; `startup` starts the miniature's
server; `page` types in a browser, `visitors` are 32 who type at once. What was found is written to
benchmarks/SUITE.csv, drawn beside it where that helps, and printed.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from fewstep.cli.run import say, status_of

SUITES = ("miniature", "full", "full-1024", "throughput", "startup", "page", "visitors")


def main(arguments: Sequence[str] | None = None) -> int:
    """1 when a system does not come up or does not paint; the reason is one sentence on stderr."""
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--rounds", type=int, default=3, help="of starting every system (%(default)s)")
    chosen = parser.parse_args(arguments)
    return status_of(lambda: _run(chosen.suite, chosen.rounds))


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
    rows = measured[name]() if suite is None else suites.measure(name, weights, rounds, say)
    for row in rows:
        say(line(row))
    rows = [{**machine, **row} for row in rows]
    write_csv(BENCHMARKS / f"{name}.csv", rows)
    if name == "throughput":
        throughput.plot(rows, BENCHMARKS / f"{name}.png")
    if suite:
        suites.plot(rows, BENCHMARKS / f"{name}.png")


if __name__ == "__main__":
    sys.exit(main())
