"""One training, from a model, images and a caller's options to files that others can load.

Latent Consistency Fine-tuning ("Latent Consistency Models", arXiv 2310.04378, section 4.4) needs no teacher:
its loss is Algorithm 1's, see distill.py, and the images and their noise answer in the teacher's place. So
the model goes on generating in few steps.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import LCMScheduler, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from PIL import Image
from torch import Tensor

from fewstep.errors import SettingsError
from fewstep.generation.reference import generate_images
from fewstep.models.device import device_and_dtype
from fewstep.models.load import Diffusion
from fewstep.models.manifest import MANIFEST
from fewstep.models.sources import LCM_LORA
from fewstep.models.specs import get_model
from fewstep.settings import Settings
from fewstep.training import distill, prior_preservation
from fewstep.training.config import Plan, TrainingOptions
from fewstep.training.consistency import NoiseSchedule
from fewstep.training.data import Captioned, find
from fewstep.training.export import DIFFUSERS_FILE, save_network, write_card
from fewstep.training.latents import Batches, Encoder
from fewstep.training.networks import halve_if_large, load_base, load_few_step
from fewstep.training.prior_preservation import FEW_STEPS, varied_prompts
from fewstep.training.trainer import WHOLE, Loss, Validation, check_same, check_shares, optimise

logger = logging.getLogger(__name__)

SAMPLES = 4
# For a LoRA on the base alone, which knows nothing of few steps.
BASE_STEPS, BASE_GUIDANCE = 20, 5.0
VALIDATION_BATCH = 4  # whatever the training's is, and however many processes share it
VALIDATION_SEED = 999
# Images are held out for validation when there are that many; else it uses those of the training.
ENOUGH_TO_HOLD_OUT = 100
HELD_OUT = 16


@dataclass(frozen=True)
class Data:
    """Encoded images (see `Encoder`), prompts of the samples, and the encoded empty prompt, see `Batch`.

    `prior` are encoded images of the model's own, on which a LoRA is to change nothing.
    """

    encoded: Sequence[Path]
    prompts: Sequence[str]
    empty: tuple[Tensor, ...] | None = None
    prior: Sequence[Path] = ()

    def split(self) -> tuple[Sequence[Path], Sequence[Path]]:
        """Return those for training and those for validation, here and there one of the whole."""
        held_out = self.encoded[:: max(1, len(self.encoded) // HELD_OUT)][:HELD_OUT]
        if len(self.encoded) < ENOUGH_TO_HOLD_OUT:
            return self.encoded, held_out
        return [path for path in self.encoded if path not in held_out], held_out


def train_model(
    model: str,
    settings: Settings,
    options: TrainingOptions,
    images: Callable[[], Iterable[Captioned]],
    folder: Path,
    *,
    limit: int | None = None,
    prior_prompts: Callable[[int], Sequence[str]] = varied_prompts,
    accelerator: Accelerator | None = None,
) -> Path:
    """Train `model` on the first `limit` of what `images` finds, and return what a user loads, in `folder`;
    see `train` for what else is there.

    `model` is one of ours, or to distil it any diffusers folder. Where the plan rehearses, the model
    generates images of as many `prior_prompts` first. Raises DatasetError for images, WeightsError for
    weights, SettingsError for a device that cannot be used or a full LCM that has no base, and TrainingError.
    """
    accelerator = accelerator or Accelerator(device_placement=False)
    device = accelerator.device if settings.device == "auto" else device_and_dtype(settings)[0]
    plan = options.plan(model)
    check_shares(plan.schedule, accelerator)
    if plan.method == "style" and not get_model(model).lcm_lora:
        raise SettingsError("the model is a full LCM and has no base for a style; train it with lcf")
    with accelerator.main_process_first():
        found = images()
    diffusion = (load_few_step if plan.method == "lcf" else load_base)(model, settings, device)
    with accelerator.main_process_first():
        encoder = Encoder(diffusion, folder / "encoded", options.resolution)
        encoded, captions, prior = encoder.encode_all(found, limit), encoder.captions, list[Path]()
        if plan.rehearse:
            weights = settings.weights_root / model
            key = f"{plan.rehearse} {(weights / MANIFEST).read_text()}"
            own = folder / "rehearsal" / hashlib.sha256(key.encode()).hexdigest()[:16]
            if plan.method != "lcf":  # a base generates in few steps meanwhile
                diffusion.load_lora_weights(weights, weight_name=LCM_LORA)
            prior_preservation.generate_prior_images(own, prior_prompts(plan.rehearse), diffusion)
            if plan.method != "lcf":
                diffusion.unload_lora_weights()
            prior = encoder.encode_all(find(own))
    logger.info("training %s on %d images, seed %d", plan.method, len(encoded), plan.seed)
    data = Data(encoded, list(dict.fromkeys(captions))[:SAMPLES], encoder.no_prompt(), prior)
    train(diffusion, plan, data, folder, accelerator, model)
    return folder / ("unet" if plan.method == "full" else DIFFUSERS_FILE)


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
    network, average, loss_of = prepare(unet, plan, noise_schedule)
    encoded, held_out = data.split()
    batches = partial(Batches, seed=plan.seed, device=unet.device, empty=data.empty)
    loss = loss_of(batches(encoded, plan.schedule.batch), plan.seed)
    if data.prior:
        own_images, guidance = batches(data.prior, plan.schedule.batch), plan.student.guidance
        prior = prior_preservation.prior_loss(network, own_images, noise_schedule, guidance, plan.seed + 1)
        loss = prior_preservation.in_turns(loss, prior)
    validation_batches = batches(held_out, min(VALIDATION_BATCH, len(held_out)))
    validation_loss = loss_of(validation_batches, VALIDATION_SEED)
    metadata = {"model": model, **plan.metadata()}
    # Each file's name is a hash of what was encoded; a download may have failed in one process.
    images = hashlib.sha256(" ".join(path.name for path in [*encoded, *data.prior]).encode()).hexdigest()
    check_same(int(images[:15], 16), "pictures; run it again", accelerator)
    result = average or network  # with a LoRA, the trainer leaves the average in its place
    few_steps, scale = plan.method != "style", 1.0
    if result.config.time_cond_proj_dim:  # a full LCM takes the middle of its range of w
        scale += sum(plan.student.guidance) / 2

    def evaluate(step: int) -> float:
        row = generate_samples(diffusion, result, data.prompts, few_steps, scale)
        _save_samples(row, folder / "samples" / f"step-{step:06}.webp", step, accelerator)
        with torch.no_grad():
            losses = [validation_loss(i, WHOLE) for i in range(validation_batches.per_epoch)]
        return float(torch.stack(losses).mean())

    def save_best(step: int) -> None:
        save_network(result, folder / "best", {**metadata, "step": step})

    config = {**metadata, "pictures": images, "fp16": accelerator.mixed_precision == "fp16"}
    validation = Validation(plan.watch_every, evaluate, save_best) if plan.watch_every else None
    checkpoints = folder / "checkpoints"
    optimise(plan.method, network, loss, plan.schedule, checkpoints, average, accelerator, config, validation)
    if accelerator.is_main_process:
        save_network(result, folder, {**metadata, "step": plan.schedule.steps})
        write_card(folder, metadata, scale)
    accelerator.wait_for_everyone()


def prepare(
    unet: UNet2DConditionModel, plan: Plan, schedule: NoiseSchedule
) -> tuple[UNet2DConditionModel, UNet2DConditionModel | None, Callable[[distill.NextBatch, int], Loss]]:
    """Make of a frozen `unet` what `plan` trains: return the network whose parameters are trained, its
    average where it has one of its own, and what is minimised, of batches and a seed."""
    student, network, average = plan.student, unet, None
    if isinstance(student, distill.FullStudent):
        network = distill.make_full_student(unet, student)  # in fp32, before the teacher is rounded
        halve_if_large(unet)
        average = copy.deepcopy(network).requires_grad_(False)
        roles = distill.Roles(*(partial(distill.predict, part) for part in (network, average, unet)))
    else:
        halve_if_large(unet)
        distill.add_lora(unet, student)
        cast_training_params(unet)
        roles = distill.lora_roles(unet, teacher=plan.method == "lora")
    for part in filter(None, (unet, network, average)):
        distill.order_for_training(part)
    network.train()
    if plan.gradient_checkpointing:
        network.enable_gradient_checkpointing()

    def loss_of(batches: distill.NextBatch, seed: int) -> Loss:
        if isinstance(student, distill.StyleStudent):
            return distill.style_training(unet, batches, schedule, seed)
        return distill.consistency_training(roles, batches, schedule, student, seed)

    return network, average, loss_of


def generate_samples(
    diffusion: Diffusion, unet: UNet2DConditionModel, prompts: Sequence[str], few_steps: bool, guidance: float
) -> Image.Image:
    """Return a row of images, of each of `prompts` with the seed of its place, by `unet` with what else
    `diffusion` has."""
    how: dict[str, Any] = {"steps": BASE_STEPS, "guidance": BASE_GUIDANCE}
    if few_steps:
        scheduler = LCMScheduler.from_config(diffusion.scheduler.config)
        how = {"steps": FEW_STEPS, "guidance": guidance, "scheduler": scheduler}
    # One at a time: a training leaves little memory.
    images = generate_images(diffusion, prompts, range(len(prompts)), **how, batch=1, unet=unet)
    return Image.fromarray(np.hstack([np.asarray(image) for image in images]))


def _save_samples(row: Image.Image, path: Path, step: int, accelerator: Accelerator) -> None:
    """Write a row of samples to `path` and to whoever tracks the run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    row.save(path, quality=90)
    for tracker in accelerator.trackers:
        order = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
        tracker.log_images({"samples": np.asarray(row)[None]}, step=step, **order)
