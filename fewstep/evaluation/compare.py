"""How well a model generates in 1, 2, 4 ... steps, by every way to sample it: Table 1 of "Latent Consistency
Models" (arXiv 2310.04378) for any model.

The miniature's images are judged. Those of other models are measured by what the caller has at hand: a
vision model whose features are compared with those of real images, and a CLIP model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import DPMSolverMultistepScheduler, LCMScheduler, UNet2DConditionModel
from PIL import Image

from fewstep.evaluation.figures import Panel, grid, lines_of, plot_lines
from fewstep.evaluation.generate import Sampler, ddim, lcm_lora, spaced
from fewstep.evaluation.metrics import Metric
from fewstep.evaluation.tables import markdown, write_csv
from fewstep.models.load import Diffusion
from fewstep.training.networks import halve_if_large

logger = logging.getLogger(__name__)

TEACHER = "DDIM"
TITLES = {
    "all_right": "all right, %",
    "clip_score": "CLIP score",
    "distance": "kernel distance (KID)",
    "feature_distance": "Fréchet distance of features",
}


def samplers(
    load: Callable[[], Diffusion], guidance: float, lora: Path | None, lcm: Path | None
) -> Iterator[Sampler]:
    """Yield DDIM and DPM-Solver++ on the guided base, the full LCM in the folder `lcm`, and LCM-LoRA.

    The first two once with the timesteps of the base's own scheduler, which for SDXL start few steps far
    below pure noise, and once from the last timestep on ("trailing", arXiv 2305.08891). Each is loaded when
    its turn comes; `guidance` is diffusers' scale, of the full LCM too, where it is 1 + w.
    """
    base = load()
    halve_if_large(base.unet)
    for spacing in (None, "trailing"):
        yield ddim(base, guidance, spacing)
        options = {"algorithm_type": "dpmsolver++"}
        yield spaced("DPM-Solver++", DPMSolverMultistepScheduler, base, guidance, spacing, **options)
    if lcm:
        base.unet = UNet2DConditionModel.from_pretrained(lcm, use_safetensors=True).to(base.device)
        halve_if_large(base.unet)
        yield Sampler("LCM", base, guidance, LCMScheduler.from_config(base.scheduler.config))
    if lora:
        del base  # its memory is needed
        fused = lcm_lora(load(), lora)
        halve_if_large(fused.diffusion.unet)
        yield fused


@dataclass
class Comparison:
    """A row of figures for every sampler and number of steps, in the CSV at `path` as soon as it is there.

    `asked` has prompts and what measures images of them, by what the names of those figures begin with. The
    first `shown` images of the first prompts are kept in `images`, row by row.
    """

    path: Path
    asked: Mapping[str, tuple[Sequence[str], Sequence[Metric]]]
    shown: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    images: list[Image.Image] = field(default_factory=list)

    def add(self, sampler: Sampler, steps: Sequence[int], /, **columns: Any) -> None:
        """Measure one sampler at each number of steps; its rows begin with `columns`."""
        for count in steps:
            self.rows.append({**columns, "steps": count})
            for i, (prefix, (prompts, metrics)) in enumerate(self.asked.items()):
                images = sampler.generate(prompts, steps=count)
                self.images += images[: self.shown] if i == 0 else []
                for name, value in (figure for metric in metrics for figure in metric(images).items()):
                    self.rows[-1][prefix + name] = float(f"{value:.4g}")
            logger.info("%s", self.rows[-1])
            write_csv(self.path, self.rows)


def compare(
    every: Iterator[Sampler],
    prompts: Sequence[str],
    steps: Sequence[int],
    teacher_steps: int,
    metrics: Sequence[Metric],
    out: Path,
    about: str,
) -> str:
    """Measure each sampler at each number of steps, and return the tables, as Markdown.

    The folder `out` gets scores.csv after each, then plot.png, grid.webp with an image of the first prompt
    for each, and all of that in README.md, which begins with `about`. DDIM is measured at `teacher_steps`,
    too, without an image: what a student is to equal.
    """
    made = Comparison(out / "scores.csv", {"": (prompts, metrics)}, shown=1)
    for sampler in every:
        more = [teacher_steps] if sampler.name == TEACHER and teacher_steps not in (0, *steps) else []
        made.add(sampler, [*steps, *more], sampler=sampler.name)
        del sampler  # before the next is loaded
    plot(made.rows, out / "plot.png")
    shown = [image for row, image in zip(made.rows, made.images, strict=True) if row["steps"] in steps]
    grid(shown, len(steps)).save(out / "grid.webp", quality=90)
    names = ", ".join(dict.fromkeys(row["sampler"] for row in made.rows))
    figures = [name for name in TITLES if name in made.rows[0]]
    text = "\n\n".join(f"{name}, by steps\n\n{table(made.rows, name)}" for name in figures)
    (out / "README.md").write_text(
        f"# Few steps\n\n{about}\n\n{text}\n\n![](plot.png)\n\n![{names} from top to bottom](grid.webp)\n",
        encoding="utf-8",
    )
    return text


def table(rows: Sequence[dict[str, Any]], figure: str) -> str:
    """Return one figure as Markdown, samplers down and steps across."""
    steps = sorted({row["steps"] for row in rows})
    lines, digits = [], 3 if figure == "distance" else 1
    for name in dict.fromkeys(row["sampler"] for row in rows):
        values = {row["steps"]: f"{row[figure]:.{digits}f}" for row in rows if row["sampler"] == name}
        lines.append([name, *(values.get(count, "") for count in steps)])
    return markdown(["", *map(str, steps)], lines)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw every figure against the number of steps, a line for each sampler."""
    panels = []
    for figure, title in TITLES.items():
        if figure in rows[0]:
            lines = lines_of(rows, "sampler", "steps", figure)
            scale = "log" if figure == "feature_distance" else "linear"  # a kernel's may be below 0
            panels.append(Panel(lines, "steps", title=title, ticks=True, x_scale="log", y_scale=scale))
    plot_lines([panels], path)
