"""What is trained and how: a caller's options, and for each kind of model the plan of presets.toml to begin
with."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from fewstep.errors import DatasetError, TrainingError
from fewstep.request import SIDE
from fewstep.training.distill import Distillation, FullStudent, LoraStudent, StyleStudent
from fewstep.training.trainer import Schedule

PRESETS = Path(__file__).with_name("presets.toml")

Student: TypeAlias = LoraStudent | FullStudent | StyleStudent
STUDENTS: dict[str, Callable[..., Student]] = {
    "lora": LoraStudent,  # an LCM-LoRA, distilled from a base
    "full": FullStudent,  # a full LCM, distilled from a base
    "lcf": LoraStudent,  # for the few-step model that it is trained on, without a teacher
    "style": StyleStudent,  # knows nothing of few steps
}


@dataclass(frozen=True)
class Plan:
    """One training: `method` is one of STUDENTS, and `student` of its kind."""

    method: str
    student: Student
    schedule: Schedule
    seed: int = 0
    watch_every: int = 200  # steps between two validations, each with a row of samples; 0: none
    gradient_checkpointing: bool = False  # a third more time, a fraction of the memory
    rehearse: int = 0  # images of its own that a model is not to forget; every other step is for them

    def with_student(self, **figures: Any) -> Plan:
        """Return the plan with other figures of its student. Raises TypeError for those that it has not."""
        return replace(self, student=replace(self.student, **figures))

    def with_schedule(self, **figures: Any) -> Plan:
        """Return the plan with other figures for the optimiser; few steps warm up for a tenth of them."""
        schedule = replace(self.schedule, **figures)
        warmup = max(1, min(schedule.warmup, schedule.steps // 10))
        return replace(self, schedule=replace(schedule, warmup=warmup))

    def metadata(self) -> dict[str, object]:
        """Return every figure by its name, for files, logs and the card."""
        own = ("method", "seed", "gradient_checkpointing", "rehearse")
        return {name: getattr(self, name) for name in own} | asdict(self.student) | asdict(self.schedule)


@dataclass(frozen=True)
class TrainingOptions:
    """What a caller may choose; None is the preset's, and of `resolution`, the side of squares in px, the
    model's own. The last three are for distillation."""

    method: str = "lcf"
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    rank: int | None = None
    resolution: int | None = None
    seed: int = 0
    rehearse: int | None = None
    watch_every: int | None = None
    accumulate: int | None = None
    guidance: tuple[float, float] | None = None
    skip: int | None = None

    def plan(self, model: str) -> Plan:
        """Return the preset of `model` with what was chosen.

        Raises DatasetError for a resolution that no network takes, and TrainingError for a `skip` beyond the
        solver's steps.
        """
        side, (low, high) = self.resolution, SIDE
        if side is not None and (side % 8 or not low <= side <= high):
            raise DatasetError(f"the resolution is {side}; it must be a multiple of 8 from {low} to {high}")
        plan = preset(model, self.method)
        plan = plan.with_student(**_chosen(rank=self.rank, guidance=self.guidance, skip=self.skip))
        student = plan.student
        if isinstance(student, Distillation) and student.skip >= student.solver_steps:
            raise TrainingError(f"--skip must be less than {student.solver_steps}, the steps of the solver")
        schedule = {"steps": self.steps, "batch": self.batch_size, "lr": self.learning_rate}
        plan = plan.with_schedule(**_chosen(**schedule, accumulate=self.accumulate))
        more = _chosen(watch_every=self.watch_every, rehearse=self.rehearse)
        return replace(plan, seed=self.seed, **more)


def _chosen(**figures: Any) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if value is not None}


def preset(model: str, method: str) -> Plan:
    """Return where to begin with `model`, by name; what has no presets is taken for one of SDXL's size."""
    presets = tomllib.loads(PRESETS.read_text(encoding="utf-8"))
    figures = presets.get(model, presets["real"])[method]
    student = figures.pop("student")
    if "guidance" in student:
        student["guidance"] = tuple(student["guidance"])
    schedule = Schedule(**figures.pop("schedule"))
    return Plan(method, STUDENTS[method](**student), schedule, **figures)
