"""Types of LoRAs: where one is, what it holds, and what a request adds of them; data only, without torch."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

from fewstep.errors import InvalidRequest

if TYPE_CHECKING:
    from torch import Tensor

NAME = re.compile(r"[A-Za-z0-9._-]{1,96}")
HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9._-]{1,96}/[A-Za-z0-9._-]{1,96})(?:/(?P<file>[A-Za-z0-9._/ -]{1,200}))?"
)
SUFFIX = ".safetensors"
# Far above any that is published: 1.6 GB is rank 128 in F32 for all layers of SDXL's UNet.
MAX_BYTES = 2 * 10**9


@dataclass(frozen=True, slots=True)
class LoraSource:
    """A place of a style LoRA."""

    kind: Literal["folder", "hub", "url"]
    place: str  # a name, owner/repo, or an address
    file: str = ""  # within a hub's repo; empty for its only LoRA

    @property
    def shown(self) -> str:
        """The source as a caller gives it, but for an address' query, which may hold a token."""
        return f"{self.place}/{self.file}" if self.file else re.split("[?#]", self.place)[0]


@dataclass(frozen=True, slots=True)
class LoraRef:
    """A style LoRA that a caller named, not looked for yet."""

    name: str  # of the input
    source: LoraSource
    scale: float


@dataclass(frozen=True)
class LoraModule:
    """A LoRA's part for one layer: A (r, in, ...), B (out, r, ...) and alpha / r."""

    down: Tensor
    up: Tensor
    factor: float


@dataclass(frozen=True)
class Lora:
    """A LoRA that fits the model it was read for."""

    sha256: str
    modules: Mapping[str, LoraModule]  # by layer, as in `unet.mid_block_resnets_0_conv1`

    @property
    def size(self) -> int:
        """Memory that it takes, in bytes."""
        return sum(module.down.nbytes + module.up.nbytes for module in self.modules.values())

    @cached_property
    def changes_text(self) -> bool:
        """Whether it changes how prompts are read."""
        return any(layer.startswith("text_encoder") for layer in self.modules)


@dataclass(frozen=True, slots=True)
class Mix:
    """A sum added to a model's weights: style LoRAs, each with its scale, and the LCM-LoRA with its own."""

    styles: tuple[tuple[Lora, float], ...] = ()
    lcm_scale: float = 1.0

    @property
    def key(self) -> Hashable:
        """A key that is equal for mixes that make equal weights; a scale of 0 adds nothing."""
        return tuple((lora.sha256, scale) for lora, scale in self.styles if scale), self.lcm_scale


def parse_source(name: str, text: str) -> LoraSource:
    """Return what `text`, given as the input `name`, means. Raises InvalidRequest if it means nothing."""
    if text.lower().startswith("https://"):
        return LoraSource("url", text)
    if all(part.strip(". ") for part in text.split("/")):
        if NAME.fullmatch(text):
            return LoraSource("folder", text)
        match = HUB_ID.fullmatch(text)
        if match and (not match["file"] or text.endswith(SUFFIX)):
            return LoraSource("hub", match["repo"], match["file"] or "")
    raise InvalidRequest(
        f"{name} names no LoRA; give the name of a style of this server, a hub id as owner/repo or "
        f"owner/repo/file{SUFFIX}, or an https address of a {SUFFIX} file"
    )
