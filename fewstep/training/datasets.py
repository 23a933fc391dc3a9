"""A user's pictures and captions: found in a folder or a zip, encoded once, and given out in batches.

A picture's caption is its line in `metadata.jsonl` ({"file_name": "a.jpg", "text": "..."}, as Hugging Face's
ImageFolder has it) or the text file beside it (a.txt beside a.jpg).
"""

from __future__ import annotations

import json
import logging
import math
import stat
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import DatasetError, InvalidRequest
from fewstep.images import fit, open_image
from fewstep.pipeline import Pipeline
from fewstep.request import native_sizes
from fewstep.training.distill import Batch
from fewstep.training.loop import step_generator

logger = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
METADATA = "metadata.jsonl"
MAX_ENTRIES = 2_000  # of a zip
MAX_BYTES = 2_000_000_000  # of all that is in it
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Captioned:
    """A picture's file, not opened yet, and what it shows."""

    path: Path
    caption: str


@dataclass(frozen=True)
class Example:
    """An encoded picture: scaled latents (C, H / 8, W / 8), and what the UNet is told, as in `Batch`."""

    latents: Tensor
    prompt_embeds: Tensor
    pooled: Tensor | None
    time_ids: Tensor | None


def unpack(archive: Path, folder: Path) -> None:
    """Write the files of a zip below `folder`.

    Raises DatasetError for what is no zip, has more than MAX_ENTRIES entries or MAX_BYTES unpacked (counted
    while reading: what a zip says of itself may be false), or an entry that would be written elsewhere.
    """
    left = MAX_BYTES
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = [one for one in opened.infolist() if not one.is_dir()]
            if len(entries) > MAX_ENTRIES:
                raise DatasetError(f"the zip holds {len(entries)} files; at most {MAX_ENTRIES} are taken")
            for entry in entries:
                place = PurePosixPath(entry.filename.replace("\\", "/"))
                if place.is_absolute() or ".." in place.parts or ":" in place.parts[0]:
                    raise DatasetError("the zip holds a file whose path leads out of it; pack it anew")
                if stat.S_ISLNK(entry.external_attr >> 16):
                    raise DatasetError("the zip holds a link; put the file itself in its place")
                target = folder / place
                target.parent.mkdir(parents=True, exist_ok=True)
                with opened.open(entry) as source, target.open("xb") as file:
                    while content := source.read(_CHUNK):
                        left -= len(content)
                        if left < 0:
                            raise DatasetError(
                                f"the zip holds more than {MAX_BYTES / 1e9:g} GB; send fewer pictures"
                            )
                        file.write(content)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, FileExistsError):
        raise DatasetError("the archive cannot be read; send an ordinary zip without a password") from None


def find(folder: Path, caption: str | None = None) -> list[Captioned]:
    """The pictures below `folder` by path; `caption` is for those that have none.

    Raises DatasetError when there is no picture, a caption is missing or `metadata.jsonl` is not one.
    """
    listed = _listed(folder)
    found, bare = [], []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES):
        place = path.relative_to(folder)
        if any(part.startswith((".", "__MACOSX")) for part in place.parts):  # what a Mac leaves in zips
            continue
        beside = path.with_suffix(".txt")
        text = listed.get(place.as_posix()) or (_text(beside) if beside.is_file() else "") or caption
        if text:
            found.append(Captioned(path, text))
        else:
            bare.append(place)
    if not found and not bare:
        raise DatasetError(f"there is no picture ({', '.join(SUFFIXES)})")
    if bare:
        logger.error("without a caption: %s", ", ".join(map(str, bare[:10])))
        raise DatasetError(
            f"{len(bare)} of {len(found) + len(bare)} pictures have no caption; give each a line in "
            f"{METADATA} or a text file of its name, or give one caption for all"
        )
    return found


def _listed(folder: Path) -> dict[str, str]:
    captions = {}
    for path in folder.rglob(METADATA):
        for number, line in enumerate(_text(path).splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                name, text = row["file_name"], row["text"]
                captions[(path.parent / name).relative_to(folder).as_posix()] = str(text).strip()
            except (ValueError, TypeError, KeyError):
                raise DatasetError(
                    f'line {number} of {METADATA} is not like {{"file_name": "a.jpg", "text": "..."}}'
                ) from None
    return captions


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig", errors="replace").strip()


@torch.inference_mode()
def encode(pipeline: Pipeline, pictures: Sequence[Captioned]) -> list[Example]:
    """What can be opened of `pictures`, each at that one of the model's native sizes that is nearest to its
    shape; a broken file is named in the log and left out. Raises DatasetError when none is left."""
    examples = []
    for picture in pictures:
        try:
            image = open_image(picture.path, picture.path.name)
        except InvalidRequest as error:
            logger.warning("left out: %s", error.sentence)
            continue
        sizes = native_sizes(pipeline.spec)
        width, height = min(
            sizes, key=lambda size: abs(math.log(size[0] * image.height / size[1] / image.width))
        )
        pixels = torch.from_numpy(np.array(fit(image, width, height))).permute(2, 0, 1)[None] / 127.5 - 1
        vae = pipeline.diffusion.vae
        latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode() * vae.config.scaling_factor
        prompt = pipeline.text.encode(picture.caption)
        pooled = None if prompt.pooled is None else prompt.pooled[0].clone()
        # SDXL is told the size of the original, what was cut off, and the size that is left.
        scale = max(width / image.width, height / image.height)
        left, top = (
            round((side * scale - kept) / 2) for side, kept in ((image.width, width), (image.height, height))
        )
        told = torch.tensor([image.height, image.width, top, left, height, width], dtype=torch.float32)
        examples.append(
            Example(
                latents[0].float().cpu(),
                prompt.states[0].clone(),
                pooled,
                told if pooled is not None else None,
            )
        )
    if not examples:
        raise DatasetError(f"none of {len(pictures)} pictures can be opened; their names are in the log")
    return examples


class Batches:
    """`batches(step)`: of one shape each, every picture once an epoch; a last batch is filled up with others.

    The answer depends on the step and the seed only, so that a resumed run sees what it would have seen.
    """

    def __init__(self, examples: Sequence[Example], size: int, seed: int, device: torch.device) -> None:
        self.examples, self.size, self.seed, self.device = examples, size, seed, device
        by_shape = defaultdict(list)
        for i, example in enumerate(examples):
            by_shape[tuple(example.latents.shape)].append(i)
        self._groups = list(by_shape.values())
        self._per_epoch = sum(math.ceil(len(group) / size) for group in self._groups)
        self._epoch = lru_cache(maxsize=1)(self._plan)

    def __call__(self, step: int) -> Batch:
        epoch, place = divmod(step, self._per_epoch)
        rows = [self.examples[i] for i in self._epoch(epoch)[place]]

        def stacked(name: str) -> Any:
            values = [getattr(row, name) for row in rows]
            return None if values[0] is None else torch.stack(values).float().to(self.device)

        return Batch(*map(stacked, ("latents", "prompt_embeds", "pooled", "time_ids")))

    def _plan(self, epoch: int) -> list[list[int]]:
        generator = step_generator(self.seed, epoch)
        batches = [batch for group in self._groups for batch in self._chunks(group, generator)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def _chunks(self, group: Sequence[int], generator: torch.Generator) -> Iterator[list[int]]:
        order = [group[i] for i in torch.randperm(len(group), generator=generator).tolist()]
        for start in range(0, len(order), self.size):
            yield [order[i % len(order)] for i in range(start, start + self.size)]
