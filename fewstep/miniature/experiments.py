"""What the papers claim of few-step training, measured on the miniature:

    python -m fewstep.miniature.experiments NAME --work build/experiments --out benchmarks

NAME is curve (quality over training steps), ablation (over k and w), universal (the LCM-LoRA on a fine-tuned
base, alone and beside a style) or finetuning (a new object, taught without a teacher). Each writes
training-NAME.csv and a plot or a grid. A run that is started again goes on where it was.
"""

from __future__ import annotations

import argparse
import logging
import random
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, LCMScheduler
from PIL import Image
from safetensors import safe_open

from fewstep.evaluation.compare import Sampler, write_rows
from fewstep.miniature.scoring import TEACHER_GUIDANCE, TEACHER_STEPS, JudgeMeter
from fewstep.miniature.showcase import grid
from fewstep.miniature.world.dataset import pick_scenes, write_images, write_world
from fewstep.miniature.world.scenes import (
    Scene,
    all_scenes,
    caption,
    training_scenes,
    unseen_scenes,
)
from fewstep.models.load import Diffusion
from fewstep.models.sources import LCM_LORA
from fewstep.models.specs import get_model
from fewstep.settings import Settings
from fewstep.training.consistency import NoiseSchedule
from fewstep.training.datasets import find
from fewstep.training.distill import LoraStudent, add_lora, order_for_training
from fewstep.training.encoded import Batches, Encoder
from fewstep.training.finetune import Wish, fine_tune
from fewstep.training.plan import Plan
from fewstep.training.presets import preset
from fewstep.training.run import DIFFUSERS_FILE, Data, train
from fewstep.training.sources import load_base
from fewstep.training.style import style_training
from fewstep.training.trainer import Schedule, optimise

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")
STEPS = (1, 2, 4, 8)
CAPTIONS = 150
PICTURES = 4_000
STYLE = "golden-hour"
FIGURES = {"all_right": "all right, %", "distance": "Fréchet distance"}


class Laboratory:
    """The miniature's world, encoded once, and its judge."""

    def __init__(self, work: Path) -> None:
        self.work, self.settings = work, Settings(verify="size")
        self.weights = self.settings.weights_root / "miniature"

    def base(self) -> Diffusion:
        """A fresh one, which may be changed."""
        return load_base("miniature", self.settings, CPU)

    @cached_property
    def world(self) -> Data:
        """What the base was trained on."""
        write_world(self.work / "world", PICTURES)
        return self.encoded(self.work / "world")

    def encoded(self, folder: Path) -> Data:
        encoder = Encoder(self.base(), self.work / "encoded")
        found = encoder.encode_all(find(folder))
        return Data(found, encoder.captions[:4])

    def drawn(self, name: str, scenes: list[Scene], seed: int) -> Data:
        """Images of `scenes`, to be learnt."""
        write_images(self.work / name, scenes, seed)
        return self.encoded(self.work / name)

    def distilled(self, name: str, plan: Plan) -> Path:
        """The folder of an LCM-LoRA that was trained as `plan` says."""
        folder = self.work / name
        train(self.base(), plan, self.world, folder, Accelerator(device_placement=False), "miniature")
        return folder

    def few_step(self, lora: Path, base: Diffusion | None = None) -> Sampler:
        """The base with an LCM-LoRA fused."""
        diffusion = base or self.base()
        diffusion.load_lora_weights(lora.parent, weight_name=lora.name)
        diffusion.fuse_lora()
        diffusion.unload_lora_weights()
        diffusion.scheduler = LCMScheduler.from_config(diffusion.scheduler.config)
        return Sampler("LCM-LoRA", diffusion, 1.0)

    def teacher(self, base: Diffusion) -> Sampler:
        """The base as it is sampled at its best."""
        scheduler = DDIMScheduler.from_config(
            base.scheduler.config, clip_sample=False, set_alpha_to_one=False
        )
        base.scheduler = scheduler
        return Sampler("DDIM", base, TEACHER_GUIDANCE)


class Exam:
    """The judge's questions: one image of each of `scenes`."""

    def __init__(self, laboratory: Laboratory, scenes: Sequence[Scene]) -> None:
        rng = random.Random(11)
        self.prompts = [caption(scene, rng, complete=True) for scene in scenes]
        self._meter = JudgeMeter(laboratory.weights, scenes)

    def mark(self, sampler: Sampler, steps: int) -> tuple[dict[str, float], list[Image.Image]]:
        """Figures, rounded, and the images."""
        images = sampler.generate(self.prompts, steps)
        return {name: round(value, 1) for name, value in self._meter.measure(images).items()}, images


