"""Teach a user's images to a model that generates in few steps, or to its base.

Latent Consistency Fine-tuning ("Latent Consistency Models", arXiv 2310.04378, section 4.4) needs no teacher:
its loss is Algorithm 1's, see distill.py, and the images and their noise answer in the teacher's place. So
the model goes on generating in few steps.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from fewstep.errors import SettingsError
from fewstep.models.load import Diffusion
from fewstep.models.manifest import MANIFEST
from fewstep.models.sources import LCM_LORA
from fewstep.models.specs import ModelSpec
from fewstep.settings import Settings
from fewstep.training.datasets import find
from fewstep.training.encoded import Encoder, check_side
from fewstep.training.plan import Plan
from fewstep.training.presets import preset
from fewstep.training.prior_preservation import generate_prior_images, prompts_of
from fewstep.training.run import DIFFUSERS_FILE, Data, train
from fewstep.training.sources import load_base, load_few_step, training_device
from fewstep.training.trainer import check_shares

logger = logging.getLogger(__name__)

SAMPLES = 4


@dataclass(frozen=True)
class Wish:
    """What a caller may choose; None is the preset's, of `resolution`, in px of squares, the model's own."""

    method: str = "lcf"
    steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    rank: int | None = None
    resolution: int | None = None
    seed: int = 0
    rehearse: int | None = None
    watch_every: int | None = None

    def plan(self, model: str) -> Plan:
        """The preset of `model`, with what was chosen."""
        schedule = {"steps": self.steps, "batch": self.batch_size, "lr": self.learning_rate}
        plan = preset(model, self.method).with_schedule(**given(schedule))
        plan = plan.with_student(**given({"rank": self.rank}))
        more = {"watch_every": self.watch_every, "rehearse": self.rehearse}
        return replace(plan, seed=self.seed, **given(more))


def given(wished: dict[str, Any]) -> dict[str, Any]:
    """What is not None of it."""
    return {name: value for name, value in wished.items() if value is not None}


def fine_tune(
    spec: ModelSpec,
    settings: Settings,
    wish: Wish,
    images: Path,
    folder: Path,
    caption: str | None = None,
    accelerator: Accelerator | None = None,
) -> Path:
    """Train on the folder `images` and return the LoRA, in `folder`; see `train` for what else is there.

    `caption` is for images that have none. Raises DatasetError for images, WeightsError for weights,
    SettingsError for a device that cannot be used or a style of a full LCM, and TrainingError.
    """
    accelerator = accelerator or Accelerator(device_placement=False)
    device = training_device(settings, accelerator)
    plan = wish.plan(spec.name)
    check_shares(plan.schedule, accelerator)
    check_side(wish.resolution)
    if wish.method == "style" and not spec.lcm_lora:
        raise SettingsError("the model is a full LCM and has no base for a style; train it with lcf")
    found = find(images, caption)
    logger.info("training %s on %d pictures, seed %d", wish.method, len(found), wish.seed)
    if wish.method == "lcf":
        diffusion = load_few_step(spec, settings, device)
    else:
        diffusion = load_base(spec.name, settings, device)
    with accelerator.main_process_first():
        encoder = Encoder(diffusion, folder / "encoded", wish.resolution)
        encoded, rehearsed = encoder.encode_all(found), list[Path]()
        if plan.rehearse:
            own = folder / "rehearsal" / _fingerprint(settings.weights_root / spec.name, plan.rehearse)
            with _few_steps(diffusion, settings.weights_root / spec.name / LCM_LORA, wish.method):
                generate_prior_images(own, prompts_of(spec.name, plan.rehearse), diffusion)
            rehearsed = encoder.encode_all(find(own))
    prompts = list(dict.fromkeys(one.caption for one in found))[:SAMPLES]
    data = Data(encoded, prompts, encoder.no_prompt(), rehearsed)
    train(diffusion, plan, data, folder, accelerator, spec.name)
    return folder / DIFFUSERS_FILE


def _fingerprint(weights: Path, count: int) -> str:
    """Of the images that a model generates to rehearse."""
    return hashlib.sha256(f"{count} {(weights / MANIFEST).read_text()}".encode()).hexdigest()[:16]


@contextmanager
def _few_steps(diffusion: Diffusion, lora: Path, method: str) -> Iterator[None]:
    """A base generates in few steps meanwhile, too."""
    if method == "lcf":
        yield
        return
    diffusion.load_lora_weights(lora.parent, weight_name=lora.name)
    try:
        yield
    finally:
        diffusion.unload_lora_weights()
