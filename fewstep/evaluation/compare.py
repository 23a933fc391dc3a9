"""How well a model generates in 1, 2, 4 ... steps, by every way to sample it: Table 1 of "Latent Consistency
Models" (arXiv 2310.04378) for any model.

The miniature's images are judged. Those of other models are measured by what the caller has at hand: a
vision model whose features are compared with those of real images, and a CLIP model.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler, UNet2DConditionModel
from PIL import Image
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, CLIPModel

from fewstep.images.codec import open_image
from fewstep.miniature.judge import frechet_distance
from fewstep.models.device import autocast
from fewstep.models.load import Diffusion
from fewstep.training.encoded import native_size
from fewstep.training.sources import halve_if_large

logger = logging.getLogger(__name__)

TEACHER = "DDIM"
BATCH, BATCH_SIDE = 25, 128  # images of so many px a side
SEED = 1000


class Meter(Protocol):
    """Figures by their names, of one image of each prompt."""

    def measure(self, pictures: Sequence[Image.Image]) -> dict[str, float]: ...


@dataclass(frozen=True)
class Sampler:
    """A way to generate: a loaded pipeline with its scheduler, and the guidance that it is called with."""

    name: str
    diffusion: Diffusion
    guidance: float

    def generate(self, prompts: Sequence[str], steps: int) -> list[Image.Image]:
        """One image of each, always with the same seeds."""
        # As many pixels at once, whatever the size.
        batch = max(1, round(BATCH * (BATCH_SIDE / native_size(self.diffusion)) ** 2))
        images: list[Image.Image] = []
        for start in tqdm(range(0, len(prompts), batch), f"{self.name}, {steps}", mininterval=5.0):
            part = list(prompts[start : start + batch])
            # Latents and scheduler stay in fp32; the networks need not.
            with autocast(self.diffusion.device):
                images += self.diffusion(
                    part,
                    num_inference_steps=steps,
                    guidance_scale=self.guidance,
                    generator=[torch.Generator().manual_seed(SEED + start + i) for i in range(len(part))],
                ).images
        return images


def samplers(
    load: Callable[[], Diffusion], guidance: float, lora: Path | None, lcm: Path | None
) -> Iterator[Sampler]:
    """DDIM and DPM-Solver++ on the base, guided; with a UNet in `lcm` the full LCM, with `lora` LCM-LoRA.

    The first two once with the timesteps of the base's own scheduler, which for SDXL start few steps far
    below pure noise, and once from the last timestep on ("trailing", arXiv 2305.08891). Each is loaded when
    its turn comes; `guidance` is diffusers' scale, of the full LCM too, where it is 1 + w.
    """
    base = load()
    halve_if_large(base.unet)
    plain = base.scheduler.config
    solvers: dict[str, tuple[Any, dict[str, Any]]] = {
        TEACHER: (DDIMScheduler, {"clip_sample": False, "set_alpha_to_one": False}),
        "DPM-Solver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    }
    spacings: dict[str, dict[str, str]] = {"": {}, ", trailing": {"timestep_spacing": "trailing"}}
    for more, spacing in spacings.items():
        for name, (kind, options) in solvers.items():
            base.scheduler = kind.from_config(plain, **options, **spacing)
            yield Sampler(name + more, base, guidance)
    base.scheduler = LCMScheduler.from_config(plain)
    if lcm:
        base.unet = UNet2DConditionModel.from_pretrained(lcm, use_safetensors=True).to(base.device)
        halve_if_large(base.unet)
        yield Sampler("LCM", base, guidance)
    if lora:
        del base  # its memory is needed
        fused = load()
        fused.load_lora_weights(lora.parent, weight_name=lora.name)
        fused.fuse_lora()
        fused.unload_lora_weights()
        halve_if_large(fused.unet)
        fused.scheduler = LCMScheduler.from_config(plain)
        yield Sampler("LCM-LoRA", fused, 1.0)


class FeatureMeter:
    """Fréchet's distance (arXiv 1706.08500) to real images, in the features of a transformers vision model
    in `folder`, safetensors only; the distance is small for like sets of images, and of one model and
    number of images only."""

    def __init__(self, folder: Path, real: Sequence[Path]) -> None:
        self._processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        self._model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
        self._real = self._features(real)

    def measure(self, pictures: Sequence[Image.Image]) -> dict[str, float]:
        return {"feature_distance": frechet_distance(self._features(pictures), self._real)}

    @torch.inference_mode()
    def _features(self, pictures: Sequence[Image.Image] | Sequence[Path]) -> Any:
        rows = []
        for start in range(0, len(pictures), BATCH):
            part = [
                open_image(one, one.name) if isinstance(one, Path) else one
                for one in pictures[start : start + BATCH]
            ]
            given = self._processor(images=part, return_tensors="pt")
            rows.append(self._model(**given).pooler_output)
        return torch.cat(rows).double().numpy()


class ClipMeter:
    """CLIP score (arXiv 2104.08718): 100 times the cosine between prompt and image, at least 0; by the CLIP
    model in `folder`."""

    def __init__(self, folder: Path, prompts: Sequence[str]) -> None:
        self._processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        self._model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
        self._prompts = prompts

    @torch.inference_mode()
    def measure(self, pictures: Sequence[Image.Image]) -> dict[str, float]:
        cosines = []
        for start in range(0, len(pictures), BATCH):
            part = slice(start, start + BATCH)
            given = self._processor(
                text=list(self._prompts[part]),
                images=list(pictures[part]),
                return_tensors="pt",
                padding=True,
                truncation=True,
            )
            found = self._model(**given)
            cosines.append((found.text_embeds * found.image_embeds).sum(1))
        return {"clip_score": float(100 * torch.cat(cosines).clamp(min=0).mean())}


def evaluate(
    every: Iterator[Sampler],
    prompts: Sequence[str],
    steps: Sequence[int],
    meters: Sequence[Meter],
    teacher_steps: int = 0,
    keep: Callable[[Sequence[dict[str, Any]]], None] = lambda rows: None,
) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """A row of figures for each sampler and number of steps, and an image of the first prompt for each.

    DDIM is measured at `teacher_steps`, too, without an image: what a student is to equal. `keep` is called
    with the rows so far after each.
    """
    rows: list[dict[str, Any]] = []
    pictures: list[Image.Image] = []
    for sampler in every:
        more = [teacher_steps] if sampler.name == TEACHER and teacher_steps not in (0, *steps) else []
        for count in (*steps, *more):
            generated = sampler.generate(prompts, count)
            figures = [meter.measure(generated) for meter in meters]
            row: dict[str, Any] = {"sampler": sampler.name, "steps": count}
            rows.append(row | {name: round(value, 2) for one in figures for name, value in one.items()})
            logger.info("%s", rows[-1])
            keep(rows)
            pictures += generated[:1] if count in steps else []
        del sampler  # before the next is loaded
    return rows, pictures


def table(rows: Sequence[dict[str, Any]], figure: str) -> str:
    """One figure as Markdown, samplers down and steps across."""
    steps = sorted({row["steps"] for row in rows})
    lines = [["", *map(str, steps)], ["---", *["---:"] * len(steps)]]
    for name in dict.fromkeys(row["sampler"] for row in rows):
        found = {row["steps"]: row[figure] for row in rows if row["sampler"] == name}
        lines.append([name, *(f"{found[count]:.1f}" if count in found else "" for count in steps)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_rows(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """As CSV."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Every figure against the number of steps, a line for each sampler."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt
    from matplotlib import ticker

    figures = [name for name in rows[0] if name not in ("sampler", "steps")]
    titles = {"all_right": "all right, %", "clip_score": "CLIP score"}
    titles |= {"distance": "Fréchet distance", "feature_distance": "Fréchet distance of features"}
    sheet, panels = plt.subplots(
        1, len(figures), figsize=(4.5 * len(figures), 3.6), layout="constrained", squeeze=False
    )
    for axes, figure in zip(panels[0], figures, strict=True):
        for name in dict.fromkeys(row["sampler"] for row in rows):
            own = [row for row in rows if row["sampler"] == name]
            axes.plot([row["steps"] for row in own], [row[figure] for row in own], "o-", label=name)
        axes.set_xscale("log", base=2)
        steps = sorted({row["steps"] for row in rows})
        axes.set_xticks(steps, [str(count) for count in steps])
        if figure.endswith("distance"):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(ticker.ScalarFormatter())
            axes.yaxis.set_minor_locator(ticker.NullLocator())
        axes.set_xlabel("steps")
        axes.set_title(titles[figure])
        axes.spines[["top", "right"]].set_visible(False)
    panels[0][0].legend(frameon=False)
    sheet.savefig(path, dpi=110)
    plt.close(sheet)
