"""Distil a model into few steps: scripts/distill --data PICTURES --out FOLDER [--model NAME]

Makes an LCM-LoRA, or with --student full a full LCM. NAME is one of fewstep's models, or any diffusers folder
of an SDXL or SD model. PICTURES is a folder as scripts/train takes it, webdataset shards
("shards/{000..012}.tar", also at https addresses), or "world" for drawings of the miniature's world. They are
encoded once, into FOLDER; run the same command again and it goes on from its last checkpoint.

Figures that are not given are those of the preset, fewstep/training/presets.toml, where each has its reason.
On several GPUs or machines, with DDP: accelerate launch -m fewstep.cli.distill ...
TensorBoard shows the run: tensorboard --logdir FOLDER
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.cli.run import say, status_of
from fewstep.cli.train import options_of, parse, tracked, training_parser

if TYPE_CHECKING:
    from fewstep.training.data import Captioned


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 1 when the data, the model or the training fail; the reason is one sentence on stderr."""
    parser = training_parser("scripts/distill", __doc__)
    parser.add_argument("--accumulate", type=int, default=1, help="parts of a batch, one after the other")
    parser.add_argument("--data", required=True, help="a folder, shards, or world")
    parser.add_argument("--guidance", type=float, nargs=2, metavar=("LOW", "HIGH"), help="range of w")
    parser.add_argument("--limit", type=int, help="how many pictures at most")
    parser.add_argument("--model", default="miniature", help="the teacher (%(default)s)")
    parser.add_argument("--skip", type=int, help="LCM's k, in 20 timesteps: 1 is k = 20")
    students = ("lora", "full")
    parser.add_argument("--student", dest="method", choices=students, default="lora", help="(%(default)s)")
    chosen = parse(parser, arguments)
    chosen.guidance = chosen.guidance and tuple(chosen.guidance)
    if chosen.rank and chosen.method == "full":
        parser.error("--rank is of LoRAs; a full LCM has none")
    return status_of(lambda: _distil(chosen))


def _distil(chosen: argparse.Namespace) -> None:
    from fewstep.settings import Settings
    from fewstep.training.run import train_model

    settings, options = Settings.from_env(), options_of(chosen)
    options.plan(chosen.model)  # refuses at once what it cannot be
    with tracked(chosen.out) as accelerator:
        images, limit = partial(_images, chosen), chosen.limit
        train_model(chosen.model, settings, options, images, chosen.out, limit=limit, accelerator=accelerator)
    say("done; README.md in the folder that --out names tells how to use it")


def _images(chosen: argparse.Namespace) -> "Iterable[Captioned]":
    from fewstep.training.data import find, read_shards

    place = Path(chosen.data)
    if chosen.data == "world":
        from fewstep.miniature.world.dataset import write_world

        count = chosen.limit or 2_000
        place = chosen.out / f"world-{count}"
        write_world(place, count)
    return find(place, chosen.caption) if place.is_dir() else read_shards(chosen.data, chosen.caption)


if __name__ == "__main__":
    sys.exit(main())
