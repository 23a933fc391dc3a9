"""The files that each model is made of: which repo, which commit, which bytes, as sources.toml lists them.

Where a size or hash is open there, what the hub states of that commit at download time is taken and recorded.
Only safetensors, JSON and text: a pickle is never fetched.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class HubFile:
    """One file of a repo, and its place in `weights/<name>/`."""

    path: str
    place: str
    size: int | None = None  # bytes
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class HubRepo:
    """What is taken from one repo of the Hugging Face hub, at one commit."""

    name: str  # owner/repo
    revision: str  # a full commit hash, so that it can never mean other bytes
    licence: str
    files: tuple[HubFile, ...]

    @property
    def link(self) -> str:
        """The page where the licence stands."""
        return f"https://huggingface.co/{self.name}"


LCM_LORA = "lcm_lora.safetensors"
TINY_VAE = "vae_tiny"
# Of a model's folder, by what FEWSTEP_SAFETY chooses.
SAFETY_FOLDERS = {"clip": "safety_checker", "vit": "safety_classifier"}


def _file(path: str, size: int, sha256: str, place: str = "") -> HubFile:
    place = place or path.replace(".fp16.safetensors", ".safetensors")
    return HubFile(path, place, size or None, sha256 or None)


SOURCES: dict[str, tuple[HubRepo, ...]] = {}
for _row in tomllib.loads(Path(__file__).with_name("sources.toml").read_text(encoding="utf-8"))["repos"]:
    _files = tuple(_file(*file) for file in _row["files"])
    for _model in _row["models"]:
        _repo = HubRepo(_row["name"], _row["revision"], _row["licence"], _files)
        SOURCES[_model] = (*SOURCES.get(_model, ()), _repo)
