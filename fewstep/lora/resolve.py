"""Style LoRAs by the names that callers give them: from the operator's folder, the hub, or an https address.

    resolver = LoraResolver(settings, read=merger.read)
    loras = await resolver.load(refs)

What was fetched is kept on disk and what was read in memory, both by content, both up to a limit in bytes.
"""

from __future__ import annotations

import asyncio
import hashlib
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
from pathlib import Path
from urllib.parse import quote
from weakref import WeakValueDictionary

from cachetools import LRUCache, TTLCache

from fewstep.errors import DeadlineExceeded, DownloadError, InvalidRequest, LoraError
from fewstep.lora.fetch import Allowed, fetch, fetch_json
from fewstep.lora.types import MAX_BYTES, SUFFIX, Lora, LoraRef, LoraSource
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
        self._lock = threading.Lock()  # guards all that follow
        self._at_work: WeakValueDictionary[object, threading.Lock] = WeakValueDictionary()
        self._answers: TTLCache[object, tuple[str, ...]] = TTLCache(
            MAX_ANSWERS, FRESH_S, timer=lambda: time.monotonic()
        )
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
        for _ in range(3):
            with self._alone(source, until):
                if source.kind == "folder":
                    file = self._in_folder(name, source)
                elif source.kind == "hub":
                    file = self._on_hub(name, source, until)
                else:
                    file = self._fetched(name, source.place, None, until)
            with self._alone(file.sha256, until):
                with self._lock:
                    lora = self._in_memory.get(file.sha256)
                lora = lora or self._read_checked(name, file)
            if lora is not None:
                return lora
        raise DownloadError(f"{name} changes again and again while it is read; send the request later")

    def _read_checked(self, name: str, file: _StyleFile) -> Lora | None:
        """Read the file into memory; None if it was removed or replaced meanwhile."""
        try:
            lora = self._read(file.path, file.sha256)
            if _stamp(file.path)[: len(file.stamp)] != file.stamp:
                return None
        except FileNotFoundError:
            return None
        except LoraError as error:
            logger.info("%s was refused: it %s", name, error.sentence)
            raise InvalidRequest(f"{name} {error.reason}; give another LoRA") from None
        with self._lock:
            self._in_memory[lora.sha256] = lora
        return lora

    def _in_folder(self, name: str, source: LoraSource) -> _StyleFile:
        folder = (self._settings.styles_root / self._settings.model).resolve()
        path = (folder / f"{source.place.removesuffix(SUFFIX)}{SUFFIX}").resolve()
        if not path.is_relative_to(folder) or not path.is_file():
            names = sorted(path.stem for path in folder.glob(f"*{SUFFIX}"))
            listed = f"choose one of {', '.join(names[:30])}" if names else "it has none"
            raise InvalidRequest(f"{name} is none of this server's styles; {listed}")
        stamp = _stamp(path)
        known = self._recall((path, stamp))
        if known is None:
            with path.open("rb") as file:
                known = (hashlib.file_digest(file, "sha256").hexdigest(),)
            self._remember((path, stamp), known)
        return _StyleFile(path, known[0], stamp)

    def _on_hub(self, name: str, source: LoraSource, until: float) -> _StyleFile:
        settings, repo = self._settings, source.place
        token = settings.hf_token if repo in settings.style_repos else None
        revision, file = ("main", source.file) if source.file else (self._recall(repo) or ("", ""))
        if not file:
            with _named(name):
                url = f"{settings.hf_endpoint}/api/models/{repo}"
                answer = fetch_json(url, self._allowed(until), token)
            revision, file = _only_file(name, answer)
            self._remember(repo, (revision, file))
        address = f"{settings.hf_endpoint}/{repo}/resolve/{revision}/{quote(file)}"
        return self._fetched(name, address, token, until)

    def _fetched(self, name: str, address: str, token: str | None, until: float) -> _StyleFile:
        cache, known = self._settings.style_cache, self._recall(address)
        if known:
            path = cache / f"{known[0]}{SUFFIX}"
            with suppress(FileNotFoundError):
                os.utime(path)  # by its age it is chosen for removal
                return _StyleFile(path, known[0], _stamp(path)[:2])
        if until - time.monotonic() < LEAST_S:
            raise DeadlineExceeded(LATE)
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        arrived = cache / f".{uuid.uuid4()}{SUFFIX}"
        with _named(name):
            sha256 = fetch(address, arrived, self._allowed(until), token)
        path = arrived.rename(cache / f"{sha256}{SUFFIX}")
        self._remember(address, (sha256,))
        self._make_room_on_disk(path)
        return _StyleFile(path, sha256, _stamp(path)[:2])

    def _allowed(self, until: float) -> Allowed:
        settings = self._settings
        # A hub of the operator's own may be at an address that is not public.
        own_hub = "" if settings.hf_endpoint == HUB else settings.hf_endpoint
        if not settings.style_hosts and not own_hub:
            raise InvalidRequest("it cannot be fetched, since this server fetches none; name one of its own")
        return Allowed(
            hosts=settings.style_hosts,
            max_bytes=min(MAX_BYTES, settings.style_disk_bytes),
            total_s=until - time.monotonic(),
            trusted_origin=own_hub,
        )

    def _make_room_on_disk(self, newest: Path) -> None:
        """Remove what was used longest ago, and what a server that was killed was just fetching."""
        with self._lock:
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

    def _recall(self, question: object) -> tuple[str, ...] | None:
        with self._lock:
            return self._answers.get(question)

    def _remember(self, question: object, answer: tuple[str, ...]) -> None:
        with self._lock:
            self._answers[question] = answer

    @contextmanager
    def _alone(self, key: object, until: float) -> Iterator[None]:
        """Keep others out, so that what two callers want at once is fetched or read once."""
        with self._lock:
            lock = self._at_work.setdefault(key, threading.Lock())
        if not lock.acquire(timeout=max(0.0, until - time.monotonic())):
            raise DeadlineExceeded(LATE)
        try:
            yield
        finally:
            lock.release()


def _stamp(path: Path) -> tuple[int, ...]:
    """Return what differs for every state of the file: size and time of writing may be the same by design."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _only_file(name: str, answer: object) -> tuple[str, str]:
    """Return the commit and the one LoRA of a repo, from the hub's answer about it."""
    repo = answer if isinstance(answer, dict) else {}
    listed = repo.get("siblings")
    entries = listed if isinstance(listed, list) else []
    names = [entry.get("rfilename") for entry in entries if isinstance(entry, dict)]
    loras = [file for file in names if isinstance(file, str) and file.endswith(SUFFIX)]
    if USUAL_FILE in loras:
        loras = [USUAL_FILE]
    if len(loras) != 1:
        raise InvalidRequest(
            f"{name} is a repo of {len(loras)} {SUFFIX} files; name one, as owner/repo/file{SUFFIX}"
        )
    commit = str(repo.get("sha"))
    return commit if COMMIT.fullmatch(commit) else "main", loras[0]


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Say of which input it is that something could not be fetched."""
    try:
        yield
    except (InvalidRequest, DownloadError) as error:
        raise type(error)(f"{name}: {error.sentence}") from None
