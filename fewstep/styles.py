"""Style LoRAs by the names that callers give them: from the operator's folder, the hub, or an https address.

    styles = Styles(settings, read=pipeline.adapters.read)
    loras = await styles.load(request.wishes)

What was fetched is kept on disk and what was read in memory, both by content, both up to a limit in bytes.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote

from fewstep.errors import DeadlineExceeded, DownloadError, InvalidRequest
from fewstep.fetching import Allowed, fetch, fetch_json
from fewstep.settings import HUB, Settings

if TYPE_CHECKING:
    from fewstep.adapters import Lora
    from fewstep.request import StyleWish

logger = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9._-]{1,96}")
HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9._-]{1,96}/[A-Za-z0-9._-]{1,96})(?:/(?P<file>[A-Za-z0-9._/ -]{1,200}))?"
)
COMMIT = re.compile(r"[0-9a-f]{6,64}")
SUFFIX = ".safetensors"
USUAL_FILE = "pytorch_lora_weights.safetensors"
# Far above any that is published: 1.6 GB is rank 128 in F32 for all layers of SDXL's UNet.
MAX_BYTES = 2 * 10**9
# What was fetched from an address is taken for what is there now, for so long.
FRESH_S = 3600.0


@dataclass(frozen=True, slots=True)
class StyleSource:
    """Where a style LoRA is."""

    kind: Literal["folder", "hub", "url"]
    place: str  # a name, owner/repo, or an address
    file: str = ""  # within a hub's repo; empty for its only LoRA

    @property
    def shown(self) -> str:
        """As a caller gives it, but for an address' query, which may hold a token."""
        return f"{self.place}/{self.file}" if self.file else self.place.partition("?")[0]


def parse_source(name: str, text: str) -> StyleSource:
    """What `text`, given as the input `name`, means. Raises InvalidRequest if it means nothing."""
    if "://" in text:
        if text.lower().startswith("https://"):
            return StyleSource("url", text)
    elif NAME.fullmatch(text):
        if text.strip("."):
            return StyleSource("folder", text)
    elif found := HUB_ID.fullmatch(text):
        parts = text.split("/")
        file = found["file"] or ""
        if all(part.strip(". ") for part in parts) and (not file or file.endswith(SUFFIX)):
            return StyleSource("hub", found["repo"], file)
    raise InvalidRequest(
        f"{name} names no LoRA; give the name of a style of this server, a hub id as owner/repo or "
        f"owner/repo/file{SUFFIX}, or an https address of a {SUFFIX} file"
    )


