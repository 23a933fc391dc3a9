"""Fetch the files of a model from the Hugging Face hub, each of them whole and verified, or not at all.

    download(SOURCES["sdxl"], downloads_folder())

A file grows as `<name>.part` and takes its own name only when its bytes are those that are pinned or, where
nothing is pinned, those that the hub states. The hub's own client does the talking, but for one thing: its
`hf_hub_download` starts an interrupted file from nothing (huggingface_hub issue 4196), and a UNet has 5 GB.
So the client's `http_get` is called here, and told where to go on.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from huggingface_hub import HfApi, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, not in __all__

from fewstep.errors import DownloadError
from fewstep.models.manifest import sha256_of
from fewstep.models.sources import HubFile, HubRepo

logger = logging.getLogger(__name__)

# What the hub stated of the files that nobody pinned, kept beside them so that a second run needs no hub.
STATED = ".stated.json"
AGAIN = "run the command again, and it goes on from there"


@dataclass(frozen=True)
class Expected:
    """Bytes that a file must have, and who says so."""

    size: int  # bytes
    digest: str
    algorithm: str  # "sha256", or "git" for the blob id of a file too small for the hub's large-file storage

    def fits(self, path: Path) -> bool:
        """Whether the file at `path` has these very bytes."""
        if path.stat().st_size != self.size:
            return False
        if self.algorithm == "sha256":
            return sha256_of(path) == self.digest
        content = path.read_bytes()
        return hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest() == self.digest


@dataclass(frozen=True)
class Download:
    """One file of a repo, and where it lies, or is to lie, on this disk."""

    repo: HubRepo
    file: HubFile
    path: Path
    expected: Expected

    @property
    def name(self) -> str:
        """How a sentence calls it."""
        return f"{self.repo.name}/{self.file.path}"

    @property
    def part(self) -> Path:
        """Where it grows until it is whole."""
        return self.path.with_name(f"{self.path.name}.part")


def downloads_folder(weights_root: Path) -> Path:
    """Return `$HF_HOME/fewstep` if HF_HOME is set, else a folder beside the weights: a container's own cache
    would be gone before its weights are saved."""
    home = os.environ.get("HF_HOME", "")
    return Path(home).expanduser().absolute() / "fewstep" if home else weights_root / ".downloads"


def download(repos: Sequence[HubRepo], folder: Path) -> list[Download]:
    """Fetch what is not yet in `folder`; every file returned has just been verified, byte for byte.

    Raises DownloadError. Then, what is complete is kept, and what is not goes on in the next call.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        files = [file for repo in repos for file in _wanted(repo, folder)]
        missing = [file for file in files if not _is_here(file)]
        needed = sum(file.expected.size - _size(file.part) for file in missing)
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise DownloadError(
                f"{_gb(needed)} are to be downloaded and the disk has {_gb(free)} free; free the difference, "
                "or set HF_HOME to a folder on a larger disk"
            )
        if missing:
            logger.info("%d files to download, %s", len(missing), _gb(needed))
        for file in missing:
            _fetch(file)
    return files


def downloaded(repos: Sequence[HubRepo], folder: Path, fix: str) -> list[Download]:
    """Return what `download` left in `folder`, verified, without a hub. Raises DownloadError with `fix`."""
    files = []
    for repo in repos:
        home = folder / repo.name / repo.revision
        known = _known(repo, home)
        for file in repo.files:
            path, expected = home / file.path, known.get(file.path)
            if expected is None or not path.is_file():
                raise DownloadError(f"{repo.name}/{file.path} has not been downloaded; run: {fix}")
            if not expected.fits(path):
                raise DownloadError(f"{repo.name}/{file.path} is damaged on this disk; run: {fix}")
            files.append(Download(repo, file, path, expected))
    return files


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Have `folder` for oneself: two runs that write into one would write to the same parts."""
    lock = FileLock(folder / ".lock")
    try:
        held = lock.acquire(blocking=False)
    except Timeout:
        logger.info("another run is writing into the same folder; waiting for it")
        held = lock.acquire()
    with held:
        yield


def _wanted(repo: HubRepo, folder: Path) -> list[Download]:
    home = folder / repo.name / repo.revision
    known = _known(repo, home)
    if unknown := [file for file in repo.files if file.path not in known]:
        known |= _ask_hub(repo, unknown)
        home.mkdir(parents=True, exist_ok=True)
        part = home / f"{STATED}.part"
        rows = {path: vars(expected) for path, expected in known.items()}
        part.write_text(json.dumps(rows, indent=1), encoding="utf-8")
        part.replace(home / STATED)
    return [Download(repo, file, home / file.path, known[file.path]) for file in repo.files]


def _known(repo: HubRepo, home: Path) -> dict[str, Expected]:
    """Return what is pinned of the repo's files, and what the hub stated earlier of the others."""
    known = {}
    with suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        rows = json.loads((home / STATED).read_text(encoding="utf-8"))
        known = {path: Expected(row["size"], row["digest"], row["algorithm"]) for path, row in rows.items()}
    for file in repo.files:
        if file.size is not None and file.sha256 is not None:
            known[file.path] = Expected(file.size, file.sha256, "sha256")
        elif file.sha256 is not None and file.path in known and known[file.path].digest != file.sha256:
            del known[file.path]  # stated before it was pinned
    return known