def curve(laboratory: Laboratory, out: Path) -> None:
    """The judge's figures at several steps of one run, twice as long as the preset's."""
    exam = Exam(laboratory, unseen_scenes(CAPTIONS))
    plan = preset("miniature", "lora").with_schedule(steps=360, checkpoint_every=10, checkpoints_kept=100)
    folder = laboratory.distilled("curve", replace(plan, watch_every=360))
    rows = []
    for trained in (0, 10, 20, 30, *range(40, 361, 40)):
        sampler = _at_step(laboratory, folder / "checkpoints", trained, plan)
        for count in STEPS:
            figures, _ = exam.mark(sampler, count)
            rows.append({"trained": trained, "steps": count, **figures})
            logger.info("%s", rows[-1])
    write_rows(rows, out / "training-curve.csv")
    _plot({"": rows}, "trained", "training steps", out / "training-curve.png")


def _at_step(laboratory: Laboratory, checkpoints: Path, step: int, plan: Plan) -> Sampler:
    """The base with the LoRA as it was at a checkpoint; at 0 it is the base alone."""
    diffusion = laboratory.base()
    diffusion.scheduler = LCMScheduler.from_config(diffusion.scheduler.config)
    if step == 0:
        return Sampler("LCM-LoRA", diffusion, 1.0)
    assert isinstance(plan.student, LoraStudent)
    add_lora(diffusion.unet, plan.student)
    trained = [parameter for parameter in diffusion.unet.parameters() if parameter.requires_grad]
    with safe_open(checkpoints / f"step-{step:06}.safetensors", framework="pt") as file, torch.no_grad():
        for i, parameter in enumerate(trained):
            parameter.copy_(file.get_tensor(f"{i}.ema"))
    return Sampler("LCM-LoRA", diffusion, 1.0)


def ablation(laboratory: Laboratory, out: Path) -> None:
    """Over k, the timesteps that one consistency step goes back, and over w, after as many steps each."""
    exam = Exam(laboratory, unseen_scenes(CAPTIONS))
    begun = preset("miniature", "lora").with_schedule(steps=100, batch=16, checkpoint_every=25)
    wished: list[tuple[str, float, dict[str, Any]]] = [
        ("k", k, {"solver_steps": 1000, "skip": k}) for k in (1, 5, 10, 20, 50, 100)
    ]
    wished += [("w", w, {"guidance": (w, w)}) for w in (0.0, 0.6, 1.2, 2.4, 6.5)]
    rows = []
    for what, value, student in wished:
        plan = replace(begun.with_student(**student), watch_every=100)
        folder = laboratory.distilled(f"ablation-{what}-{value:g}", plan)
        sampler = laboratory.few_step(folder / DIFFUSERS_FILE)
        for count in STEPS:
            figures, _ = exam.mark(sampler, count)
            rows.append({"over": what, "value": value, "steps": count, **figures})
            logger.info("%s", rows[-1])
    write_rows(rows, out / "training-ablation.csv")
    panels = {f"over {what}": [row for row in rows if row["over"] == what] for what in ("k", "w")}
    _plot(panels, "value", "", out / "training-ablation.png", log=True)


