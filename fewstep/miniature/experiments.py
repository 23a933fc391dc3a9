"""What the papers claim of few-step training, measured on the miniature:

    python -m fewstep.miniature.experiments NAME --work build/experiments --out benchmarks

NAME is curve (quality over training steps), ablation (over k and w), universal (the LCM-LoRA on a fine-tuned
base, alone and beside a style) or finetuning (a new object, taught without a teacher). Each writes
training-NAME.csv and a plot or a grid. A run that is started again goes on where it was.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from safetensors import safe_open

from fewstep.evaluation.figures import Panel, grid, plot_lines
from fewstep.evaluation.generate import Sampler, ddim, fuse_lora, lcm_lora
from fewstep.evaluation.metrics import Evaluator
from fewstep.evaluation.tables import write_csv
from fewstep.miniature.judge import load_judge, make_evaluator
from fewstep.miniature.scoring import TEACHER_GUIDANCE, TEACHER_STEPS
from fewstep.miniature.world.dataset import pick_scenes, training_captions, write_images, write_world
from fewstep.miniature.world.scenes import Scene, all_scenes, training_scenes, unseen_scenes
from fewstep.models.load import Diffusion
from fewstep.models.sources import LCM_LORA
from fewstep.settings import Settings
from fewstep.training.config import Plan, TrainingOptions, preset
from fewstep.training.consistency import NoiseSchedule
from fewstep.training.data import find
from fewstep.training.distill import LoraStudent, add_lora, order_for_training, style_training
from fewstep.training.export import DIFFUSERS_FILE
from fewstep.training.latents import Batches, Encoder
from fewstep.training.networks import load_base
from fewstep.training.run import Data, train, train_model
from fewstep.training.trainer import Schedule, optimise

logger = logging.getLogger(__name__)

CPU = torch.device("cpu")
SETTINGS = Settings(verify="size")
WEIGHTS = SETTINGS.weights_root / "miniature"
STYLE = "golden-hour"
TITLES = {"all_right": "all right, %", "distance": "Fréchet distance"}


@dataclass(frozen=True)
class ExperimentSizes:
    """How much of everything; where it is None, as much as the preset says."""

    captions: int = 150
    new_captions: int = 100  # of the object that is taught
    world: int = 4_000  # images to distil on
    learnt: int = 600  # images of a new backdrop, and as many of known ones
    taught: int = 200  # images of a new object
    rehearsed: int | None = None
    steps: tuple[int, ...] = (1, 2, 4, 8)  # to generate in
    teacher_steps: int = TEACHER_STEPS
    curve: tuple[int, ...] = (0, 10, 20, 30, *range(40, 361, 40))  # training steps
    ablation_steps: int = 100
    k: tuple[int, ...] = (1, 5, 10, 20, 50, 100)
    w: tuple[float, ...] = (0.0, 0.6, 1.2, 2.4, 6.5)
    learnt_steps: int = 300
    taught_steps: int | None = None
    batch: int | None = None


@dataclass(frozen=True)
class Experiment:
    """Where an experiment works and where its results go."""

    work: Path
    out: Path
    sizes: ExperimentSizes = ExperimentSizes()

    def base(self) -> Diffusion:
        """Load a fresh base, which may be changed."""
        return load_base("miniature", SETTINGS, CPU)

    def evaluator(self, scenes: Sequence[Scene] | None = None) -> Evaluator:
        """Return an evaluator of `scenes`, or of known things in new combinations."""
        return make_evaluator(load_judge(WEIGHTS), scenes or unseen_scenes(self.sizes.captions))

    def encoded(self, folder: Path) -> Data:
        """Encode the images in a folder, or take what an earlier run has encoded."""
        encoder = Encoder(self.base(), self.work / "encoded")
        return Data(encoder.encode_all(find(folder)), encoder.captions[:4])

    @cached_property
    def world(self) -> Data:
        """What the base was trained on, encoded."""
        write_world(self.work / "world", self.sizes.world)
        return self.encoded(self.work / "world")

    def distilled(self, name: str, plan: Plan) -> Path:
        """Train an LCM-LoRA on the world that the base knows, and return its folder."""
        if self.sizes.batch:
            plan = plan.with_schedule(batch=self.sizes.batch)
        accelerator = Accelerator(device_placement=False)
        train(self.base(), plan, self.world, self.work / name, accelerator, "miniature")
        return self.work / name

    def few_steps(self, lora: Path = WEIGHTS / LCM_LORA, style: Path | None = None) -> Sampler:
        """Return the base with an LCM-LoRA, on top of a style if there is one."""
        base = self.base()
        if style:
            fuse_lora(base, style)
        return lcm_lora(base, lora)

    def write(self, name: str, rows: Sequence[Mapping[str, Any]], images: Sequence[Image.Image] = ()) -> None:
        """Write the table, and six images of each row."""
        write_csv(self.out / f"training-{name}.csv", rows)
        if images:
            grid(images, 6).save(self.out / f"training-{name}.webp", quality=90)

    def plot(self, name: str, panels: dict[str, list[dict[str, Any]]], x: str, ticks: bool = False) -> None:
        """Draw all right above and distance below, against column `x`; a line for each number of steps."""

        def panel(figure: str, label: str, table: list[dict[str, Any]]) -> Panel:
            lines = {
                f"{n} step{'s' if n > 1 else ''}": [
                    (row[x], row[figure]) for row in table if row["steps"] == n
                ]
                for n in self.sizes.steps
            }
            scale, below = "symlog" if ticks else "linear", figure == "distance"
            plain = Panel(lines, y=TITLES[figure], ticks=ticks, x_scale=scale)
            return replace(plain, x=label) if below else replace(plain, y_range=(0, 103))

        rows = [[panel(figure, *item) for item in panels.items()] for figure in TITLES]
        plot_lines(rows, self.out / f"training-{name}.png", (4.5, 2.8), share_y=True)

    def rows(self, evaluator: Evaluator, sampler: Sampler, **columns: Any) -> list[dict[str, Any]]:
        """Return a row of figures for every number of steps."""
        rows = []
        for count in self.sizes.steps:
            figures = evaluator.measure(sampler.generate(evaluator.prompts, count))
            rounded = {name: round(value, 1) for name, value in figures.items()}
            rows.append({**columns, "steps": count, **rounded})
            logger.info("%s", rows[-1])
        return rows


def curve(experiment: Experiment) -> None:
    """Measure several steps of one training, twice as long as the preset's."""
    evaluator, steps = experiment.evaluator(), experiment.sizes.curve
    plan = preset("miniature", "lora").with_schedule(
        steps=steps[-1], checkpoint_every=steps[1], checkpoints_kept=100
    )
    checkpoints = experiment.distilled("curve", replace(plan, watch_every=steps[-1])) / "checkpoints"
    rows = []
    for step in steps:
        diffusion = experiment.base()
        if step:
            _load_checkpoint(diffusion, checkpoints / f"step-{step:06}.safetensors", plan)
        rows += experiment.rows(evaluator, lcm_lora(diffusion, None), trained=step)
    experiment.write("curve", rows)
    experiment.plot("curve", {"training steps": rows}, "trained")


