"""Style LoRAs by the names that callers give them: from the operator's folder, the hub, or an https address.

    resolver = LoraResolver(settings, read=merger.read)
    loras = await resolver.load(refs)

What was fetched is kept on disk and what was read in memory, both by content, both up to a limit in bytes.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cachetools import LRUCache, TTLCache, cachedmethod

from fewstep.errors import DeadlineExceeded, DownloadError, InvalidRequest, LoraError
from fewstep.lora.fetch import Allowed, fetch, fetch_json
from fewstep.lora.types import MAX_BYTES, SUFFIX, Lora, LoraRef, LoraSource
from fewstep.models.manifest import sha256_of
from fewstep.settings import HUB, Settings

logger = logging.getLogger(__name__)

COMMIT = re.compile(r"[0-9a-f]{6,64}")
USUAL_FILE = "pytorch_lora_weights.safetensors"
# What was found at an address, or in a folder, is taken for what is there now, for so long.
FRESH_S = 3600.0
MAX_ANSWERS = 1000
LEAST_S = 0.1  # in which a file might still arrive
LATE = "the style did not arrive in time; send the request again later"


@dataclass(frozen=True, slots=True)
class _StyleFile:
    """A style's file, and which state of it."""

    path: Path
    sha256: str
    stamp: tuple[int, ...]  # the beginning of `_stamp`; without times where using the file changes them