class AdapterError(ValueError):
    """Why a LoRA is refused, as the rest of a sentence that begins with its name.

    `detail` may hold words from the file: it is for the log, and for files of the operator's own.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}{detail}")
        self.reason = reason


class Styles:
    """Finds, fetches and reads style LoRAs; many threads may ask at once.

    `read(path, sha256)` reads a file and raises AdapterError unless it fits the model.
    """

    def __init__(self, settings: Settings, read: Callable[[Path, str], Lora]) -> None:
        self._settings = settings
        self._read = read
        # Not the event loop's own threads, of which there may be few: who encodes would wait for who fetches.
        self._threads = ThreadPoolExecutor(8, "styles")
        self._lock = threading.Lock()  # guards all that follow
        self._at_work: dict[object, tuple[threading.Lock, int]] = {}
        self._addresses: dict[str, tuple[str, float]] = {}  # what was found there, and when
        self._hashes: dict[tuple[Path, int, int], str] = {}
        self._in_memory: OrderedDict[str, Lora] = OrderedDict()

    async def load(self, wishes: Sequence[StyleWish]) -> list[Lora]:
        """The LoRAs that `wishes` name, in order.

        Raises InvalidRequest for one that is not there or does not fit the model, DownloadError when it
        could not be fetched, DeadlineExceeded when that takes as long as a request may.
        """
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(
            self._threads, lambda: [self._load(wish.name, wish.source) for wish in wishes]
        )
        try:
            return await asyncio.wait_for(work, self._settings.deadline_s)
        except TimeoutError:
            raise DeadlineExceeded("the style did not arrive in time; send the request again later") from None

    def _load(self, name: str, source: StyleSource) -> Lora:
        with self._alone(source):
            find = {"folder": self._in_folder, "hub": self._on_hub, "url": self._at_address}[source.kind]
            path, sha256 = find(name, source)
        with self._alone(sha256):
            with self._lock:
                lora = self._in_memory.get(sha256)
            if lora is None:
                lora = self._read_checked(name, path, sha256)
            self._keep_in_memory(lora)
        return lora

    def _read_checked(self, name: str, path: Path, sha256: str) -> Lora:
        try:
            return self._read(path, sha256)
        except AdapterError as error:
            logger.info("%s was refused: it %s", name, error)
            raise InvalidRequest(f"{name} {error.reason}; give another LoRA") from None

    def _in_folder(self, name: str, source: StyleSource) -> tuple[Path, str]:
        folder = (self._settings.styles_root / self._settings.model).resolve()
        path = (folder / f"{source.place.removesuffix(SUFFIX)}{SUFFIX}").resolve()
        if not path.is_relative_to(folder) or not path.is_file():
            raise InvalidRequest(f"{name} is none of this server's styles; {_listed(folder)}")
        stat = path.stat()
        known = (path, stat.st_mtime_ns, stat.st_size)
        if known not in self._hashes:
            with path.open("rb") as file:
                self._hashes[known] = hashlib.file_digest(file, "sha256").hexdigest()
        return path, self._hashes[known]

    def _on_hub(self, name: str, source: StyleSource) -> tuple[Path, str]:
        settings, repo = self._settings, source.place
        token = settings.hf_token if repo in settings.style_repos else None
        revision, file = "main", source.file
        if not file:
            with _said_of(name):
                found = fetch_json(f"{settings.hf_endpoint}/api/models/{repo}", self._allowed(), token)
            revision, file = _only_file(name, found)
        address = f"{settings.hf_endpoint}/{repo}/resolve/{revision}/{quote(file)}"
        return self._fetched(name, address, token)

    def _at_address(self, name: str, source: StyleSource) -> tuple[Path, str]:
        return self._fetched(name, source.place, None)

    def _fetched(self, name: str, address: str, token: str | None) -> tuple[Path, str]:
        cache = self._settings.style_cache
        sha256, when = self._addresses.get(address, ("", 0.0))
        path = cache / f"{sha256}{SUFFIX}"
        if sha256 and time.monotonic() - when < FRESH_S and path.is_file():
            path.touch()  # by its age it is chosen for removal
            return path, sha256
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        arrived = cache / f".{uuid.uuid4()}{SUFFIX}"
        with _said_of(name):
            sha256 = fetch(address, arrived, self._allowed(), token)
        path = arrived.rename(cache / f"{sha256}{SUFFIX}")
        self._addresses[address] = (sha256, time.monotonic())
        self._make_room_on_disk(path)
        return path, sha256

    def _allowed(self) -> Allowed:
        return Allowed(
            hosts=self._settings.style_hosts,
            max_bytes=min(MAX_BYTES, self._settings.style_disk_bytes),
            total_s=self._settings.deadline_s,
            # A hub of the operator's own may be at an address that is not public.
            trusted_origin="" if self._settings.hf_endpoint == HUB else self._settings.hf_endpoint,
        )

    def _make_room_on_disk(self, newest: Path) -> None:
        with self._lock:
            files = [(path.stat(), path) for path in self._settings.style_cache.glob(f"[!.]*{SUFFIX}")]
            total = sum(stat.st_size for stat, _ in files)
            for stat, path in sorted(files, key=lambda pair: pair[0].st_mtime_ns):
                if total > self._settings.style_disk_bytes and path != newest:
                    path.unlink()
                    total -= stat.st_size

    def _keep_in_memory(self, lora: Lora) -> None:
        with self._lock:
            self._in_memory[lora.sha256] = lora
            self._in_memory.move_to_end(lora.sha256)
            total = sum(one.size for one in self._in_memory.values())
            while total > self._settings.style_memory_bytes and len(self._in_memory) > 1:
                total -= self._in_memory.popitem(last=False)[1].size

    @contextmanager
    def _alone(self, key: object) -> Iterator[None]:
        """So that what two callers want at once is fetched or read once."""
        with self._lock:
            lock, users = self._at_work.get(key, (threading.Lock(), 0))
            self._at_work[key] = (lock, users + 1)
        try:
            with lock:
                yield
        finally:
            with self._lock:
                lock, users = self._at_work.pop(key)
                if users > 1:
                    self._at_work[key] = (lock, users - 1)


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
