"""What is trained, and how."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

from fewstep.training.distill import FullStudent, LoraStudent
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
    """`method` is one of METHODS, and `student` of its kind."""

    method: str
    student: Student
    schedule: Schedule
    seed: int = 0
    watch_every: int = 200  # steps between two validations, each with a row of samples; 0: none
    gradient_checkpointing: bool = False  # a third more time, a fraction of the memory
    rehearse: int = 0  # images of its own that a model is not to forget; every other step is for them

    def with_student(self, **figures: Any) -> Plan:
        """With other figures for what is trained. Raises TypeError for those that it has not."""
        return replace(self, student=replace(self.student, **figures))

    def with_schedule(self, **figures: Any) -> Plan:
        """With other figures for how it is trained; a run of few steps warms up for a tenth of them."""
        schedule = replace(self.schedule, **figures)
        warmup = max(1, min(schedule.warmup, schedule.steps // 10))
        return replace(self, schedule=replace(schedule, warmup=warmup))

    def told(self) -> dict[str, object]:
        """Every figure by its name, for metadata, logs and the card."""
        own = {
            "method": self.method,
            "seed": self.seed,
            "gradient_checkpointing": self.gradient_checkpointing,
            "rehearse": self.rehearse,
        }
        return own | asdict(self.student) | asdict(self.schedule)