class LoraResolver:
    """Finds, fetches and reads style LoRAs; many threads may ask at once.

    `read(path, sha256)` reads a file and raises LoraError unless it fits the model.
    """

    def __init__(self, settings: Settings, read: Callable[[Path, str], Lora]) -> None:
        self._settings = settings
        self._read = read
        # Fetching has threads of its own: slow sites must not keep the styles of this server waiting.
        self._near, self._far = ThreadPoolExecutor(4, "styles"), ThreadPoolExecutor(8, "fetched-styles")
        self._turn = threading.Condition()  # guards what follows, and lets one caller do what others wait for
        self._answers: TTLCache[object, Any] = TTLCache(MAX_ANSWERS, FRESH_S)
        memory = max(1, settings.style_memory_bytes)
        # One that is larger than all memory for them is still kept, alone.
        self._in_memory: LRUCache[str, Lora] = LRUCache(memory, getsizeof=lambda lora: min(lora.size, memory))

    async def load(self, refs: Sequence[LoraRef], spent_s: float = 0.0) -> list[Lora]:
        """Return the LoRAs of `refs`, in order; `spent_s` of the request's time are gone already.

        Raises InvalidRequest for one that is not there or does not fit the model, DownloadError when it
        could not be fetched, DeadlineExceeded when that takes as long as a request may.
        """
        until = time.monotonic() + self._settings.deadline_s - spent_s
        threads = self._near if all(ref.source.kind == "folder" for ref in refs) else self._far
        work = asyncio.get_running_loop().run_in_executor(
            threads, lambda: [self._load(ref.name, ref.source, until) for ref in refs]
        )
        try:
            return await asyncio.wait_for(work, max(0.0, until - time.monotonic()))
        except TimeoutError:
            raise DeadlineExceeded(LATE) from None

    def _load(self, name: str, source: LoraSource, until: float) -> Lora:
        for _ in range(4):
            with suppress(FileNotFoundError):  # removed or replaced meanwhile
                if source.kind == "folder":
                    file = self._in_folder(name, source)
                elif source.kind == "hub":
                    file = self._on_hub(name, source, until)
                else:
                    file = self._fetched(name, source.place, None, until)
                return self._read_checked(name, file)
        raise DownloadError(f"{name} changes again and again while it is read; send the request later")

    @cachedmethod(attrgetter("_in_memory"), lambda _, name, file: file.sha256, condition=attrgetter("_turn"))
    def _read_checked(self, name: str, file: _StyleFile) -> Lora:
        try:
            lora = self._read(file.path, file.sha256)
        except LoraError as error:
            logger.info("%s was refused: it %s", name, error.sentence)
            raise InvalidRequest(f"{name} {error.reason}; give another LoRA") from None
        if _stamp(file.path)[: len(file.stamp)] != file.stamp:
            raise FileNotFoundError
        return lora

    def _in_folder(self, name: str, source: LoraSource) -> _StyleFile:
        folder = (self._settings.styles_root / self._settings.model).resolve()
        path = (folder / f"{source.place.removesuffix(SUFFIX)}{SUFFIX}").resolve()
        if not path.is_relative_to(folder) or not path.is_file():
            names = sorted(path.stem for path in folder.glob(f"*{SUFFIX}"))
            listed = f"choose one of {', '.join(names[:30])}" if names else "it has none"
            raise InvalidRequest(f"{name} is none of this server's styles; {listed}")
        stamp = _stamp(path)
        return _StyleFile(path, self._hash(path, stamp), stamp)

    @cachedmethod(attrgetter("_answers"), condition=attrgetter("_turn"))
    def _hash(self, path: Path, stamp: tuple[int, ...]) -> str:
        return sha256_of(path)

    def _on_hub(self, name: str, source: LoraSource, until: float) -> _StyleFile:
        settings, repo = self._settings, source.place
        token = settings.hf_token if repo in settings.style_repos else None
        at_main = ("main", source.file)
        revision, file = at_main if source.file else self._only_file(repo, name, token, until)
        address = f"{settings.hf_endpoint}/{repo}/resolve/{revision}/{quote(file)}"
        return self._fetched(name, address, token, until)

    @cachedmethod(attrgetter("_answers"), lambda _, repo, *__: repo, condition=attrgetter("_turn"))
    def _only_file(self, repo: str, name: str, token: str | None, until: float) -> tuple[str, str]:
        """Return the commit and the one LoRA of a repo, as the hub answers."""
        with _named(name):
            url = f"{self._settings.hf_endpoint}/api/models/{repo}"
            answer = fetch_json(url, self._allowed(until), token)
        about = answer if isinstance(answer, dict) else {}
        listed = about.get("siblings")
        entries = listed if isinstance(listed, list) else []
        names = [entry.get("rfilename") for entry in entries if isinstance(entry, dict)]
        loras = [file for file in names if isinstance(file, str) and file.endswith(SUFFIX)]
        loras = [USUAL_FILE] if USUAL_FILE in loras else loras
        if len(loras) != 1:
            raise InvalidRequest(
                f"{name} is a repo of {len(loras)} {SUFFIX} files; name one, as owner/repo/file{SUFFIX}"
            )
        commit = str(about.get("sha"))
        return commit if COMMIT.fullmatch(commit) else "main", loras[0]

    def _fetched(self, name: str, address: str, token: str | None, until: float) -> _StyleFile:
        sha256 = self._fetch(address, name, token, until)
        path = self._settings.style_cache / f"{sha256}{SUFFIX}"
        try:
            os.utime(path)  # by its age it is chosen for removal
        except FileNotFoundError:
            with self._turn:
                self._answers.pop(address, None)
            raise
        return _StyleFile(path, sha256, _stamp(path)[:2])

    @cachedmethod(attrgetter("_answers"), lambda _, address, *__: address, condition=attrgetter("_turn"))
    def _fetch(self, address: str, name: str, token: str | None, until: float) -> str:
        """Fetch a file into the cache on disk, and return its hash."""
        if until - time.monotonic() < LEAST_S:
            raise DeadlineExceeded(LATE)
        cache = self._settings.style_cache
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        arrived = cache / f".{uuid.uuid4()}{SUFFIX}"
        with _named(name):
            sha256 = fetch(address, arrived, self._allowed(until), token)
        self._make_room_on_disk(newest=arrived.rename(cache / f"{sha256}{SUFFIX}"))
        return sha256

    def _allowed(self, until: float) -> Allowed:
        settings = self._settings
        # A hub of the operator's own may be at an address that is not public.
        own_hub = "" if settings.hf_endpoint == HUB else settings.hf_endpoint
        if not settings.style_hosts and not own_hub:
            raise InvalidRequest("it cannot be fetched, since this server fetches none; name one of its own")
        most, left = min(MAX_BYTES, settings.style_disk_bytes), until - time.monotonic()
        return Allowed(settings.style_hosts, max_bytes=most, total_s=left, trusted_origin=own_hub)

    def _make_room_on_disk(self, newest: Path) -> None:
        """Remove what was used longest ago, and what a server that was killed was just fetching."""
        with self._turn:
            stats = {}
            for path in self._settings.style_cache.iterdir():
                with suppress(FileNotFoundError):  # another server may share the folder
                    stats[path] = path.stat()
            total = sum(stat.st_size for stat in stats.values())
            for path, stat in sorted(stats.items(), key=lambda entry: entry[1].st_mtime):
                unfinished = path.name.startswith(".")
                abandoned = unfinished and time.time() - stat.st_mtime > 2 * self._settings.deadline_s
                too_much = total > self._settings.style_disk_bytes and not unfinished and path != newest
                if abandoned or too_much:
                    path.unlink(missing_ok=True)
                    total -= stat.st_size


def _stamp(path: Path) -> tuple[int, ...]:
    """Return what differs for every state of the file: size and time of writing may be the same by design."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Say of which input it is that something could not be fetched."""
    try:
        yield
    except (InvalidRequest, DownloadError) as error:
        raise type(error)(f"{name}: {error.sentence}") from None