def _ask_hub(repo: HubRepo, files: list[HubFile]) -> dict[str, Expected]:
    with _failures_explained(repo, "the list of its files"):
        listed = HfApi().get_paths_info(repo.name, [file.path for file in files], revision=repo.revision)
    infos = {info.path: info for info in listed if isinstance(info, RepoFile)}
    stated = {}
    for path, pin in ((file.path, file.sha256) for file in files):
        if (info := infos.get(path)) is None:
            raise DownloadError(_http_sentence(repo, path, 404))
        digest, algorithm = (info.lfs.sha256, "sha256") if info.lfs else (info.blob_id, "git")
        if pin is not None and pin != digest:
            raise DownloadError(
                f"{repo.name}/{path} is not the file that fewstep knows: the hub states {algorithm} "
                f"{digest[:12]}..., where sha256 {pin[:12]}... is pinned; do not use it, and report this"
            )
        stated[path] = Expected(info.size, digest, algorithm)
    return stated


def _is_here(file: Download) -> bool:
    """Whether the file, or a copy of it in the hub client's own cache, is on this disk already."""
    if file.path.is_file():
        if file.expected.fits(file.path):
            return True
        logger.warning("%s is damaged on this disk; fetching it anew", file.name)
        file.path.unlink()
    cached = try_to_load_from_cache(file.repo.name, file.file.path, revision=file.repo.revision)
    if isinstance(cached, str) and file.expected.fits(Path(cached)):
        file.path.parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(Path(cached).resolve(), file.part)
        file.part.replace(file.path)
        return True
    return False


def link_or_copy(source: Path, target: Path) -> None:
    """Let `target` be the file at `source`, without its bytes being on the disk twice where that can be."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another disk
        shutil.copyfile(source, target)


def _fetch(file: Download) -> None:
    file.part.parent.mkdir(parents=True, exist_ok=True)
    resumed = _size(file.part) > 0
    _get(file)
    if file.expected.fits(file.part):
        file.part.replace(file.path)
        return
    file.part.unlink()
    if not resumed:
        raise DownloadError(
            f"{file.name} arrived with other bytes than its {file.expected.algorithm} promises, and was "
            "removed; run the command again, and report it if it happens twice"
        )
    _fetch(file)  # the older part of it may have been the bad one


def _get(file: Download) -> None:
    part, size = file.part, file.expected.size
    if _size(part) > size:
        part.unlink()
    url = hf_hub_url(file.repo.name, file.file.path, revision=file.repo.revision)
    headers = build_hf_headers(library_name="fewstep")
    shown = file.name.partition("/")[2]
    with _failures_explained(file.repo, file.file.path), part.open("ab") as target:
        start = target.tell()
        try:
            http_get(
                url, target, resume_size=start, headers=headers, expected_size=size, displayed_filename=shown
            )
        except OSError as error:
            if type(error) is not OSError or error.errno is not None:
                raise
            # The client's word for an answer that ended well and has the wrong length: some other document.
            target.flush()
            got = _size(part)
            if 0 < start < got:
                target.truncate(start)
            else:
                part.unlink()
            raise DownloadError(
                f"{file.name} came with {got} bytes where {size} are expected, and what came was removed; "
                "see that HF_ENDPOINT and the proxy lead to the hub, and run the command again"
            ) from None


@contextmanager
def _failures_explained(repo: HubRepo, what: str) -> Iterator[None]:
    """Turn what the client, the network and the disk raise into one sentence."""
    import httpx2  # what the client speaks by; whoever only makes weights needs none

    try:
        yield
        return
    except HfHubHTTPError as error:
        retry_after = error.response.headers.get("Retry-After", "")
        sentence = _http_sentence(repo, what, error.response.status_code, retry_after)
    except httpx2.HTTPError as error:
        logger.debug("%s", error, exc_info=True)
        sentence = f"the connection to the hub broke at {repo.name}, {what} ({type(error).__name__}); {AGAIN}"
    except json.JSONDecodeError:
        sentence = (
            f"what answers for {repo.name}, {what}, is not the hub; see that HF_ENDPOINT and the proxy lead "
            "there"
        )
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        sentence = f"the disk is full at {repo.name}, {what}; free some space and {AGAIN}"
    raise DownloadError(sentence)


def _http_sentence(repo: HubRepo, what: str, status: int, retry_after: str = "") -> str:
    if status in (401, 403):
        return (
            f"the hub does not give {repo.name} to this account (HTTP {status}); accept its licence at "
            f"{repo.link} and set HF_TOKEN to a token that may read it"
        )
    if status == 404:
        return (
            f"{repo.name} at revision {repo.revision[:8]} does not hold {what} (HTTP 404); see that "
            "HF_ENDPOINT leads to the hub or a full mirror of it"
        )
    if status == 429:
        when = f"in {retry_after} s" if retry_after.isdecimal() else "in some minutes"
        return f"the hub has had enough of this address for now (HTTP 429); {AGAIN} {when}"
    return f"the hub answered HTTP {status} for {repo.name}, {what}; {AGAIN}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
