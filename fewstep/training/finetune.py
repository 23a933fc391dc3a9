"""Teach a user's pictures to a model that paints in few steps, or to its base.

Latent Consistency Fine-tuning ("Latent Consistency Models", arXiv 2310.04378, section 4.4) needs no teacher:
its loss is Algorithm 1's, see distill.py, and the pictures and their noise answer in the teacher's place. So
the model goes on painting in few steps.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator

from fewstep.models import ModelSpec
from fewstep.settings import Settings
from fewstep.training.datasets import Encoder, find
from fewstep.training.plan import Plan
from fewstep.training.presets import preset
from fewstep.training.run import DIFFUSERS_FILE, Data, train
from fewstep.training.sources import load_base, load_few_step

logger = logging.getLogger(__name__)

SAMPLES = 4


@dataclass(frozen=True)
class Wish:
    """What a caller may choose; `resolution` is of squares in px, None the model's own."""

    method: str = "lcf"
    steps: int = 1000
    batch_size: int = 4
    learning_rate: float = 1e-4
    rank: int = 16
    resolution: int | None = None
    seed: int = 0

    def plan(self, model: str) -> Plan:
        """The preset of `model`, with what was chosen."""
        chosen = (
            preset(model, self.method)
            .with_student(rank=self.rank)
            .with_schedule(
                steps=self.steps,
                batch=self.batch_size,
                lr=self.learning_rate,
            )
        )
        return replace(chosen, seed=self.seed)


def fine_tune(
    spec: ModelSpec,
    settings: Settings,
    wish: Wish,
    pictures: Path,
    folder: Path,
    caption: str | None = None,
    accelerator: Accelerator | None = None,
) -> Path:
    """Train on the folder `pictures` and return the LoRA, in `folder`; see `train` for what else is there.

    `caption` is for pictures that have none. Raises DatasetError for pictures, WeightsError for weights and
    SettingsError for a device that cannot be used, and TrainingError.
    """
    found = find(pictures, caption)
    accelerator = accelerator or Accelerator(device_placement=False)
    device = torch.device(settings.device) if settings.device != "auto" else accelerator.device
    logger.info("training %s on %d pictures, seed %d", wish.method, len(found), wish.seed)
    if wish.method == "lcf":
        diffusion = load_few_step(spec, settings, device)
    else:
        diffusion = load_base(spec.name, settings, device)
    with accelerator.main_process_first():
        encoder = Encoder(diffusion, folder / "encoded", wish.resolution)
        encoded = encoder.encode_all(found)
    prompts = list(dict.fromkeys(one.caption for one in found))[:SAMPLES]
    train(
        diffusion,
        wish.plan(spec.name),
        Data(encoded, prompts, encoder.no_prompt()),
        folder,
        accelerator,
        spec.name,
    )
    return folder / DIFFUSERS_FILE
