"""One training, from a loaded diffusers pipeline and encoded images to files that others can load."""

from __future__ import annotations

import copy
import hashlib
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from safetensors import SafetensorError
from torch import Tensor

from fewstep.errors import TrainingError
from fewstep.models.load import Diffusion
from fewstep.training.card import write_card
from fewstep.training.consistency import NoiseSchedule
from fewstep.training.distill import (
    Distillation,
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
from fewstep.training.encoded import Batches
from fewstep.training.lora_files import save_lora
from fewstep.training.plan import Plan
from fewstep.training.prior_preservation import in_turns, keeping_training
from fewstep.training.samples import generate_samples
from fewstep.training.sources import halve_if_large
from fewstep.training.style import StyleStudent, add_style, style_training
from fewstep.training.trainer import WHOLE, Loss, Validation, optimise

logger = logging.getLogger(__name__)

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "kohya.safetensors"
VALIDATION_BATCH = 4  # whatever the training's is, and however many processes share it
VALIDATION_SEED = 999
# Images are held out for validation when there are that many; else it uses those of the training.
ENOUGH_TO_HOLD_OUT = 100
HELD_OUT = 16


@dataclass(frozen=True)
class Data:
    """Encoded images (see `Encoder`), prompts of the samples, and the encoded empty prompt, see `Batch`.

    `rehearsed` are encoded images of the model's own, on which a LoRA is to change nothing.
    """

    encoded: Sequence[Path]
    prompts: Sequence[str]
    empty: tuple[Tensor, ...] | None = None
    rehearsed: Sequence[Path] = ()

    def split(self) -> tuple[Sequence[Path], Sequence[Path]]:
        """For training and for validation, here and there one of the whole."""
        apart = max(1, len(self.encoded) // HELD_OUT)
        held_out = list(self.encoded[::apart][:HELD_OUT])
        if len(self.encoded) < ENOUGH_TO_HOLD_OUT:
            return self.encoded, held_out
        return [one for one in self.encoded if one not in held_out], held_out


def train(
    diffusion: Diffusion, plan: Plan, data: Data, folder: Path, accelerator: Accelerator, model: str
) -> None:
    """Train `diffusion.unet` as `plan` says, and leave in `folder` what a user loads.

    That is `pytorch_lora_weights.safetensors` and `kohya.safetensors`, or of a full LCM `unet/`; beside it
    the card, samples, the same files in `best/` as they were when the validation loss was lowest, and
    `checkpoints/`, from which a run that is started again goes on. `model` is what the card calls the base.
    Raises TrainingError as `optimise` does.
    """
    torch.manual_seed(plan.seed)  # of a fresh LoRA's first weights
    unet = diffusion.unet.requires_grad_(False)
    noise_schedule = NoiseSchedule.of(diffusion.scheduler, unet.device)
    own, average, loss_of = _trained(unet, plan, noise_schedule)
    for network in filter(None, (unet, own, average)):
        order_for_training(network)
    own.train()
    if plan.gradient_checkpointing:
        own.enable_gradient_checkpointing()
    encoded, held_out = data.split()
    device, size = unet.device, plan.schedule.batch
    batches = Batches(encoded, size, plan.seed, device, data.empty)
    watched = Batches(held_out, min(VALIDATION_BATCH, len(held_out)), plan.seed, device, data.empty)
    validate = loss_of(watched, VALIDATION_SEED)
    loss = loss_of(batches, plan.seed)
    if data.rehearsed:
        own_images = Batches(data.rehearsed, size, plan.seed, device, data.empty)
        guidance = plan.student.guidance if isinstance(plan.student, Distillation) else (0.0, 0.0)
        kept = keeping_training(own, own_images, noise_schedule, guidance, plan.seed + 1)
        loss = in_turns(loss, kept)
    told = {"model": model, **plan.told()}
    # A file's name is a hash of what was encoded.
    names = " ".join(path.name for path in (*encoded, *data.rehearsed))
    images = hashlib.sha256(names.encode()).hexdigest()
    _check_same(images, accelerator)
    result = average or own  # with a LoRA, the loop leaves the average in its place

    def look(step: int) -> float:
        _generate(
            diffusion, result, plan, data.prompts, folder / "samples" / f"step-{step:06}.webp", accelerator
        )
        with torch.no_grad():
            losses = [validate(i, WHOLE) for i in range(watched.per_epoch)]
        return float(torch.stack(losses).mean())

    def save(place: Path, step: int) -> None:
        _save(result, place, {**told, "step": step})

    watch = Validation(plan.watch_every, look, lambda step: save(folder / "best", step))
    optimise(
        plan.method,
        own,
        loss,
        plan.schedule,
        folder / "checkpoints",
        average,
        accelerator=accelerator,
        config={**told, "pictures": images, "fp16": accelerator.mixed_precision == "fp16"},
        watch=watch if plan.watch_every else None,
    )
    if accelerator.is_main_process:
        save(folder, plan.schedule.steps)
        write_card(folder, told, _guidance(result, plan))
    accelerator.wait_for_everyone()


def _check_same(images: str, accelerator: Accelerator) -> None:
    """Raises TrainingError when a process sees other images, as after a download that failed there."""
    own = torch.tensor([int(images[:15], 16)], device=accelerator.device)
    if (accelerator.gather(own) != own).any():
        raise TrainingError("the processes see different pictures; run it again")


def _trained(
    unet: UNet2DConditionModel, plan: Plan, schedule: NoiseSchedule
) -> tuple[UNet2DConditionModel, UNet2DConditionModel | None, Callable[[NextBatch, int], Loss]]:
    """The network whose parameters are trained, its average where it has one of its own, and what is
    minimised, of batches and a seed."""
    student = plan.student
    if isinstance(student, StyleStudent):
        halve_if_large(unet)
        add_style(unet, student)
        cast_training_params(unet)
        return unet, None, lambda batches, seed: style_training(unet, batches, schedule, seed)
    own, average = unet, None
    if isinstance(student, FullStudent):
        own = make_full_student(unet, student)  # in fp32, before the teacher is rounded
        halve_if_large(unet)
        average = copy.deepcopy(own).requires_grad_(False)
        roles = full_roles(own, average, unet)
    else:
        halve_if_large(unet)
        add_lora(unet, student)
        cast_training_params(unet)
        roles = lora_roles(unet) if plan.method == "lora" else finetuning_roles(unet)
    return (
        own,
        average,
        lambda batches, seed: consistency_training(roles, batches, schedule, student, seed),
    )


def _generate(
    diffusion: Diffusion,
    unet: UNet2DConditionModel,
    plan: Plan,
    prompts: Sequence[str],
    path: Path,
    accelerator: Accelerator,
) -> None:
    """A row of samples, to `path` and to whoever tracks the run."""
    few_steps = plan.method != "style"
    row = generate_samples(diffusion, unet, prompts, few_steps=few_steps, guidance=_guidance(unet, plan))
    path.parent.mkdir(parents=True, exist_ok=True)
    row.save(path, quality=90)
    step = int(path.stem.removeprefix("step-"))
    for tracker in accelerator.trackers:
        order = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({"samples": np.asarray(row)[None]}, step=step, **order)


def _guidance(unet: UNet2DConditionModel, plan: Plan) -> float:
    """What samples are generated with: of a full LCM, which is told w, the middle of what it was told."""
    student = plan.student
    if unet.config.time_cond_proj_dim and isinstance(student, Distillation):
        return 1.0 + sum(student.guidance) / 2
    return 1.0


def _save(network: UNet2DConditionModel, folder: Path, told: Mapping[str, object]) -> None:
    if hasattr(network, "peft_config"):
        save_lora(network, folder / DIFFUSERS_FILE, told)
        save_lora(network, folder / KOHYA_FILE, told, kohya=True)
        return
    target, part = folder / "unet", folder / "unet.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        network.save_pretrained(part)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        logger.error("the UNet could not be written", exc_info=error)
        raise TrainingError("the UNet could not be written; is the disk full?") from None
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
