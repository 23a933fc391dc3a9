"""Compare fewstep with what else there is, in one run: scripts/benchmark miniature

`full` and `full-1024` are SDXL's real shapes with random weights, which scripts/full-size makes first. What
was found is written to benchmarks/SUITE.csv, drawn in benchmarks/SUITE.png and printed.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from typing import Any

from fewstep.commands.told import say, status_of
from fewstep.server import ROOT


def main(arguments: Sequence[str] | None = None) -> int:
    """1 when a system does not come up or does not paint; the reason is one sentence on stderr."""
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", choices=("miniature", "full", "full-1024"))
    parser.add_argument("--rounds", type=int, default=3, help="of starting every system (%(default)s)")
    chosen = parser.parse_args(arguments)
    return status_of(lambda: _compare(chosen.suite, chosen.rounds))


def _compare(name: str, rounds: int) -> None:
    from fewstep.benchmark.plots import plot  # imports torch and matplotlib, which takes seconds
    from fewstep.benchmark.suites import SUITES, run, summarised
    from fewstep.commands.full_size import make
    from fewstep.measuring import describe_machine
    from fewstep.settings import Settings

    suite, weights = SUITES[name], Settings.from_env().weights_root
    if suite.model != "miniature":
        make(suite.model.removesuffix("-random"), again=False)
    machine = describe_machine()
    found, qualities = run(suite, weights, rounds, say)
    rows = []
    for (system, wish), samples in found.items():
        worth = {"psnr": "", "right": "", **qualities.get((system, wish), {})}
        rows.append(
            {**machine, "suite": name, "system": system, **vars(wish), **summarised(samples), **worth}
        )
    rows += _floors(suite.model, machine, name, suite.wishes, rows)
    path = ROOT / "benchmarks" / f"{name}.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, path.with_suffix(".png"))
    for row in rows:
        say(_line(row))


def _floors(
    model: str, machine: dict[str, Any], name: str, wishes: Sequence[Any], rows: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The time of the arithmetic alone, in the dtype that fewstep took."""
    from fewstep.benchmark.floor import flops_of, matmul_rate
    from fewstep.placement import DTYPES
    from fewstep.settings import Settings

    dtype = next(row["dtype"] for row in rows if row["system"] == "fewstep")
    rate, folder = matmul_rate(DTYPES[dtype]), Settings.from_env().weights_root / model
    return [
        {
            **machine,
            "suite": name,
            "system": "floor",
            **vars(wish),
            "dtype": dtype,
            "seconds": round(flops_of(folder, wish) / rate, 4),
        }
        for wish in wishes
    ]


def _line(row: dict[str, Any]) -> str:
    spread = f" ({row['least']:.3f} to {row['most']:.3f})" if "least" in row else ""
    guided = f", guidance {row['guidance']:g}" if row["guidance"] > 1 else ""
    wish = f"{row['size']} px, {row['steps']} steps{guided}, batch {row['batch']}"
    units = {"psnr": "dB", "right": "% right"}
    worth = "".join(f", {row[key]:g} {unit}" for key, unit in units.items() if row.get(key, "") != "")
    return f"{row['system']:>21} {row['dtype']:>5} {wish}: {row['seconds']:.3f} s{spread}{worth}"


if __name__ == "__main__":
    sys.exit(main())