def _load_checkpoint(diffusion: Diffusion, checkpoint: Path, plan: Plan) -> None:
    """Give the base the LoRA as it was at a checkpoint."""
    assert isinstance(plan.student, LoraStudent)
    add_lora(diffusion.unet, plan.student)
    trained = [parameter for parameter in diffusion.unet.parameters() if parameter.requires_grad]
    with safe_open(checkpoint, framework="pt") as file, torch.no_grad():
        for i, parameter in enumerate(trained):
            parameter.copy_(file.get_tensor(f"{i}.ema"))


def ablation(experiment: Experiment) -> None:
    """Vary k, the timesteps that one consistency step goes back, and w, for as many steps each."""
    evaluator, steps = experiment.evaluator(), experiment.sizes.ablation_steps
    plan = preset("miniature", "lora").with_schedule(steps=steps, batch=16, checkpoint_every=25)
    students: dict[str, dict[float, dict[str, Any]]] = {
        "k": {k: {"solver_steps": 1000, "skip": k} for k in experiment.sizes.k},
        "w": {w: {"guidance": (w, w)} for w in experiment.sizes.w},
    }
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name in students}
    for name, figures in students.items():
        for value, student in figures.items():
            varied = replace(plan.with_student(**student), watch_every=steps)
            folder = experiment.distilled(f"ablation-{name}-{value:g}", varied)
            sampler = experiment.few_steps(folder / DIFFUSERS_FILE)
            tables[name] += experiment.rows(evaluator, sampler, over=name, value=value)
    experiment.write("ablation", [row for rows in tables.values() for row in rows])
    experiment.plot("ablation", tables, "value", ticks=True)


class Comparison:
    """Systems measured on new things and on known ones, and images of the new things."""

    def __init__(self, evaluators: dict[str, Evaluator]) -> None:
        self.evaluators = evaluators
        self.rows: list[dict[str, Any]] = []
        self.images: list[Image.Image] = []

    def add(self, system: str, sampler: Sampler, steps: int) -> None:
        """Measure one system."""
        row: dict[str, Any] = {"system": system, "steps": steps}
        for i, (name, evaluator) in enumerate(self.evaluators.items()):
            images = sampler.generate(evaluator.prompts, steps)
            row |= {f"{name}: {key}": round(value, 1) for key, value in evaluator.measure(images).items()}
            self.images += images[:6] if i == 0 else []
        self.rows.append(row)
        logger.info("%s", row)


