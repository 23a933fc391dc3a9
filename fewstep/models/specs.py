"""The models that fewstep can serve, with the facts about each that specs.toml lists."""

import re
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from fewstep.errors import SettingsError
from fewstep.models.sources import SOURCES, HubRepo


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The facts about a model before any of its weights are read."""

    name: str
    family: Literal["sdxl", "sd"]
    native_size: int  # side in px of the square images that it was trained on
    quick_size: int | None = None  # the same of smaller squares that it generates well, and much quicker
    max_pixels: int  # width times height, above which a size is refused
    default_guidance: float = 1.0  # used when a request names none
    embedded_guidance: bool = False  # a full LCM: guidance is an input of the UNet, not a second evaluation
    lcm_lora: bool = True  # an LCM-LoRA is fused into the UNet at setup
    max_clip_skip: int = 4  # of the text encoders' layers; their images grow vague long before this
    in_checkpoint: tuple[str, ...] = ()  # the networks that a single-file checkpoint brings, if any
    examples: tuple[str, ...]  # prompts that the page offers to begin with
    vocabulary: str | None = None  # beside its weights: the few words that it knows; None for all others
    licence: str
    fix: str  # the command that mends missing or damaged weights

    @property
    def sources(self) -> tuple[HubRepo, ...]:
        """Where its files are fetched; empty for a model that is not on the hub."""
        return SOURCES.get(self.name, ())

    @property
    def needs_safety_checker(self) -> bool:
        """Whether its images need one: the miniature can generate nothing that does, and random weights
        generate noise."""
        return bool(self.sources)

    @property
    def sources_beside_checkpoint(self) -> tuple[HubRepo, ...]:
        """What is fetched when the networks come from a single-file checkpoint."""
        brought = re.compile(rf"({'|'.join(self.in_checkpoint)})/.*\.safetensors")
        kept = [tuple(file for file in repo.files if not brought.match(file.place)) for repo in self.sources]
        pairs = zip(self.sources, kept, strict=True)
        return tuple(replace(repo, files=files) for repo, files in pairs if files)


def _spec(name: str, **facts: Any) -> ModelSpec:
    fix = f"scripts/download-weights {name} && scripts/save-weights {name}"
    facts = {key: tuple(fact) if isinstance(fact, list) else fact for key, fact in facts.items()}
    return ModelSpec(**{"name": name, "fix": fix, **facts})


_TABLE = tomllib.loads(Path(__file__).with_name("specs.toml").read_text(encoding="utf-8"))
_ANY = _TABLE.pop("any")
MODELS = {name: _spec(name, **(_ANY | facts)) for name, facts in _TABLE.items()}
RANDOM = "-random"  # sdxl-random: the real shapes with random weights, see scripts/full-size


def get_model(name: str) -> ModelSpec:
    """Return the model of that name. Raises SettingsError, which lists the names, when there is none."""
    plain = name.removesuffix(RANDOM)
    if plain not in MODELS or (plain != name and not MODELS[plain].sources):
        raise SettingsError(f"FEWSTEP_MODEL holds no known model; set it to one of {', '.join(MODELS)}")
    if plain == name:
        return MODELS[name]
    return replace(MODELS[plain], name=name, in_checkpoint=(), fix=f"scripts/full-size {plain}")
