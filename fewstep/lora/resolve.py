"""Style LoRAs by the names that callers give them: from the operator's folder, the hub, or an https address.

    styles = Styles(settings, read=pipeline.adapters.read)
    loras = await styles.load(request.wishes)

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
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

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
class _Found:
    """A style's file, and which state of it."""

    path: Path
    sha256: str
    stamp: tuple[int, ...]  # the beginning of `_stamp`; without times where using the file changes them


class LoraResolver:
    """Finds, fetches and reads style LoRAs; many threads may ask at once.

    `read(path, sha256)` reads a file and raises AdapterError unless it fits the model.
    """

    def __init__(self, settings: Settings, read: Callable[[Path, str], Lora]) -> None:
        self._settings = settings
        self._read = read
        # Fetching has threads of its own: slow sites must not keep the styles of this server waiting.
        self._near, self._far = ThreadPoolExecutor(4, "styles"), ThreadPoolExecutor(8, "fetched-styles")
        self._lock = threading.Lock()  # guards all that follow
        self._at_work: dict[object, tuple[threading.Lock, int]] = {}
        self._answers: OrderedDict[object, tuple[tuple[str, ...], float]] = OrderedDict()
        self._in_memory: OrderedDict[str, Lora] = OrderedDict()

    async def load(self, wishes: Sequence[LoraRef], spent_s: float = 0.0) -> list[Lora]:
        """The LoRAs that `wishes` name, in order; `spent_s` of the request's time are gone already.

        Raises InvalidRequest for one that is not there or does not fit the model, DownloadError when it
        could not be fetched, DeadlineExceeded when that takes as long as a request may.
        """
        until = time.monotonic() + self._settings.deadline_s - spent_s
        threads = self._near if all(wish.source.kind == "folder" for wish in wishes) else self._far
        work = asyncio.get_running_loop().run_in_executor(
            threads, lambda: [self._load(wish.name, wish.source, until) for wish in wishes]
        )
        try:
            return await asyncio.wait_for(work, max(0.0, until - time.monotonic()))
        except TimeoutError:
            raise DeadlineExceeded(LATE) from None

    def _load(self, name: str, source: LoraSource, until: float) -> Lora:
        for _ in range(3):
            with self._alone(source, until):
                find = {"folder": self._in_folder, "hub": self._on_hub, "url": self._at_address}[source.kind]
                found = find(name, source, until)
            with self._alone(found.sha256, until):
                lora = self._in_memory_of(found.sha256) or self._read_checked(name, found)
            if lora is not None:
                return lora
        raise DownloadError(f"{name} changes again and again while it is read; send the request later")

    def _read_checked(self, name: str, found: _Found) -> Lora | None:
        """None if the file was removed or replaced meanwhile."""
        try:
            lora = self._read(found.path, found.sha256)
            if _stamp(found.path)[: len(found.stamp)] != found.stamp:
                return None
        except FileNotFoundError:
            return None
        except LoraError as error:
            logger.info("%s was refused: it %s", name, error.sentence)
            raise InvalidRequest(f"{name} {error.reason}; give another LoRA") from None
        self._keep_in_memory(lora)
        return lora

    def _in_folder(self, name: str, source: LoraSource, until: float) -> _Found:
        folder = (self._settings.styles_root / self._settings.model).resolve()
        path = (folder / f"{source.place.removesuffix(SUFFIX)}{SUFFIX}").resolve()
        if not path.is_relative_to(folder) or not path.is_file():
            raise InvalidRequest(f"{name} is none of this server's styles; {_listed(folder)}")
        stamp = _stamp(path)
        known = self._recall((path, stamp))
        if known is None:
            with path.open("rb") as file:
                known = (hashlib.file_digest(file, "sha256").hexdigest(),)
            self._remember((path, stamp), known)
        return _Found(path, known[0], stamp)

    def _on_hub(self, name: str, source: LoraSource, until: float) -> _Found:
        settings, repo = self._settings, source.place
        token = settings.hf_token if repo in settings.style_repos else None
        revision, file = ("main", source.file) if source.file else (self._recall(repo) or ("", ""))
        if not file:
            with _said_of(name):
                found = fetch_json(
                    f"{settings.hf_endpoint}/api/models/{repo}", self._allowed(name, until), token
                )
            revision, file = _only_file(name, found)
            self._remember(repo, (revision, file))
        address = f"{settings.hf_endpoint}/{repo}/resolve/{revision}/{quote(file)}"
        return self._fetched(name, address, token, until)

    def _at_address(self, name: str, source: LoraSource, until: float) -> _Found:
        return self._fetched(name, source.place, None, until)

    def _fetched(self, name: str, address: str, token: str | None, until: float) -> _Found:
        cache, known = self._settings.style_cache, self._recall(address)
        if known:
            path = cache / f"{known[0]}{SUFFIX}"
            with suppress(FileNotFoundError):
                os.utime(path)  # by its age it is chosen for removal
                return _Found(path, known[0], _stamp(path)[:2])
        if until - time.monotonic() < LEAST_S:
            raise DeadlineExceeded(LATE)
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        arrived = cache / f".{uuid.uuid4()}{SUFFIX}"
        with _said_of(name):
            sha256 = fetch(address, arrived, self._allowed(name, until), token)
        path = arrived.rename(cache / f"{sha256}{SUFFIX}")
        self._remember(address, (sha256,))
        self._make_room_on_disk(path)
        return _Found(path, sha256, _stamp(path)[:2])

    def _allowed(self, name: str, until: float) -> Allowed:
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
            files = sorted(_with_stats(self._settings.style_cache), key=lambda pair: pair[1].st_mtime)
            total = sum(stat.st_size for _, stat in files)
            for path, stat in files:
                unfinished = path.name.startswith(".")
                abandoned = unfinished and time.time() - stat.st_mtime > 2 * self._settings.deadline_s
                too_much = total > self._settings.style_disk_bytes and not unfinished and path != newest
                if abandoned or too_much:
                    path.unlink(missing_ok=True)
                    total -= stat.st_size

    def _in_memory_of(self, sha256: str) -> Lora | None:
        with self._lock:
            if sha256 in self._in_memory:
                self._in_memory.move_to_end(sha256)
            return self._in_memory.get(sha256)

    def _keep_in_memory(self, lora: Lora) -> None:
        with self._lock:
            self._in_memory[lora.sha256] = lora
            total = sum(one.size for one in self._in_memory.values())
            while total > self._settings.style_memory_bytes and len(self._in_memory) > 1:
                total -= self._in_memory.popitem(last=False)[1].size

    def _recall(self, question: object) -> tuple[str, ...] | None:
        with self._lock:
            answer, when = self._answers.get(question, (None, 0.0))
        return answer if time.monotonic() - when < FRESH_S else None

    def _remember(self, question: object, answer: tuple[str, ...]) -> None:
        with self._lock:
            self._answers[question] = (answer, time.monotonic())
            if len(self._answers) > MAX_ANSWERS:
                self._answers.popitem(last=False)

    @contextmanager
    def _alone(self, key: object, until: float) -> Iterator[None]:
        """So that what two callers want at once is fetched or read once."""
        with self._lock:
            lock, users = self._at_work.get(key, (threading.Lock(), 0))
            self._at_work[key] = (lock, users + 1)
        try:
            if not lock.acquire(timeout=max(0.0, until - time.monotonic())):
                raise DeadlineExceeded(LATE)
            try:
                yield
            finally:
                lock.release()
        finally:
            with self._lock:
                lock, users = self._at_work.pop(key)
                if users > 1:
                    self._at_work[key] = (lock, users - 1)


