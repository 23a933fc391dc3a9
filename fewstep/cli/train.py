"""Teach the model your images: scripts/train PICTURES --out FOLDER

PICTURES is a folder or a zip of JPEG, PNG or WebP files, each with a text file of its name or a line in
metadata.jsonl ({"file_name": "a.jpg", "text": "..."}) that says what it shows. FOLDER gets the adapter, a
card with samples, and checkpoints from which the same command goes on if it is interrupted. FEWSTEP_MODEL
names the model; without it the miniature is taught.

What is not given is the preset's, fewstep/training/presets.toml. On several GPUs: accelerate launch -m fewstep.cli.train PICTURES --out FOLDER
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.cli.run import say, status_of

if TYPE_CHECKING:
    from accelerate import Accelerator

    from fewstep.training.config import TrainingOptions


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 1 when the images, the settings or the training fail; the reason is one sentence on stderr."""
    parser = training_parser("scripts/train", __doc__)
    parser.add_argument("pictures", type=Path, help="a folder or a zip")
    of_method = "lcf: on the few-step model, which stays one; style: on its base (%(default)s)"
    parser.add_argument("--method", choices=("lcf", "style"), default="lcf", help=of_method)
    of_rehearse = "pictures of its own that the model is not to forget; 0: none"
    parser.add_argument("--rehearse", type=int, help=of_rehearse)
    chosen = parse(parser, arguments)
    if (chosen.rehearse or 0) < 0:
        parser.error("--rehearse must be at least 0")
    if not chosen.pictures.exists():
        parser.error("there is nothing at the path of the pictures")
    return status_of(lambda: _train(chosen))


def training_parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that scripts/train and scripts/distill share."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=prog, description=description, formatter_class=layout)
    parser.add_argument("--batch-size", type=int, help="pictures a step, over all processes")
    parser.add_argument("--caption", help="for pictures that have none")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--rank", type=int, help="of the LoRA")
    parser.add_argument("--resolution", type=int, help="side of squares in px (the model's own)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--watch-every", type=int, help="steps between samples and validations; 0: none")
    return parser


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return what was chosen, of either command; figures that no training takes are refused."""
    chosen = parser.parse_args(arguments)
    for name in ("accumulate", "batch_size", "learning_rate", "limit", "rank", "skip", "steps"):
        value = getattr(chosen, name, None)
        if value is not None and value <= 0:
            parser.error(f"--{name.replace('_', '-')} must be more than 0")
    return chosen


def options_of(chosen: argparse.Namespace) -> "TrainingOptions":
    """Return what was chosen on the command line; an option that the command has not is the preset's."""
    from fewstep.training.config import TrainingOptions

    names = {field.name for field in fields(TrainingOptions)}
    return TrainingOptions(**{name: value for name, value in vars(chosen).items() if name in names})


def prior_prompts(model: str) -> Callable[[int], Sequence[str]]:
    """Return the prompts of the images that `model` generates not to forget: of its own world if drawn."""
    from fewstep.miniature.world.dataset import training_captions
    from fewstep.training.prior_preservation import varied_prompts

    return training_captions if model == "miniature" else varied_prompts


def _train(chosen: argparse.Namespace) -> None:
    from fewstep.settings import Settings
    from fewstep.training.data import find, unpack

    with tempfile.TemporaryDirectory() as unpacked:
        folder = chosen.pictures
        if folder.is_file():
            unpack(folder, Path(unpacked))
            folder = Path(unpacked)
        found = find(folder, chosen.caption)  # what cannot be trained on is said before torch is there
        from fewstep.training.run import train_model

        settings, options = Settings.from_env(), options_of(chosen)
        model = settings.model
        prior = prior_prompts(model)
        with tracked(chosen.out) as accelerator:
            path = train_model(
                model, settings, options, lambda: found, chosen.out, prior_prompts=prior, accelerator=accelerator
            )
    say(f"{path.name} is in the folder that --out names; put it into styles/{model} and name it as style")


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
