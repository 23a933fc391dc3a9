"""Pictures and captions: found in a folder, a zip or webdataset shards, encoded once, given out in batches.

A picture's caption is its line in `metadata.jsonl` ({"file_name": "a.jpg", "text": "..."}, as Hugging Face's
ImageFolder has it) or the text file beside it (a.txt beside a.jpg).
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import lzma
import math
import stat
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fewstep.errors import DatasetError, InvalidRequest
from fewstep.images import fit, open_image
from fewstep.request import SIDE, sizes_of
from fewstep.text_encoding import Diffusion
from fewstep.training.distill import Batch
from fewstep.training.loop import WHOLE, Share, step_generator
from fewstep.training.tensor_files import write_tensors

logger = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
METADATA = "metadata.jsonl"
MAX_ENTRIES = 2_000  # of a zip
MAX_BYTES = 2_000_000_000  # of all that is in it
MAX_CAPTION_BYTES = 20_000
MAX_METADATA_BYTES = 20_000_000
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Captioned:
    """A picture's file, not opened yet, what it shows, and what to call it."""

    path: Path
    caption: str
    name: str


def unpack(archive: Path, folder: Path) -> None:
    """Write the files of a zip below `folder`.

    Raises DatasetError for what is no zip, has more than MAX_ENTRIES entries or MAX_BYTES unpacked (counted
    while reading: what a zip says of itself may be false), or an entry that would be written elsewhere.
    """
    left = MAX_BYTES
    unreadable = "the archive cannot be read; send an ordinary zip without a password"
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = [one for one in opened.infolist() if not one.is_dir()]
            if len(entries) > MAX_ENTRIES:
                raise DatasetError(f"the zip holds {len(entries)} files; at most {MAX_ENTRIES} are taken")
            for entry in entries:
                place = PurePosixPath(entry.filename.replace("\\", "/"))
                if not place.parts or place.is_absolute() or ".." in place.parts or ":" in place.parts[0]:
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
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DatasetError(unreadable) from None
    except (
        zipfile.BadZipFile,
        zlib.error,
        lzma.LZMAError,
        EOFError,
        NotImplementedError,
        RuntimeError,
        ValueError,
    ):
        raise DatasetError(unreadable) from None


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
            found.append(Captioned(path, text, place.as_posix()))
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
        for number, line in enumerate(_text(path, MAX_METADATA_BYTES).split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                name, text = row["file_name"], row["text"]
                captions[(path.parent / name).relative_to(folder).as_posix()] = text.strip()
            except (ValueError, TypeError, KeyError, AttributeError):
                raise DatasetError(
                    f'line {number} of {METADATA} is not like {{"file_name": "a.jpg", "text": "..."}}'
                ) from None
    return captions


def _text(path: Path, limit: int = MAX_CAPTION_BYTES) -> str:
    """Raises DatasetError for a file of more bytes than any caption has."""
    if path.stat().st_size > limit:
        raise DatasetError(f"a {path.suffix} file has more than {limit} bytes, so it holds no captions")
    return path.read_text(encoding="utf-8-sig", errors="replace").strip()


def read_shards(shards: str, caption: str | None = None) -> Iterator[Captioned]:
    """The pictures of webdataset tars, local or at addresses, with braces for ranges: "set-{000..012}.tar".

    A sample's caption is its .txt, or "caption" or "text" of its .json; one without any takes `caption`, or
    is named and left out, and so is a shard that is not there or breaks off. Each picture's file lives until
    the next is asked for.
    """
    import webdataset  # a library of the extra [train], which the container has not
    from webdataset.shardlists import expand_urls

    def left_out(error: Exception) -> bool:
        logger.warning("left out: a shard cannot be read: %s", error)
        return True  # go on

    with TemporaryDirectory() as folder:
        for url in expand_urls(shards):  # one by one, so that what breaks off does not run into the next
            # Nothing is decoded by webdataset, which would unpickle some kinds of files; and every process
            # reads all, of which it finds encoded what another has.
            samples = webdataset.WebDataset(
                url, shardshuffle=False, nodesplitter=None, empty_check=False, handler=left_out
            )
            for sample in samples:
                name = PurePosixPath(sample["__key__"]).name
                suffix = next((one for one in SUFFIXES if one[1:] in sample), None)
                text = _caption_of(sample) or caption
                if suffix is None or text is None:
                    logger.warning("left out: %s has no %s", name, "caption" if suffix else "picture")
                    continue
                path = Path(folder, f"picture{suffix}")
                path.write_bytes(sample[suffix[1:]])
                yield Captioned(path, text, name)


def _caption_of(sample: Mapping[str, bytes]) -> str | None:
    written = sample.get("txt", b"")[:MAX_CAPTION_BYTES].decode(errors="replace").strip()
    if written:
        return written
    try:
        told = json.loads(sample.get("json", b"{}"))
    except ValueError:
        return None
    texts = [told.get(key) for key in ("caption", "text")] if isinstance(told, dict) else []
    return next((text.strip() for text in texts if isinstance(text, str) and text.strip()), None)


def native_size(diffusion: Diffusion) -> int:
    """The side in px of the squares that a diffusers pipeline was made for."""
    return int(diffusion.unet.config.sample_size * diffusion.vae_scale_factor)


class Encoder:
    """Encodes pictures into `folder`, one file each, where a later run finds them again.

    `side` is of the squares to train on, in px; other shapes are SDXL's, of the same area. Raises
    DatasetError for a side that the network cannot take.
    """

    def __init__(self, diffusion: Diffusion, folder: Path, side: int | None = None) -> None:
        self.diffusion, self.folder = diffusion, folder
        side = side or native_size(diffusion)
        low, high = SIDE
        if side % 8 or not low <= side <= high:
            raise DatasetError(f"the resolution is {side}; it must be a multiple of 8 from {low} to {high}")
        self._sizes = sizes_of(side)
        self.captions: list[str] = []  # of what was encoded last
        # Whoever trains another model into the same folder must not meet these latents.
        parts = ("vae", "text_encoder", "text_encoder_2")
        self._model = [_sum(getattr(diffusion, name)) for name in parts if hasattr(diffusion, name)]
        folder.mkdir(parents=True, exist_ok=True)

    def encode_all(self, pictures: Iterable[Captioned], limit: int | None = None) -> list[Path]:
        """The files of the first `limit` of `pictures` that can be opened; what is broken is named in the
        log and left out. Raises DatasetError when none is left."""
        encoded, count = [], 0
        self.captions = []
        for picture in islice(pictures, limit):
            count += 1
            try:
                encoded.append(self._encoded(picture))
                self.captions.append(picture.caption)
            except InvalidRequest as error:
                logger.warning("left out: %s", error.sentence)
        if not encoded:
            raise DatasetError(f"none of {count} pictures can be opened; their names are in the log")
        return encoded

    @torch.inference_mode()
    def no_prompt(self) -> tuple[Tensor, ...] | None:
        """The encoded empty prompt, where it is not all zeros: see `Batch`."""
        if getattr(self.diffusion.config, "force_zeros_for_empty_prompt", False):
            return None
        return tuple(one[0].float() for one in self._prompt(""))

    def _prompt(self, text: str) -> list[Tensor]:
        """States (1, T, D), and of SDXL pooled (1, P); what does not fit into one prompt is cut off."""
        # SDXL: states, negative, pooled, negative; SD: states, negative.
        found = self.diffusion.encode_prompt(
            text, device=self.diffusion.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return [one for one in found if one is not None]

    @torch.inference_mode()
    def _encoded(self, picture: Captioned) -> Path:
        image = open_image(picture.path, picture.name)
        key = repr((self._model, self._sizes[0], picture.caption, image.info["sha256"]))
        path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
        if path.exists():
            return path
        wanted = image.width / image.height
        width, height = min(self._sizes, key=lambda size: abs(math.log(size[0] / size[1] / wanted)))
        pixels = torch.from_numpy(np.array(fit(image, width, height))).permute(2, 0, 1)[None] / 127.5 - 1
        vae = self.diffusion.vae
        latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode() * vae.config.scaling_factor
        # SDXL is told the size of the original, what was cut off, and the size that is left.
        scale = max(width / image.width, height / image.height)
        left, top = (
            round((side * scale - kept) / 2) for side, kept in ((image.width, width), (image.height, height))
        )
        # SD's prompt has no second part.
        prompt = zip(("prompt_embeds", "pooled"), self._prompt(picture.caption), strict=False)
        example = {"latents": latents, **dict(prompt)}
        tensors = {name: value[0].half() for name, value in example.items()}
        if "pooled" in tensors:
            tensors["time_ids"] = torch.tensor([image.height, image.width, top, left, height, width]).float()
        write_tensors(path, tensors, {})
        return path


def _sum(module: torch.nn.Module) -> float:
    """Other weights have another one."""
    return sum(float(parameter.detach().double().abs().sum()) for parameter in module.parameters())


class Batches:
    """`batches(step, share)`: of one shape each, every picture once an epoch; a last batch is filled up with
    others of its shape, and if there are fewer than a batch, with the same ones.

    The answer depends on the step, the share and the seed only, so that a resumed run sees what it would
    have seen. `encoded` are files of an `Encoder`, read when their turn comes; `empty` is its `no_prompt`.
    """

    def __init__(
        self,
        encoded: Sequence[Path],
        size: int,
        seed: int,
        device: torch.device,
        empty: tuple[Tensor, ...] | None = None,
    ) -> None:
        self.encoded, self.size, self.seed, self.device, self.empty = encoded, size, seed, device, empty
        by_shape = defaultdict(list)
        for i, path in enumerate(encoded):
            with safe_open(path, framework="pt") as file:
                by_shape[tuple(file.get_slice("latents").get_shape())].append(i)
        self._groups = list(by_shape.values())
        self._per_epoch = sum(math.ceil(len(group) / size) for group in self._groups)
        self._epoch = lru_cache(maxsize=1)(self._plan)

    def __call__(self, step: int, share: Share = WHOLE) -> Batch:
        epoch, place = divmod(step, self._per_epoch)
        rows = [load_file(self.encoded[i]) for i in share.of(self._epoch(epoch)[place])]
        stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        moved = {name: value.float().to(self.device) for name, value in stacked.items()}
        return Batch(**moved, empty=self.empty)

    def _plan(self, epoch: int) -> list[list[int]]:
        generator = step_generator(self.seed, epoch)
        batches = [batch for group in self._groups for batch in self._chunks(group, generator)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def _chunks(self, group: Sequence[int], generator: torch.Generator) -> Iterator[list[int]]:
        order = [group[i] for i in torch.randperm(len(group), generator=generator).tolist()]
        for start in range(0, len(order), self.size):
            yield [order[i % len(order)] for i in range(start, start + self.size)]