def _stamp(path: Path) -> tuple[int, ...]:
    """Another one for every other state of the file: size and time of writing may be the same by design."""
    stat = path.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _with_stats(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # another server may share the folder
            yield path, path.stat()


def _listed(folder: Path) -> str:
    names = sorted(path.stem for path in folder.glob(f"*{SUFFIX}"))
    return f"choose one of {', '.join(names[:30])}" if names else "it has none"


def _only_file(name: str, found: object) -> tuple[str, str]:
    """The commit and the one LoRA of a repo, from the hub's answer about it."""
    answer = found if isinstance(found, dict) else {}
    listed = answer.get("siblings")
    entries = listed if isinstance(listed, list) else []
    names = [one.get("rfilename") for one in entries if isinstance(one, dict)]
    loras = [file for file in names if isinstance(file, str) and file.endswith(SUFFIX)]
    if USUAL_FILE in loras:
        loras = [USUAL_FILE]
    if len(loras) != 1:
        raise InvalidRequest(
            f"{name} is a repo of {len(loras)} {SUFFIX} files; name one, as owner/repo/file{SUFFIX}"
        )
    commit = str(answer.get("sha"))
    return commit if COMMIT.fullmatch(commit) else "main", loras[0]


@contextmanager
def _said_of(name: str) -> Iterator[None]:
    """Say of which input it is that something could not be fetched."""
    try:
        yield
    except (InvalidRequest, DownloadError) as error:
        raise type(error)(f"{name}: {error.sentence}") from None