def _plot(panels: dict[str, list[dict[str, Any]]], x: str, label: str, path: Path, log: bool = False) -> None:
    """All right above, distance below, against column `x`; a line for each number of sampling steps."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        2, len(panels), figsize=(1 + 4 * len(panels), 5.6), sharey="row", layout="constrained", squeeze=False
    )
    for column, (title, rows) in enumerate(panels.items()):
        for row, (key, figure_title) in enumerate(FIGURES.items()):
            for count in STEPS:
                own = [one for one in rows if one["steps"] == count]
                named = f"{count} step{'s' if count > 1 else ''}"
                axes[row][column].plot([one[x] for one in own], [one[key] for one in own], "o-", label=named)
            if log:
                values = sorted({one[x] for one in rows})
                axes[row][column].set_xscale("symlog", linthresh=1)
                axes[row][column].set_xticks(values, [f"{value:g}" for value in values])
            axes[row][column].set_ylabel(figure_title if column == 0 else "")
            axes[row][column].spines[["top", "right"]].set_visible(False)
        axes[0][column].set_title(title)
        axes[0][column].set_ylim(0, 103)
        axes[1][column].set_xlabel(label or title.removeprefix("over "))
    axes[0][0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def universal(laboratory: Laboratory, out: Path) -> None:
    """The LCM-LoRA that was distilled on the base, on a base that has learnt a new backdrop since."""
    new = [scene for scene in all_scenes() if scene.new_backdrop and not scene.new_object]
    shown = [scene for scene in new if not scene.reserved]
    asked = [scene for scene in new if scene.reserved]
    learnt = laboratory.drawn("pyramids", pick_scenes(shown, 600, seed=1), 110_000_000)
    kept = laboratory.drawn("known", pick_scenes(training_scenes(), 600, seed=2), 120_000_000)
    tuned = laboratory.base()
    order_for_training(tuned.unet.requires_grad_(True))
    noise = NoiseSchedule.of(tuned.scheduler, CPU)
    batches = Batches([*learnt.encoded, *kept.encoded], 32, 3, CPU)
    schedule = Schedule(300, lr=3e-4, batch=32, weight_decay=0.0, ema_decay=0.98, checkpoint_every=50)
    loss = style_training(tuned.unet, batches, noise, seed=13)
    config = {**asdict(schedule), "pictures": [path.name for path in batches.encoded]}
    optimise("a new backdrop", tuned.unet, loss, schedule, laboratory.work / "universal", config=config)
    tuned.unet.requires_grad_(False)

    exams = {
        "new backdrop": Exam(laboratory, pick_scenes(asked, CAPTIONS, seed=4)),
        "known scenes": Exam(laboratory, unseen_scenes(CAPTIONS)),
    }
    lora = laboratory.weights / LCM_LORA
    systems = [
        ("base, LCM-LoRA", laboratory.few_step(lora), 4),
        ("fine-tuned base", laboratory.teacher(tuned), TEACHER_STEPS),
    ]
    rows: list[dict[str, Any]] = []
    images: list[Image.Image] = []
    for name, sampler, count in systems:
        _mark(name, sampler, count, exams, rows, images)
    fused = laboratory.few_step(lora, tuned)
    for count in STEPS:
        _mark("fine-tuned base, LCM-LoRA", fused, count, exams, rows, images)
    # Fusing adds up, so the style joins the LCM-LoRA; it leaves all attributes alone.
    tuned.load_lora_weights(laboratory.settings.styles_root / "miniature", weight_name=f"{STYLE}.safetensors")
    tuned.fuse_lora(lora_scale=0.8)
    _mark(f"fine-tuned base, LCM-LoRA, {STYLE} at 0.8", fused, 4, exams, rows, images)
    write_rows(rows, out / "training-universal.csv")
    grid(images, 6).save(out / "training-universal.webp", quality=90)


def _mark(
    name: str,
    sampler: Sampler,
    count: int,
    exams: dict[str, Exam],
    rows: list[dict[str, Any]],
    images: list[Image.Image],
) -> None:
    row: dict[str, Any] = {"system": name, "steps": count}
    for what, exam in exams.items():
        figures, generated = exam.mark(sampler, count)
        row |= {f"{what}: {figure}": value for figure, value in figures.items()}
        if what == next(iter(exams)):
            images += generated[:6]
    rows.append(row)
    logger.info("%s", row)


def finetuning(laboratory: Laboratory, out: Path) -> None:
    """200 images of an object that the model has never seen, by the two methods of `scripts/train`."""
    new = [scene for scene in all_scenes() if scene.new_object and not scene.new_backdrop]
    taught = pick_scenes([one for one in new if not one.reserved], 200, seed=5)
    write_images(laboratory.work / "windmills", taught, 130_000_000)
    exams = {
        "new object": Exam(laboratory, pick_scenes([one for one in new if one.reserved], 100, seed=6)),
        "known scenes": Exam(laboratory, unseen_scenes(CAPTIONS)),
    }
    lora = laboratory.weights / LCM_LORA
    rows: list[dict[str, Any]] = []
    images: list[Image.Image] = []
    _mark("before", laboratory.few_step(lora), 4, exams, rows, images)
    spec = get_model("miniature")
    for method, rehearse in product(("lcf", "style"), (None, 0)):
        name = method if rehearse is None else f"{method}, without rehearsal"
        folder = laboratory.work / f"finetuning-{name}"
        steps = preset("miniature", method).schedule.steps
        # As many steps for the new images in both.
        wish = Wish(method, steps if rehearse is None else steps // 2, rehearse=rehearse, watch_every=0)
        path = fine_tune(spec, laboratory.settings, wish, laboratory.work / "windmills", folder)
        both = laboratory.base()
        both.load_lora_weights(folder, weight_name=path.name)
        both.fuse_lora()
        both.unload_lora_weights()
        _mark(name, laboratory.few_step(lora, both), 4, exams, rows, images)
    write_rows(rows, out / "training-finetuning.csv")
    grid(images, 6).save(out / "training-finetuning.webp", quality=90)


EXPERIMENTS = {"curve": curve, "ablation": ablation, "universal": universal, "finetuning": finetuning}


def main() -> None:
    """Run one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--work", type=Path, default=Path("build/experiments"), help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="(%(default)s)")
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    chosen.out.mkdir(parents=True, exist_ok=True)
    EXPERIMENTS[chosen.name](Laboratory(chosen.work), chosen.out)


if __name__ == "__main__":
    main()
