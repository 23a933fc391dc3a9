"""What the papers claim of few-step training, measured on the miniature:

    python -m fewstep.miniature.experiments NAME --work build/experiments --out benchmarks

NAME is curve (quality over training steps), ablation (over k and w), universal (the LCM-LoRA on a fine-tuned
base, alone and beside a style) or finetuning (a new thing, taught without a teacher). Each writes
training-NAME.csv and a plot or a grid. A run that is started again goes on where it was.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open

from fewstep.evaluation.compare import TITLES, Comparison
from fewstep.evaluation.figures import Panel, grid, lines_of, plot_lines
from fewstep.evaluation.generate import Sampler, ddim, fuse_lora, lcm_lora
from fewstep.miniature.judge import load_judge
from fewstep.miniature.scoring import TEACHER_GUIDANCE, TEACHER_STEPS, Evaluator
from fewstep.miniature.world.dataset import training_captions, write_images, write_world
from fewstep.miniature.world.scenes import (
    HELD_OUT_BACKDROP,
    HELD_OUT_THINGS,
    Scene,
    draw_scenes,
    scenes_with,
    unseen_scenes,
)
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

CPU = torch.device("cpu")
SIDE = 128  # px, the smaller of the sizes that the base knows, at a quarter of the larger one's cost
SETTINGS = Settings(verify="size")
WEIGHTS = SETTINGS.weights_root / "miniature"
STYLE = "golden-hour"
TAUGHT = HELD_OUT_THINGS[0]
COLUMNS = 6  # images of each row of a grid


@dataclass(frozen=True)
class ExperimentSizes:
    """How much of everything; where it is None, as much as the preset says."""

    captions: int = 150
    new_captions: int = 100  # of the thing that is taught
    world: int = 4_000  # images to distil on
    learnt: int = 600  # images of a new backdrop, and as many of known ones
    taught: int = 200  # images of a new thing
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
        """Load a fresh base, which may be changed; its own size is SIDE."""
        diffusion = load_base("miniature", SETTINGS, CPU)
        diffusion.unet.register_to_config(sample_size=SIDE // diffusion.vae_scale_factor)
        return diffusion

    def table(self, name: str, **new: Sequence[Scene]) -> Comparison:
        """Return the empty table `name`: of scenes with a new thing, if any, and of known things in new
        combinations."""
        known, judge = unseen_scenes(self.sizes.captions), load_judge(WEIGHTS)
        asked = {f"new {thing}: ": scenes for thing, scenes in new.items()}
        asked |= {"known scenes: " if new else "": known}
        evaluators = {prefix: Evaluator(judge, scenes, SIDE) for prefix, scenes in asked.items()}
        measured = {prefix: (one.prompts, [one.measure]) for prefix, one in evaluators.items()}
        return Comparison(self.out / f"training-{name}.csv", measured, COLUMNS)

    def encoded(self, folder: Path) -> Data:
        """Encode the images in a folder, or take what an earlier run has encoded."""
        encoder = Encoder(self.base(), self.work / "encoded")
        return Data(encoder.encode_all(find(folder)), encoder.captions[:4])

    @cached_property
    def world(self) -> Data:
        """What the base was trained on, encoded."""
        write_world(self.work / "world", self.sizes.world, SIDE)
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

    def plot(self, name: str, panels: dict[str, list[dict[str, Any]]], x: str, ticks: bool = False) -> None:
        """Draw all right above and distance below, against column `x`; a line for each number of steps."""

        def panel(figure: str, label: str, table: list[dict[str, Any]]) -> Panel:
            lines = lines_of(table, "steps", x, figure)
            named = {f"{n} step{'s' if n > 1 else ''}": points for n, points in lines.items()}
            plain = Panel(named, y=TITLES[figure], ticks=ticks, x_scale="symlog" if ticks else "linear")
            return replace(plain, x=label) if figure == "distance" else replace(plain, y_range=(0, 103))

        rows = [[panel(figure, *item) for item in panels.items()] for figure in ("all_right", "distance")]
        plot_lines(rows, self.out / f"training-{name}.png", (4.5, 2.8), share_y=True)


def curve(experiment: Experiment) -> None:
    """Measure several steps of one training, twice as long as the preset's."""
    table, steps = experiment.table("curve"), experiment.sizes.curve
    plan = preset("miniature", "lora").with_schedule(
        steps=steps[-1], checkpoint_every=steps[1], checkpoints_kept=100
    )
    checkpoints = experiment.distilled("curve", replace(plan, watch_every=steps[-1])) / "checkpoints"
    for step in steps:
        diffusion = experiment.base()
        if step:
            _load_checkpoint(diffusion, checkpoints / f"step-{step:06}.safetensors", plan)
        table.add(lcm_lora(diffusion, None), experiment.sizes.steps, trained=step)
    experiment.plot("curve", {"training steps": table.rows}, "trained")


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
    table, steps = experiment.table("ablation"), experiment.sizes.ablation_steps
    plan = preset("miniature", "lora").with_schedule(steps=steps, batch=16, checkpoint_every=25)
    students: list[tuple[str, float, dict[str, Any]]] = [
        *(("k", k, {"solver_steps": 1000, "skip": k}) for k in experiment.sizes.k),
        *(("w", w, {"guidance": (w, w)}) for w in experiment.sizes.w),
    ]
    for name, value, student in students:
        varied = replace(plan.with_student(**student), watch_every=steps)
        folder = experiment.distilled(f"ablation-{name}-{value:g}", varied)
        sampler = experiment.few_steps(folder / DIFFUSERS_FILE)
        table.add(sampler, experiment.sizes.steps, over=name, value=value)
    panels = {name: [row for row in table.rows if row["over"] == name] for name in ("k", "w")}
    experiment.plot("ablation", panels, "value", ticks=True)


