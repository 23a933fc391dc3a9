"""What is trained and how: a caller's options, and for each kind of model a plan to begin with, which has a
reason for what is not obvious.

LCM is arXiv 2310.04378, the LCM-LoRA report 2311.05556.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

from fewstep.errors import DatasetError, TrainingError
from fewstep.request import SIDE
from fewstep.training.distill import Distillation, FullStudent, LoraStudent
from fewstep.training.style import StyleStudent
from fewstep.training.trainer import Schedule

METHODS = {
    "lora": "an LCM-LoRA, distilled from its base",
    "full": "a full LCM, distilled from its base",
    "lcf": "a LoRA for the few-step model that it was trained on, without a teacher",
    "style": "an ordinary LoRA, which knows nothing of few steps",
}

Student: TypeAlias = LoraStudent | FullStudent | StyleStudent


@dataclass(frozen=True)
class Plan:
    """One training: `method` is one of METHODS, and `student` of its kind."""

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


_REAL_LORA = Plan(
    method="lora",
    student=LoraStudent(
        rank=64,  # of the published LCM-LoRAs: 67.5, 105 and 197 million parameters, as in the report's table
        guidance=(6.5, 6.5),  # the report's guidance scale of 7.5 is 1 + w
        solver_steps=50,
        skip=1,  # of 50 among 1,000 timesteps: k = 20, as in LCM
        huber_c=1e-3,  # of the LCM scripts in diffusers
    ),
    schedule=Schedule(
        steps=4_000,  # LCM's figure, about 32 hours of an A100
        lr=1e-4,  # of the LCM-LoRA scripts in diffusers
        batch=12,  # of the same
        warmup=100,  # AdamW's first steps are its wildest
        weight_decay=0.0,  # a LoRA is small already
        ema_decay=0.95,  # a short memory, which only calms the last steps
        checkpoint_every=200,  # of some seconds each: minutes are lost at most
    ),
    watch_every=500,
    gradient_checkpointing=True,  # without it, one image of 1024 px fills 24 GB
)

_REAL_FULL = replace(
    _REAL_LORA,
    method="full",
    student=FullStudent(
        guidance=(2.0, 14.0),  # LCM's range of w
        width=256,  # of LCM_Dreamshaper_v7
    ),
    schedule=replace(
        _REAL_LORA.schedule,
        lr=1e-6,  # of the LCM scripts in diffusers: all weights move
        ema_decay=0.95,  # the target's; of the same scripts
        checkpoint_every=500,  # of 41 GB each
    ),
)

# Fine-tuning of a few-step model: the LoRA of a user's images, some dozens of them.
_REAL_LCF = replace(
    _REAL_LORA,
    method="lcf",
    student=LoraStudent(
        rank=16,  # one subject needs less than all there is
        guidance=(2.0, 14.0),  # a full LCM takes w; others do not
    ),
    schedule=replace(
        _REAL_LORA.schedule,
        steps=1_000,  # every other one rehearses
        batch=4,
        warmup=50,
        checkpoint_every=100,
    ),
    watch_every=200,
    rehearse=200,  # DreamBooth takes some hundreds of a class
)

# The miniature's build distils its LCM-LoRA with the same figures.
MINIATURE_LORA = LoraStudent(
    rank=32,  # of a UNet whose widest layer has 192 channels
    guidance=(0.8, 1.6),  # 1.8 to 2.6 for the teacher: from 3 on, colours burn
    skip=5,  # k = 100: noise is reached in few links, so that 180 steps suffice
    inverse_sigma=True,  # else more steps generate worse images, see Distillation
    huber_c=0.3,
)
MINIATURE_SCHEDULE = Schedule(
    steps=180,  # 10 minutes on two cores; 99 % all right by then
    lr=5e-4,
    batch=48,
    weight_decay=0.0,
    ema_decay=0.98,
    checkpoint_every=20,
)

_MINIATURE_FULL = Plan(
    method="full",
    student=FullStudent(
        guidance=(0.5, 2.0),  # about those that this base is guided with
        skip=5,
        inverse_sigma=True,
        huber_c=0.3,
        width=64,  # as wide as the UNet's first block
    ),
    schedule=replace(MINIATURE_SCHEDULE, steps=400, lr=3e-4),
    watch_every=60,
)

_MINIATURE_LCF = Plan(
    method="lcf",
    student=replace(MINIATURE_LORA, rank=16, guidance=(0.0, 0.0)),
    schedule=replace(
        MINIATURE_SCHEDULE,
        steps=800,  # every other one rehearses; 10 minutes on one core
        lr=1e-3,  # at half of it, the new object stays blurred
        batch=16,
        warmup=20,
    ),
    rehearse=600,  # with 200 the miniature forgets twice as much
)

REAL = {
    "lora": _REAL_LORA,
    "full": _REAL_FULL,
    "lcf": _REAL_LCF,
    "style": replace(_REAL_LCF, method="style", student=StyleStudent(rank=16)),
}
MINIATURE = {
    "lora": Plan("lora", MINIATURE_LORA, MINIATURE_SCHEDULE, watch_every=60),
    "full": _MINIATURE_FULL,
    "lcf": _MINIATURE_LCF,
    "style": replace(_MINIATURE_LCF, method="style", student=StyleStudent(rank=16)),
}


def preset(model: str, method: str) -> Plan:
    """Return where to begin with `model`, by name; what has no presets is taken for one of SDXL's size."""
    return {"miniature": MINIATURE}.get(model, REAL)[method]
