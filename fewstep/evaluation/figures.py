"""Grids of images, and plots."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image

GAP = 4  # px


def grid(images: Sequence[Image.Image], columns: int, gap: int = GAP) -> Image.Image:
    """Return images on white, row by row; those of a row are of one height."""
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    width = max(sum(image.width + gap for image in row) for row in rows) - gap
    height = sum(row[0].height + gap for row in rows) - gap
    whole = Image.new("RGB", (width, height), "white")
    y = 0
    for row in rows:
        x = 0
        for image in row:
            whole.paste(image, (x, y))
            x += image.width + gap
        y += row[0].height + gap
    return whole


def lines_of(rows: Iterable[Mapping[str, Any]], name: str, x: str, y: str) -> dict[Any, list[Any]]:
    """Return the points (x, y) that the columns so named hold, by what is in the column `name`."""
    lines = defaultdict(list)
    for row in rows:
        lines[row[name]].append((row[x], row[y]))
    return lines


@dataclass(frozen=True)
class Panel:
    """One plot: lines by name, each of points (x, y)."""

    lines: Mapping[str, Sequence[tuple[float, float]]]
    x: str = ""
    y: str = ""
    title: str = ""
    ticks: bool = False  # one at every x
    x_scale: str = "linear"
    y_scale: str = "linear"
    y_range: tuple[float | None, float | None] = (None, None)
    levels: Mapping[str, float] = field(default_factory=dict)  # dashed, in the colour of the line so named
    levels_are: str = ""


def plot_lines(
    rows: Sequence[Sequence[Panel]],
    path: Path,
    size: tuple[float, float] = (4.5, 3.6),
    share_y: bool = False,
    legend: str = "",
) -> None:
    """Draw panels, each of `size` inches; the legend is the first one's, within it or outside at `legend`."""
    from matplotlib import ticker  # an extra, which takes a second to import
    from matplotlib.figure import Figure

    shape = len(rows), len(rows[0])
    figure: Any = Figure(figsize=(size[0] * shape[1], size[1] * shape[0]), layout="constrained")
    axes = figure.subplots(*shape, sharey="row" if share_y else False, squeeze=False)
    for panel, axis in zip(chain.from_iterable(rows), axes.flat, strict=True):
        for name, points in panel.lines.items():
            [line] = axis.plot(*zip(*points, strict=True), "o-", markersize=4, label=name)
            if name in panel.levels:
                label = f"{name} {panel.levels_are}"
                axis.axhline(panel.levels[name], color=line.get_color(), linestyle="--", label=label)
        options: dict[str, Any] = {"log": {"base": 2}, "symlog": {"linthresh": 1}}.get(panel.x_scale, {})
        axis.set_xscale(panel.x_scale, **options)
        if panel.ticks:
            values = sorted({x for points in panel.lines.values() for x, _ in points})
            axis.set_xticks(values, [f"{value:g}" for value in values])
        if panel.y_scale == "log":
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(ticker.ScalarFormatter())
            axis.yaxis.set_minor_locator(ticker.NullLocator())
        axis.set(xlabel=panel.x, ylabel=panel.y, title=panel.title)
        axis.set_ylim(*panel.y_range)
        axis.spines[["top", "right"]].set_visible(False)
    if legend:
        figure.legend(*axes[0][0].get_legend_handles_labels(), loc=f"outside {legend}", frameon=False)
    else:
        axes[0][0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def plot_bars(bars: Mapping[str, Mapping[str, float]], totals: Sequence[float], x: str, path: Path) -> None:
    """Draw one stacked bar for each name, of its parts, with its total as a number."""
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(8, 0.6 * len(bars) + 1.4), layout="constrained")
    axes, left = figure.subplots(), [0.0] * len(bars)
    for part in dict.fromkeys(part for parts in bars.values() for part in parts):
        widths = [parts.get(part, 0.0) for parts in bars.values()]
        axes.barh(list(bars), widths, left=left, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for i, total in enumerate(totals):
        axes.text(total, i, f" {total:.3g} s", va="center")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(x)
    axes.legend(loc="upper right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
