"""One training, from a loaded diffusers pipeline and encoded pictures to files that others can load."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from torch import Tensor

from fewstep.text_encoding import Diffusion
from fewstep.training.card import write_card
from fewstep.training.consistency import NoiseSchedule
from fewstep.training.datasets import Batches
from fewstep.training.distill import (
    FullStudent,
    NextBatch,
    add_lora,
    consistency_training,
    finetuning_roles,
    full_roles,
    lora_roles,
    make_full_student,
    order_for_training,
)
from fewstep.training.loop import WHOLE, Loss, Watch, optimise
from fewstep.training.lora_files import save_lora
from fewstep.training.plan import Plan
from fewstep.training.samples import paint_samples
from fewstep.training.style import StyleStudent, add_style, style_training

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "kohya.safetensors"
VALIDATION_BATCHES = 4
VALIDATION_SEED = 999
# Pictures are held out for validation when there are that many; else it uses those of the training.
ENOUGH_TO_HOLD_OUT = 100
HELD_OUT = 16


@dataclass(frozen=True)
class Data:
    """Encoded pictures (see `Encoder`), prompts of the samples, and the encoded empty prompt, see `Batch`."""

    encoded: Sequence[Path]
    prompts: Sequence[str]
    empty: Tensor | None = None

    def split(self) -> tuple[Sequence[Path], Sequence[Path]]:
        """For training and for validation."""
        if len(self.encoded) < ENOUGH_TO_HOLD_OUT:
            return self.encoded, self.encoded[:HELD_OUT]
        return self.encoded[HELD_OUT:], self.encoded[:HELD_OUT]


def train(
    diffusion: Diffusion, plan: Plan, data: Data, folder: Path, accelerator: Accelerator, model: str
) -> None:
    """Train `diffusion.unet` as `plan` says, and leave in `folder` what a user loads.

    That is `pytorch_lora_weights.safetensors` and `kohya.safetensors`, or of a full LCM `unet/`; beside it
    the card, samples, the same files in `best/` as they were when the validation loss was lowest, and
    `checkpoints/`, from which a run that is started again goes on. `model` is what the card calls the base.
    Raises TrainingError as `optimise` does.
    """
    unet = diffusion.unet.requires_grad_(False)
    own, average, loss_of = _trained(unet, plan, NoiseSchedule.of(diffusion.scheduler, unet.device))
    for network in filter(None, (unet, own, average)):
        order_for_training(network)
    own.train()
    if plan.gradient_checkpointing:
        own.enable_gradient_checkpointing()
    encoded, held_out = data.split()
    device, size = unet.device, plan.schedule.batch
    batches = Batches(encoded, size, plan.seed, device, data.empty)
    validate = loss_of(
        Batches(held_out, min(size, len(held_out)), plan.seed, device, data.empty), VALIDATION_SEED
    )
    told = {"model": model, **plan.told()}
    result = average or own  # with a LoRA, the loop leaves the average in its place

    def look(step: int) -> float:
        row = paint_samples(
            diffusion, result, data.prompts, few_steps=plan.method != "style", guidance=_guidance(plan)
        )
        path = folder / "samples" / f"step-{step:06}.webp"
        path.parent.mkdir(parents=True, exist_ok=True)
        row.save(path, quality=90)
        for tracker in accelerator.trackers:
            order = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": np.asarray(row)[None]}, step=step, **order)
        with torch.no_grad():
            losses = [validate(i, WHOLE) for i in range(VALIDATION_BATCHES)]
        return float(torch.stack(losses).mean())

    def save(place: Path, step: int) -> None:
        _save(result, place, {**told, "step": step})

    optimise(
        plan.method,
        own,
        loss_of(batches, plan.seed),
        plan.schedule,
        folder / "checkpoints",
        average,
        accelerator=accelerator,
        config={**told, "pictures": len(encoded)},
        watch=Watch(plan.watch_every, look, lambda step: save(folder / "best", step)),
    )
    if accelerator.is_main_process:
        save(folder, plan.schedule.steps)
        write_card(folder, told, _guidance(plan))
    accelerator.wait_for_everyone()


def _trained(
    unet: UNet2DConditionModel, plan: Plan, schedule: NoiseSchedule
) -> tuple[UNet2DConditionModel, UNet2DConditionModel | None, Callable[[NextBatch, int], Loss]]:
    """The network whose parameters are trained, its average where it has one of its own, and what is
    minimised, of batches and a seed."""
    student = plan.student
    if isinstance(student, StyleStudent):
        add_style(unet, student)
        cast_training_params(unet)
        return unet, None, lambda batches, seed: style_training(unet, batches, schedule, seed)
    own, average = unet, None
    if isinstance(student, FullStudent):
        own = make_full_student(unet, student)
        average = copy.deepcopy(own).requires_grad_(False)
        roles = full_roles(own, average, unet)
    else:
        add_lora(unet, student)
        cast_training_params(unet)  # the frozen weights may be of 16 bits
        roles = lora_roles(unet) if plan.method == "lora" else finetuning_roles(unet)
    return (
        own,
        average,
        lambda batches, seed: consistency_training(roles, batches, schedule, student, seed),
    )


def _guidance(plan: Plan) -> float:
    """What samples are painted with: of a full LCM, which is told w, the middle of what it was told."""
    return 1.0 + sum(plan.student.guidance) / 2 if isinstance(plan.student, FullStudent) else 1.0


def _save(network: UNet2DConditionModel, folder: Path, told: Mapping[str, object]) -> None:
    if not hasattr(network, "peft_config"):
        network.save_pretrained(folder / "unet")
        return
    save_lora(network, folder / DIFFUSERS_FILE, told)
    save_lora(network, folder / KOHYA_FILE, told, kohya=True)
