"""Compare fewstep with what else there is, in one run: scripts/benchmark miniature

`full` and `full-1024` are SDXL's real shapes with random weights, which scripts/full-size makes first.
`throughput` asks servers of the miniature, of 1 to 16 callers at a time; `encoding` writes files; `startup`
starts the miniature's server; `page` types in a browser, `visitors` are 32 who type at once. What was found
is written to benchmarks/SUITE.csv, drawn beside it where that helps, and printed.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fewstep.cli.run import say, status_of
from fewstep.coglet.server import ROOT

REQUESTS = 96  # of each number of callers


def main(arguments: Sequence[str] | None = None) -> int:
    """1 when a system does not come up or does not paint; the reason is one sentence on stderr."""
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    others = {"throughput": _load, "encoding": _encode, "startup": _start, "page": _type, "visitors": _visit}
    parser.add_argument("suite", choices=("miniature", "full", "full-1024", *others))
    parser.add_argument("--rounds", type=int, default=3, help="of starting every system (%(default)s)")
    chosen = parser.parse_args(arguments)
    if chosen.suite in others:
        return status_of(lambda: others[chosen.suite](chosen.rounds))
    return status_of(lambda: _compare(chosen.suite, chosen.rounds))


def _compare(name: str, rounds: int) -> None:
    from fewstep.benchmark.measure import describe_machine
    from fewstep.benchmark.plots import plot, plot_costs  # imports torch and matplotlib, which takes seconds
    from fewstep.benchmark.suites import SUITES, run, summarised
    from fewstep.cli.full_size import make
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
    path = _write(rows, name)
    plot(rows, path.with_suffix(".png"))
    if len({wish.size for wish in suite.wishes}) > 1:
        plot_costs(rows, path.with_stem(f"{name}-costs").with_suffix(".png"))
    for row in rows:
        say(_line(row))


def _load(rounds: int) -> None:
    from fewstep.benchmark.measure import describe_machine
    from fewstep.benchmark.plots import plot_throughput
    from fewstep.benchmark.throughput import lone_waits, rows_of, run
    from fewstep.settings import Settings

    weights, machine = Settings.from_env().weights_root, describe_machine()
    found = run(weights, rounds, REQUESTS, say)
    say("a caller who is alone")
    rows = [{**machine, **row} for row in rows_of(*found, lone_waits(weights, 2 * REQUESTS))]
    plot_throughput(rows, _write(rows, "throughput").with_suffix(".png"))
    for row in rows:
        rate = f"{row['images_per_s']:g} images/s" if "images_per_s" in row else ""
        say(f"{row['system']:>26} {row['clients']!s:>2} {rate:>18} {row.get('wait_ms', ''):>8} ms")


def _encode(rounds: int) -> None:
    from fewstep.benchmark.encoding import SIDE, measure, tiled
    from fewstep.benchmark.measure import describe_machine
    from fewstep.benchmark.quality import generate_captions
    from fewstep.benchmark.systems import fewstep
    from fewstep.settings import Settings

    system = fewstep("miniature", Settings.from_env().weights_root, 128)
    rows = measure(tiled(generate_captions(system, (SIDE // 128) ** 2)), 5 * rounds)
    _write([{**describe_machine(), **row} for row in rows], "encoding")
    for row in rows:
        say(f"{row['format']:>5} {row['options']:<45} {row['ms']:>6} ms {row['bytes']:>8} bytes")


def _start(rounds: int) -> None:
    from fewstep.benchmark.measure import describe_machine
    from fewstep.benchmark.startup import measure
    from fewstep.settings import Settings

    rows = measure(Settings.from_env().weights_root, 3 * rounds)
    _write([{**describe_machine(), **row} for row in rows], "startup")
    for row in rows:
        say(f"{row['what']}: {row['seconds']:.2f} s ({row['least']:.2f} to {row['most']:.2f})")


def _type(rounds: int) -> None:
    from fewstep.benchmark.measure import describe_machine
    from fewstep.benchmark.page import measure
    from fewstep.benchmark.suites import serving
    from fewstep.settings import Settings

    with serving(Settings.from_env().weights_root, ROOT) as server:
        rows = measure(server, 4 * rounds)
    _write([{**describe_machine(), **row} for row in rows], "page")
    for row in rows:
        times = f"median {row['median_ms']:g} ms, 95 % below {row['p95_ms']:g} ms"
        say(f"{row['page']:>20}: {times} beyond painting")


def _visit(rounds: int) -> None:
    from fewstep.benchmark.measure import describe_machine
    from fewstep.benchmark.visitors import measure

    rows = [{**describe_machine(), **measure(visitors=32, seconds=20.0 * rounds)}]
    _write(rows, "visitors")
    for name, value in rows[0].items():
        say(f"{name:>20}: {value}")


def _write(rows: Sequence[dict[str, Any]], name: str) -> Path:
    path = ROOT / "benchmarks" / f"{name}.csv"
    with path.open("w", newline="") as file:
        columns = list(dict.fromkeys(column for row in rows for column in row))
        writer = csv.DictWriter(file, columns, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def _floors(
    model: str, machine: dict[str, Any], name: str, wishes: Sequence[Any], rows: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The time of the arithmetic alone, in the dtype that fewstep took."""
    from fewstep.benchmark.roofline import flops_of, matmul_rate
    from fewstep.models.device import DTYPES
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
