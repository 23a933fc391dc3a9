"""Distil a model into few steps: scripts/distill --data PICTURES --out FOLDER [--model NAME]

Makes an LCM-LoRA, or with --student full a full LCM. NAME is one of fewstep's models, or any diffusers folder
of an SDXL or SD model. PICTURES is a folder as scripts/train takes it, webdataset shards
("shards/{000..012}.tar", also at https addresses), or "world" for drawings of the miniature's world. They are
encoded once, into FOLDER; run the same command again and it goes on from its last checkpoint.

Figures that are not given are those of the preset, fewstep/training/presets.py, where each has its reason.
On several GPUs or machines, with DDP: accelerate launch -m fewstep.cli.distill ...
TensorBoard shows the run: tensorboard --logdir FOLDER
"""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.cli.run import say, status_of

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fewstep.training.datasets import Captioned
    from fewstep.training.plan import Plan

WORLD = "world"


def main(arguments: Sequence[str] | None = None) -> int:
    """1 when the data, the model or the training fail; the reason is one sentence on stderr."""
    parser = argparse.ArgumentParser(
        prog="scripts/distill", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--accumulate", type=int, default=1, help="parts of a batch, one after the other")
    parser.add_argument("--batch-size", type=int, help="pictures a step, over all processes")
    parser.add_argument("--caption", help="for pictures that have none")
    parser.add_argument("--data", required=True, help="a folder, shards, or world")
    parser.add_argument("--guidance", type=float, nargs=2, metavar=("LOW", "HIGH"), help="range of w")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--limit", type=int, help="how many pictures at most")
    parser.add_argument("--model", default="miniature", help="the teacher (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--rank", type=int, help="of an LCM-LoRA")
    parser.add_argument("--resolution", type=int, help="side of squares in px (the model's own)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--skip", type=int, help="LCM's k, in 20 timesteps: 1 is k = 20")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--student", choices=("lora", "full"), default="lora", help="(%(default)s)")
    parser.add_argument("--watch-every", type=int, help="steps between samples and validations; 0: none")
    chosen = parser.parse_args(arguments)
    for name in ("accumulate", "batch_size", "learning_rate", "limit", "rank", "skip", "steps"):
        if getattr(chosen, name) is not None and getattr(chosen, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be more than 0")
    if chosen.rank and chosen.student == "full":
        parser.error("--rank is of LoRAs; a full LCM has none")
    return status_of(lambda: _distil(chosen))


def _distil(chosen: argparse.Namespace) -> None:
    from fewstep.settings import Settings
    from fewstep.training.encoded import Encoder, check_side
    from fewstep.training.run import Data, train
    from fewstep.training.sources import load_base, training_device
    from fewstep.training.trainer import check_shares

    settings = Settings.from_env()
    plan = _plan(chosen)
    folder: Path = chosen.out
    with tracked(folder) as accelerator:
        device = training_device(settings, accelerator)
        check_shares(plan.schedule, accelerator)
        check_side(chosen.resolution)
        with accelerator.main_process_first():
            images = _images(chosen)
        diffusion = load_base(chosen.model, settings, device)
        with accelerator.main_process_first():
            encoder = Encoder(diffusion, folder / "encoded", chosen.resolution)
            encoded = encoder.encode_all(images, chosen.limit)
        data = Data(encoded, encoder.captions[:4], encoder.no_prompt())
        train(diffusion, plan, data, folder, accelerator, chosen.model)
    say("done; README.md in the folder that --out names tells how to use it")


def _images(chosen: argparse.Namespace) -> "Iterable[Captioned]":
    from fewstep.training.datasets import find, read_shards

    place = Path(chosen.data)
    if chosen.data == WORLD:
        from fewstep.miniature.world.dataset import write_world

        count = chosen.limit or 2_000
        place = chosen.out / f"{WORLD}-{count}"
        write_world(place, count)
    return find(place, chosen.caption) if place.is_dir() else read_shards(chosen.data, chosen.caption)


def _plan(chosen: argparse.Namespace) -> "Plan":
    from dataclasses import replace

    from fewstep.errors import TrainingError
    from fewstep.training.finetune import given
    from fewstep.training.presets import preset
    from fewstep.training.style import StyleStudent

    guidance = tuple(chosen.guidance) if chosen.guidance else None
    student = {"rank": chosen.rank, "guidance": guidance, "skip": chosen.skip}
    schedule = {"steps": chosen.steps, "batch": chosen.batch_size, "lr": chosen.learning_rate}
    plan = preset(chosen.model, chosen.student).with_student(**given(student))
    assert not isinstance(plan.student, StyleStudent)
    if plan.student.skip >= plan.student.solver_steps:
        raise TrainingError(f"--skip must be less than {plan.student.solver_steps}, the steps of the solver")
    plan = plan.with_schedule(accumulate=chosen.accumulate, **given(schedule))
    return replace(plan, seed=chosen.seed, **given({"watch_every": chosen.watch_every}))


@contextmanager
def tracked(folder: Path) -> Iterator["Accelerator"]:
    """An accelerator, as `accelerate launch` configures it, that logs to TensorBoard, and to Weights & Biases
    where it is installed and has a key."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    trackers = ["tensorboard"]
    if find_spec("wandb") and os.environ.get("WANDB_API_KEY"):
        trackers.append("wandb")
    # The others wait while one process encodes, or generates samples: longer than the usual ten minutes.
    patient = InitProcessGroupKwargs(timeout=timedelta(days=1))
    lean = DistributedDataParallelKwargs(gradient_as_bucket_view=True)  # no second copy of all gradients
    accelerator = Accelerator(
        log_with=trackers, project_dir=folder, device_placement=False, kwargs_handlers=[patient, lean]
    )
    accelerator.init_trackers("fewstep")
    try:
        yield accelerator
    except BaseException:
        # Without a word to the other processes, who may wait for this one in the middle of a step.
        for tracker in accelerator.trackers:
            tracker.finish()
        raise
    accelerator.end_training()


if __name__ == "__main__":
    sys.exit(main())
