"""The models that fewstep can serve: one row of facts for each."""

from dataclasses import dataclass
from typing import Literal

from fewstep.errors import SettingsError


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """What is known about a model before any of its weights are read."""

    name: str
    family: Literal["sdxl", "sd"]
    native_size: int  # side in px of the square pictures that it was trained on
    max_pixels: int  # width times height, above which a size is refused
    default_guidance: float  # used when a request names none
    embedded_guidance: bool  # a full LCM: guidance is an input of the UNet, not a second evaluation
    lcm_lora: bool  # an LCM-LoRA is fused into the UNet at setup
    licence: str
    remedy: str  # the command that mends missing or damaged weights


_SPECS = (
    ModelSpec(
        name="sdxl",
        family="sdxl",
        native_size=1024,
        # 2.25 times the area of training: room for 2048x1152, while further out SDXL repeats its subjects.
        max_pixels=1536 * 1536,
        default_guidance=1.0,
        embedded_guidance=False,
        lcm_lora=True,
        licence="CreativeML Open RAIL++-M (base, LCM-LoRA), MIT (VAE)",
        remedy="scripts/download-weights sdxl && scripts/save-weights sdxl",
    ),
    ModelSpec(
        name="miniature",
        family="sdxl",
        native_size=128,
        # Four times the area of training: still painted within seconds on two CPU cores.
        max_pixels=256 * 256,
        default_guidance=1.0,
        embedded_guidance=False,
        lcm_lora=True,
        licence="Apache-2.0",
        remedy="git checkout -- weights/miniature",
    ),
)

MODELS: dict[str, ModelSpec] = {spec.name: spec for spec in _SPECS}


def get_model(name: str) -> ModelSpec:
    """The model of that name. Raises SettingsError, which lists the names, when there is none."""
    if name not in MODELS:
        raise SettingsError(f"FEWSTEP_MODEL holds no known model; set it to one of {', '.join(MODELS)}")
    return MODELS[name]
