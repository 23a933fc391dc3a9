"""Rows of figures as CSV, which names the commit that they were taken at, and as Markdown."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@cache
def commit() -> str:
    """Return the short hash of HEAD, with a "+" when files differ from it; empty outside of git."""
    try:
        git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows that may differ in their columns; `commit` is added to those that have none.

    The file is whole at any time: the former one, and then this one.
    """
    stamped: list[dict[str, Any]] = [{"commit": commit(), **row} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8", newline="") as file:
        columns = list(dict.fromkeys(column for row in stamped for column in row))
        writer = csv.DictWriter(file, columns, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(stamped)
    part.replace(path)


def append_csv(path: Path, row: Mapping[str, Any]) -> None:
    """Add `row` to the CSV at `path`, which need not be there yet."""
    rows: list[Mapping[str, Any]] = []
    if path.exists():
        with path.open(encoding="utf-8", newline="") as file:
            rows = [{"commit": "", **old} for old in csv.DictReader(file)]
    write_csv(path, [*rows, row])


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table whose first column is of names and whose others are of figures."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
