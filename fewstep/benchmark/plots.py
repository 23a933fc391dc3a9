"""Benchmarks as images for the README."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

PARTS = {"unet": "UNet", "vae": "VAE", "text": "text encoders", "encode": "encoding", "other": "all else"}
COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#8172b3", "#c44e52")


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One bar for each system, of the plain wish: the first size, unguided, in 4 steps if there are."""
    size = rows[0]["size"]
    steps = 4 if any(row["steps"] == 4 for row in rows) else rows[0]["steps"]
    plain = (size, steps, 1.0, 1)
    shown = [row for row in rows if (row["size"], row["steps"], row["guidance"], row["batch"]) == plain]
    figure, axes = plt.subplots(figsize=(8, 0.6 * len(shown) + 1.4), layout="constrained")
    names = [f"{row['system'].removesuffix('-bf16')} {row['dtype']}".strip() for row in shown]
    left = [0.0] * len(shown)
    for (part, label), colour in zip(PARTS.items(), COLOURS, strict=True):
        widths = [float(row.get(part) or 0) for row in shown]
        axes.barh(names, widths, left=left, color=colour, label=label)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for i, row in enumerate(shown):
        if row["system"] == "floor":
            axes.barh(names[i], row["seconds"], color="#bbbbbb", label="FLOPs at the rate of matmul")
        axes.text(row["seconds"], i, f" {row['seconds']:.3g} s", va="center")
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(
        f"seconds for one picture of {size} px in {steps} steps, {rows[0]['cpu']}, {rows[0]['cores']} cores"
    )
    axes.legend(loc="upper right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_costs(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Seconds against the image's size and against steps, unguided, with the line of the FLOPs."""
    single = [
        row
        for row in rows
        if row["batch"] == 1
        and row["guidance"] <= 1
        and not row["system"].startswith("fewstep-openvino")  # which is compiled for one of the sizes
    ]
    steps = 4
    size = max(row["size"] for row in single)
    figure, panels = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    _cost_lines(panels[0], [row for row in single if row["steps"] == steps], lambda row: row["size"] ** 2)
    _cost_lines(panels[1], [row for row in single if row["size"] == size], lambda row: row["steps"])
    panels[0].set_xlabel(f"pixels, {steps} steps")
    panels[1].set_xlabel(f"steps, {size} px")
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel(f"seconds a picture, {rows[0]['cpu']}, {rows[0]['cores']} cores")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_throughput(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Images a second against the number of callers, beside what a batch takes without a server."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    colours: dict[str, Any] = {}
    for system in dict.fromkeys(row["system"] for row in rows if row.get("requests")):
        points = [(row["clients"], row["images_per_s"]) for row in rows if row["system"] == system]
        [line] = axes.plot(*zip(*points, strict=True), marker="o", label=system)
        colours[system] = line.get_color()
    for row in rows:
        served = row["system"].removesuffix("-generate")
        if served != row["system"]:
            label = f"{served} without a server, batches of 8"
            axes.axhline(row["images_per_s"], color=colours[served], linestyle="--", label=label)
    axes.set_xlabel("callers at a time")
    axes.set_ylabel(f"images a second, {rows[0]['cpu']}, {rows[0]['cores']} cores")
    axes.set_ylim(bottom=0)
    axes.set_xticks([row["clients"] for row in rows if row["system"] == "fewstep"])
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _cost_lines(panel: Any, rows: Sequence[dict[str, Any]], along: Callable[[dict[str, Any]], float]) -> None:
    for system in dict.fromkeys(row["system"] for row in rows):
        points = sorted((along(row), row["seconds"]) for row in rows if row["system"] == system)
        if system == "floor":
            panel.plot(*zip(*points, strict=True), "k--", label="FLOPs at the rate of matmul")
        else:
            panel.plot(*zip(*points, strict=True), marker="o", markersize=4, label=system)
    panel.spines[["top", "right"]].set_visible(False)
