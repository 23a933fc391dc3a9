"""The list of the files that a model's folder must hold, byte for byte: write it, read it, check by it.

A manifest is `manifest.json` at the top of `weights/<name>/`:

    {"model": "sdxl", "files": [{"path", "size", "sha256", "source", "revision", "licence"}], "extra": {}}

safetensors has no checksum: a file with flipped bytes loads without complaint, and only this check finds it.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fewstep.errors import WeightsError

MANIFEST = "manifest.json"
# Not listed in a manifest: itself, and the model card, whose words may change after training.
_UNLISTED = (MANIFEST, "README.md")
# Formats that run code when they are opened; a folder that holds one is refused.
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One file: where it lies in the folder, what it must be, and where it came from."""

    path: str  # relative to the folder, with "/" between parts
    size: int  # bytes
    sha256: str
    source: str
    revision: str
    licence: str


@dataclass(frozen=True, slots=True)
class Origin:
    """The place a file came from."""

    source: str
    revision: str
    licence: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """All files of one model's folder, sorted by path, and whatever else is to be recorded of it."""

    model: str
    files: tuple[ManifestFile, ...]
    extra: dict[str, Any]

    @property
    def revision(self) -> str:
        """One hash for all bytes of all files, and for nothing else, such as scores."""
        lines = "".join(f"{file.path} {file.sha256}\n" for file in self.files)
        return hashlib.sha256(lines.encode()).hexdigest()

    def fix(self, usual: str) -> str:
        """The command that makes this folder again: `usual`, unless the folder's maker wrote down another."""
        return str(self.extra.get("remedy", usual))


def write_manifest(
    folder: Path,
    *,
    model: str,
    origin: Origin,
    origins: Mapping[str, Origin] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Manifest:
    """List every file below `folder` but hidden ones, README.md and the manifest itself, and write the list.

    `origins` by path say where a file came from; those that it does not name are from `origin`. The manifest
    appears whole or not at all. `extra` must be JSON.
    """
    paths = [path for path in _paths_below(folder) if path not in _UNLISTED and "/." not in f"/{path}"]
    sizes = [(folder / path).stat().st_size for path in paths]
    facts = zip(paths, sizes, _hash_all(folder, paths), strict=True)
    files = tuple(ManifestFile(*fact, **asdict((origins or {}).get(fact[0], origin))) for fact in facts)
    manifest = Manifest(model, files, dict(extra or {}))
    unfinished = folder / f".{MANIFEST}.part"
    unfinished.write_text(json.dumps(asdict(manifest), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / MANIFEST)
    return manifest


def read_manifest(folder: Path, *, fix: str) -> Manifest:
    """Return the manifest of `folder`. Raises WeightsError, with the command `fix`, without a sound one."""
    if not folder.is_dir():
        raise WeightsError(f"weights/{folder.name} is missing; run: {fix}")
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        files = tuple(ManifestFile(**file) for file in content["files"])
        manifest = Manifest(content["model"], files, content["extra"])
        # No path may be listed twice or lead out of the folder.
        sound = isinstance(manifest.extra, dict) and len(files) == len({file.path for file in files}) > 0
        for file in files:
            sound &= isinstance(file.size, int) and isinstance(file.sha256, str) and len(file.sha256) == 64
            sound &= file.path != "" and (folder / file.path).resolve().is_relative_to(folder.resolve())
    except FileNotFoundError:
        raise _damaged(folder, MANIFEST, "is missing", fix) from None
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        sound = False
    if not sound:
        raise _damaged(folder, MANIFEST, "is not a sound manifest", fix)
    if manifest.model != folder.name:
        raise _damaged(folder, MANIFEST, "is the manifest of another model", fix)
    return manifest


def check_folder(folder: Path, *, fix: str) -> Manifest:
    """Return the manifest of `folder`, which holds what that lists, by its sizes, and no weights besides.

    Raises WeightsError that names the first bad file, relative to the weights folder, and the command `fix`
    that mends it. `check_hashes` takes longer, and finds bytes that have changed.
    """
    manifest = read_manifest(folder, fix=fix)
    fix = manifest.fix(fix)
    check_sizes(folder, manifest, fix=fix)
    # A weights file that nobody listed might be loaded in place of one that was checked.
    listed = {file.path for file in manifest.files}
    for path in _paths_below(folder):
        if path.lower().endswith(_PICKLED):
            raise _damaged(folder, path, "is a pickle, which is never loaded; remove it, then", fix)
        if path.endswith(".safetensors") and path not in listed:
            raise _damaged(folder, path, "is not in the manifest; remove it, then", fix)
    return manifest


def check_sizes(folder: Path, manifest: Manifest, *, fix: str) -> None:
    """Raise WeightsError, as `check_folder` does, for a file that is missing or of another size."""
    for file in manifest.files:
        path = folder / file.path
        if not path.is_file():
            raise _damaged(folder, file.path, "is missing", manifest.fix(fix))
        if (size := path.stat().st_size) != file.size:
            what = f"has {size} bytes where {file.size} are expected"
            raise _damaged(folder, file.path, what, manifest.fix(fix))


def check_hashes(folder: Path, manifest: Manifest, *, fix: str) -> None:
    """Read every byte of what `manifest` lists, in threads. Raises WeightsError as `check_folder` does."""
    fix = manifest.fix(fix)
    try:
        hashes = _hash_all(folder, [file.path for file in manifest.files])
    except OSError:
        raise WeightsError(f"weights/{folder.name} holds a file that cannot be read; run: {fix}") from None
    for file, sha256 in zip(manifest.files, hashes, strict=True):
        if sha256 != file.sha256:
            what = f"is damaged: its sha256 is {sha256[:12]}..., where {file.sha256[:12]}... is expected"
            raise _damaged(folder, file.path, what, fix)


def _damaged(folder: Path, path: str, what: str, fix: str) -> WeightsError:
    return WeightsError(f"weights/{folder.name}/{path} {what}; run: {fix}")


def sha256_of(path: Path) -> str:
    """Return the hash of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_all(folder: Path, paths: list[str]) -> list[str]:
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as threads:
        return list(threads.map(sha256_of, [folder / path for path in paths]))


def _paths_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
