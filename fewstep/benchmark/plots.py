"""Benchmarks as pictures for the README."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt

PARTS = {"unet": "UNet", "vae": "VAE", "text": "text encoders", "encode": "encoding", "other": "all else"}
COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#8172b3", "#c44e52")


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """One bar for each system, of the plain wish: the smallest picture, unguided, 4 steps if there are."""
    size = min(row["size"] for row in rows)
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
