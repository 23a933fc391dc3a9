"""Images and captions: found in a folder, a zip or webdataset shards.

An image's caption is its line in `metadata.jsonl` ({"file_name": "a.jpg", "text": "..."}, as Hugging Face's
ImageFolder has it) or the text file beside it (a.txt beside a.jpg).
"""

from __future__ import annotations

import errno
import json
import logging
import lzma
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from PIL.Image import Image

from fewstep.errors import DatasetError

logger = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
METADATA = "metadata.jsonl"
MAX_ENTRIES = 2_000  # of a zip
MAX_BYTES = 2_000_000_000  # of all that is in it
MAX_CAPTION_BYTES = 20_000
MAX_METADATA_BYTES = 20_000_000
UNREADABLE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, ValueError)


@dataclass(frozen=True)
class Captioned:
    """An image's file, not opened yet, its caption, and its name for messages."""

    path: Path
    caption: str
    name: str


def unpack(archive: Path, folder: Path) -> None:
    """Write the files of a zip below `folder`.

    Raises DatasetError for what is no zip, has more than MAX_ENTRIES entries or MAX_BYTES unpacked (counted
    while reading: what a zip says of itself may be false), or an entry that would be written elsewhere.
    """
    left = MAX_BYTES
    try:
        with zipfile.ZipFile(archive) as opened:
            entries = [entry for entry in opened.infolist() if not entry.is_dir()]
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
                    while content := source.read(1 << 20):
                        left -= len(content)
                        if left < 0:
                            limit = f"{MAX_BYTES / 1e9:g} GB"
                            raise DatasetError(f"the zip holds more than {limit}; send fewer pictures")
                        file.write(content)
    except (*UNREADABLE, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DatasetError("the archive cannot be read; send an ordinary zip without a password") from None


def find(folder: Path, caption: str | None = None) -> list[Captioned]:
    """Return the images below `folder` by path; `caption` is for those that have none.

    Raises DatasetError when there is no image, a caption is missing or `metadata.jsonl` is not one.
    """
    listed, images = _listed(folder), []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES):
        place = path.relative_to(folder)
        if any(part.startswith((".", "__MACOSX")) for part in place.parts):  # what a Mac leaves in zips
            continue
        beside = path.with_suffix(".txt")
        text = listed.get(place.as_posix()) or (_text(beside) if beside.is_file() else "") or caption
        images.append(Captioned(path, text or "", place.as_posix()))
    if not images:
        raise DatasetError(f"there is no picture ({', '.join(SUFFIXES)})")
    if bare := [image.name for image in images if not image.caption]:
        logger.error("without a caption: %s", ", ".join(bare[:10]))
        raise DatasetError(
            f"{len(bare)} of {len(images)} pictures have no caption; give each a line in "
            f"{METADATA} or a text file of its name, or give one caption for all"
        )
    return images


def write_captioned(folder: Path, captions: Sequence[str], images: Callable[[], Iterable[Image]]) -> None:
    """Write images and their captions as `find` reads them, `metadata.jsonl` last; once: where it lists those
    captions already, `images` is not called."""
    listed = folder / METADATA
    rows = [{"file_name": f"{i:05}.png", "text": text} for i, text in enumerate(captions)]
    content = "".join(f"{json.dumps(row)}\n" for row in rows)
    if listed.exists() and listed.read_text(encoding="utf-8") == content:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for row, image in zip(rows, images(), strict=True):
        image.save(folder / row["file_name"])
    part = listed.with_suffix(".part")
    part.write_text(content, encoding="utf-8")
    part.replace(listed)


def _listed(folder: Path) -> dict[str, str]:
    captions = {}
    for path in folder.rglob(METADATA):
        for number, line in enumerate(_text(path, MAX_METADATA_BYTES).split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                place = (path.parent / row["file_name"]).relative_to(folder)
                captions[place.as_posix()] = row["text"].strip()
            except (ValueError, TypeError, KeyError, AttributeError):
                like = '{"file_name": "a.jpg", "text": "..."}'
                raise DatasetError(f"line {number} of {METADATA} is not like {like}") from None
    return captions


def _text(path: Path, limit: int = MAX_CAPTION_BYTES) -> str:
    """Return what a file says. Raises DatasetError for more bytes than any caption has."""
    if path.stat().st_size > limit:
        raise DatasetError(f"a {path.suffix} file has more than {limit} bytes, so it holds no captions")
    return path.read_text(encoding="utf-8-sig", errors="replace").strip()


def read_shards(shards: str, caption: str | None = None) -> Iterator[Captioned]:
    """Yield the images of webdataset tars, local or at addresses, with braces for ranges:
    "set-{000..012}.tar".

    A sample's caption is its .txt, or "caption" or "text" of its .json; one without any takes `caption`, or
    is named and left out, and so is a shard that is not there or breaks off. Each image's file lives until
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
                suffix = next((suffix for suffix in SUFFIXES if suffix[1:] in sample), None)
                text = _caption_of(sample) or caption
                if suffix is None or text is None:
                    logger.warning("left out: %s has no %s", name, "caption" if suffix else "picture")
                    continue
                path = Path(folder, f"picture{suffix}")
                path.write_bytes(sample[suffix[1:]])
                yield Captioned(path, text, name)


def _caption_of(sample: Mapping[str, bytes]) -> str | None:
    texts: list[object] = [sample.get("txt", b"")[:MAX_CAPTION_BYTES].decode(errors="replace")]
    with suppress(ValueError):
        fields = json.loads(sample.get("json", b"{}"))
        texts += [fields.get(key) for key in ("caption", "text")] if isinstance(fields, dict) else []
    return next((text.strip() for text in texts if isinstance(text, str) and text.strip()), None)