def _write_new(
    attribute: str, folder: Path, shown: int, asked: int, seeds: tuple[int, int, int]
) -> list[Scene]:
    """Write images of scenes that only in `attribute` are new to the base, `shown` of them, and return as
    many as are `asked` that are not among them; seeds of both choices, and of the images."""
    new = [scene for scene in all_scenes() if scene.new_to_base == [attribute]]
    write_images(
        folder, pick_scenes([scene for scene in new if not scene.reserved], shown, seeds[0]), seeds[2]
    )
    return pick_scenes([scene for scene in new if scene.reserved], asked, seeds[1])


def universal(experiment: Experiment) -> None:
    """Measure the LCM-LoRA that was distilled on the base, on a base that has learnt a new backdrop since."""
    sizes, work = experiment.sizes, experiment.work
    asked = _write_new("backdrop", work / "pyramids", sizes.learnt, sizes.captions, (1, 4, 110_000_000))
    write_images(work / "known", pick_scenes(training_scenes(), sizes.learnt, seed=2), 120_000_000)
    encoded = [path for name in ("pyramids", "known") for path in experiment.encoded(work / name).encoded]
    tuned = experiment.base()
    _tune(tuned, encoded, sizes, work / "universal")

    table = Comparison({"new backdrop": experiment.evaluator(asked), "known scenes": experiment.evaluator()})
    table.add("base, LCM-LoRA", experiment.few_steps(), 4)
    table.add("fine-tuned base", ddim(tuned, TEACHER_GUIDANCE), sizes.teacher_steps)
    fused = lcm_lora(tuned, WEIGHTS / LCM_LORA)
    for count in sizes.steps:
        table.add("fine-tuned base, LCM-LoRA", fused, count)
    # Fusing adds up, so the style joins the LCM-LoRA; it leaves all attributes alone.
    fuse_lora(tuned, SETTINGS.styles_root / "miniature" / f"{STYLE}.safetensors", 0.8)
    table.add(f"fine-tuned base, LCM-LoRA, {STYLE} at 0.8", fused, 4)
    experiment.write("universal", table.rows, table.images)


def _tune(diffusion: Diffusion, encoded: Sequence[Path], sizes: ExperimentSizes, checkpoints: Path) -> None:
    """Train all of the UNet on encoded images, by the diffusion loss."""
    unet = diffusion.unet
    order_for_training(unet.requires_grad_(True))
    batches = Batches(encoded, sizes.batch or 32, 3, CPU)
    schedule = Schedule(
        sizes.learnt_steps, lr=3e-4, batch=sizes.batch or 32, weight_decay=0.0, ema_decay=0.98,
        checkpoint_every=50,
    )  # fmt: skip
    loss = style_training(unet, batches, NoiseSchedule.of(diffusion.scheduler, CPU), seed=13)
    config = {**asdict(schedule), "pictures": [path.name for path in batches.encoded]}
    optimise("a new backdrop", unet, loss, schedule, checkpoints, config=config)
    unet.requires_grad_(False)


def finetuning(experiment: Experiment) -> None:
    """Teach images of an object that the model has never seen, by the two methods of `scripts/train`."""
    sizes, work = experiment.sizes, experiment.work
    new = work / "windmills"
    asked = _write_new("object", new, sizes.taught, sizes.new_captions, (5, 6, 130_000_000))
    table = Comparison({"new object": experiment.evaluator(asked), "known scenes": experiment.evaluator()})
    table.add("before", experiment.few_steps(), 4)
    for method, rehearse in product(("lcf", "style"), (sizes.rehearsed, 0)):
        name = method if rehearse != 0 else f"{method}, without rehearsal"
        steps = sizes.taught_steps or preset("miniature", method).schedule.steps
        # As many steps for the new images in both.
        options = TrainingOptions(
            method, steps if rehearse != 0 else steps // 2, sizes.batch, rehearse=rehearse, watch_every=0
        )
        folder = work / f"finetuning-{name}"
        lora = train_model(
            "miniature", SETTINGS, options, lambda: find(new), folder, prior_prompts=training_captions
        )
        table.add(name, experiment.few_steps(style=lora), 4)
    experiment.write("finetuning", table.rows, table.images)


EXPERIMENTS = {experiment.__name__: experiment for experiment in (curve, ablation, universal, finetuning)}


def main() -> None:
    """Run one experiment."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--work", type=Path, default=Path("build/experiments"), help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="(%(default)s)")
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    chosen.out.mkdir(parents=True, exist_ok=True)
    EXPERIMENTS[chosen.name](Experiment(chosen.work, chosen.out))


if __name__ == "__main__":
    main()
