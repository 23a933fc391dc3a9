"""Teach the model your pictures: scripts/train PICTURES --out FOLDER

PICTURES is a folder or a zip of JPEG, PNG or WebP files, each with a text file of its name or a line in
metadata.jsonl ({"file_name": "a.jpg", "text": "..."}) that says what it shows. FOLDER gets the adapter, a
card with samples, and checkpoints from which the same command goes on if it is interrupted. FEWSTEP_MODEL
names the model; without it the miniature is taught.

What is not given is the preset's, fewstep/training/presets.py. On several GPUs: accelerate launch -m fewstep.cli.train PICTURES --out FOLDER
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from fewstep.cli.run import say, status_of


def main(arguments: Sequence[str] | None = None) -> int:
    """1 when the pictures, the settings or the training fail; the reason is one sentence on stderr."""
    parser = argparse.ArgumentParser(
        prog="scripts/train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pictures", type=Path, help="a folder or a zip")
    parser.add_argument("--batch-size", type=int, help="pictures a step")
    parser.add_argument("--caption", help="for pictures that have none")
    parser.add_argument("--learning-rate", type=float)
    parser.add_argument(
        "--method",
        choices=("lcf", "style"),
        default="lcf",
        help="lcf: on the few-step model, which stays one; style: on its base (%(default)s)",
    )
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--rank", type=int, help="of the LoRA")
    parser.add_argument(
        "--rehearse", type=int, help="pictures of its own that the model is not to forget; 0: none"
    )
    parser.add_argument("--resolution", type=int, help="side of squares in px (the model's own)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--watch-every", type=int, help="steps between samples and validations; 0: none")
    chosen = parser.parse_args(arguments)
    for name in ("batch_size", "learning_rate", "rank", "steps"):
        if getattr(chosen, name) is not None and getattr(chosen, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be more than 0")
    if chosen.rehearse is not None and chosen.rehearse < 0:
        parser.error("--rehearse must be at least 0")
    if not chosen.pictures.exists():
        parser.error("there is nothing at the path of the pictures")
    return status_of(lambda: _train(chosen))


def _train(chosen: argparse.Namespace) -> None:
    from fewstep.cli.distill import tracked
    from fewstep.models.specs import get_model
    from fewstep.settings import Settings
    from fewstep.training.datasets import unpack
    from fewstep.training.finetune import Wish, fine_tune

    settings = Settings.from_env()
    wish = Wish(**{one.name: getattr(chosen, one.name) for one in fields(Wish)})
    with tempfile.TemporaryDirectory() as unpacked, tracked(chosen.out) as accelerator:
        images = chosen.pictures
        if images.is_file():
            unpack(images, Path(unpacked))
            images = Path(unpacked)
        spec = get_model(settings.model)
        path = fine_tune(spec, settings, wish, images, chosen.out, chosen.caption, accelerator)
    say(f"{path.name} is in the folder that --out names; put it into styles/{spec.name} and name it as style")


if __name__ == "__main__":
    sys.exit(main())