def universal(experiment: Experiment) -> None:
    """Measure the LCM-LoRA that was distilled on the base, on a base that has learnt a new backdrop since."""
    sizes, work = experiment.sizes, experiment.work
    write_images(work / "new", scenes_with(HELD_OUT_BACKDROP, sizes.learnt, 1), 110_000_000, SIDE)
    write_images(work / "known", draw_scenes(sizes.learnt, 2), 120_000_000, SIDE)
    encoded = [path for name in ("new", "known") for path in experiment.encoded(work / name).encoded]
    tuned = experiment.base()
    _tune(tuned, encoded, sizes, work / "universal")

    asked = scenes_with(HELD_OUT_BACKDROP, sizes.captions, 4, reserved=True)
    table = experiment.table("universal", backdrop=asked)
    table.add(experiment.few_steps(), [4], system="base, LCM-LoRA")
    table.add(ddim(tuned, TEACHER_GUIDANCE), [sizes.teacher_steps], system="fine-tuned base")
    fused = lcm_lora(tuned, WEIGHTS / LCM_LORA)
    table.add(fused, sizes.steps, system="fine-tuned base, LCM-LoRA")
    # Fusing adds up, so the style joins the LCM-LoRA; it leaves all attributes alone.
    fuse_lora(tuned, SETTINGS.styles_root / "miniature" / f"{STYLE}.safetensors", 0.8)
    table.add(fused, [4], system=f"fine-tuned base, LCM-LoRA, {STYLE} at 0.8")
    grid(table.images, COLUMNS).save(table.path.with_suffix(".webp"), quality=90)


def _tune(diffusion: Diffusion, encoded: Sequence[Path], sizes: ExperimentSizes, checkpoints: Path) -> None:
    """Train all of the UNet on encoded images, by the diffusion loss."""
    unet, batch = diffusion.unet, sizes.batch or 32
    order_for_training(unet.requires_grad_(True))
    batches = Batches(encoded, batch, 3, CPU)
    schedule = Schedule(
        sizes.learnt_steps, lr=3e-4, batch=batch, weight_decay=0.0, ema_decay=0.98, checkpoint_every=50
    )
    loss = style_training(unet, batches, NoiseSchedule.of(diffusion.scheduler, CPU), seed=13)
    config = {**asdict(schedule), "pictures": [path.name for path in batches.encoded]}
    optimise("a new backdrop", unet, loss, schedule, checkpoints, config=config)
    unet.requires_grad_(False)


def finetuning(experiment: Experiment) -> None:
    """Teach images of a thing that the model has never seen, by the two methods of `scripts/train`."""
    sizes, work = experiment.sizes, experiment.work
    new = work / TAUGHT
    write_images(new, scenes_with(TAUGHT, sizes.taught, 5), 130_000_000, SIDE)
    asked = scenes_with(TAUGHT, sizes.new_captions, 6, reserved=True)
    table = experiment.table("finetuning", thing=asked)
    table.add(experiment.few_steps(), [4], system="before")
    for method, rehearse in product(("lcf", "style"), (sizes.rehearsed, 0)):
        name = method if rehearse != 0 else f"{method}, without rehearsal"
        steps = sizes.taught_steps or preset("miniature", method).schedule.steps
        steps = steps if rehearse != 0 else steps // 2  # as many for the new images in both
        options = TrainingOptions(
            method, steps, sizes.batch, rehearse=rehearse, watch_every=0, resolution=SIDE
        )
        folder = work / f"finetuning-{name}"
        lora = train_model(
            "miniature", SETTINGS, options, lambda: find(new), folder, prior_prompts=training_captions
        )
        table.add(experiment.few_steps(style=lora), [4], system=name)
    grid(table.images, COLUMNS).save(table.path.with_suffix(".webp"), quality=90)


EXPERIMENTS = {experiment.__name__: experiment for experiment in (curve, ablation, universal, finetuning)}


def main() -> None:
    """Run one experiment."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("name", choices=EXPERIMENTS)
    parser.add_argument("--work", type=Path, default=Path("build/experiments"), help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks"), help="(%(default)s)")
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    EXPERIMENTS[chosen.name](Experiment(chosen.work, chosen.out))


if __name__ == "__main__":
    main()
