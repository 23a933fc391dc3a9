"""The models that fewstep can serve: one row of facts for each."""

from dataclasses import dataclass, replace
from typing import Literal

from fewstep.errors import SettingsError
from fewstep.models.sources import SOURCES, HubRepo


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The facts about a model before any of its weights are read."""

    name: str
    family: Literal["sdxl", "sd"]
    native_size: int  # side in px of the square images that it was trained on
    max_pixels: int  # width times height, above which a size is refused
    default_guidance: float = 1.0  # used when a request names none
    embedded_guidance: bool = False  # a full LCM: guidance is an input of the UNet, not a second evaluation
    lcm_lora: bool = True  # an LCM-LoRA is fused into the UNet at setup
    max_clip_skip: int = 4  # of the text encoders' layers; their images grow vague long before this
    in_checkpoint: tuple[
        str, ...
    ] = ()  # the networks that a single-file checkpoint of its kind brings, if any
    drawn: bool = False  # its world is drawn by fewstep.miniature, so that its images can be judged
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
        networks = tuple(f"{part}/" for part in self.in_checkpoint)
        kept = []
        for repo in self.sources:
            files = (file for file in repo.files if file.place.endswith(".safetensors"))
            brought = {file for file in files if file.place.startswith(networks)}
            kept.append(replace(repo, files=tuple(file for file in repo.files if file not in brought)))
        return tuple(repo for repo in kept if repo.files)


def _fix(name: str) -> str:
    return f"scripts/download-weights {name} && scripts/save-weights {name}"


_SPECS = (
    ModelSpec(
        name="sdxl",
        family="sdxl",
        native_size=1024,
        # 2.25 times the area of training: room for 2048x1152, while further out SDXL repeats its subjects.
        max_pixels=1536 * 1536,
        # SDXL keeps the VAE that works in fp16.
        in_checkpoint=("text_encoder", "text_encoder_2", "unet"),
        licence="CreativeML Open RAIL++-M (base, LCM-LoRA), MIT (VAE)",
        fix=_fix("sdxl"),
    ),
    # It has no checkpoints: it would take an SDXL fine-tune and drop half of its layers.
    ModelSpec(
        name="ssd-1b",
        family="sdxl",
        native_size=1024,
        max_pixels=1536 * 1536,
        licence="Apache-2.0 (base), CreativeML Open RAIL++-M (LCM-LoRA), MIT (VAE)",
        fix=_fix("ssd-1b"),
    ),
    ModelSpec(
        name="sd15",
        family="sd",
        native_size=512,
        max_pixels=768 * 768,
        in_checkpoint=("text_encoder", "unet", "vae"),
        licence="CreativeML OpenRAIL-M (base), CreativeML Open RAIL++-M (LCM-LoRA)",
        fix=_fix("sd15"),
    ),
    ModelSpec(
        name="lcm-dreamshaper-v7",
        family="sd",
        native_size=768,
        max_pixels=1152 * 1152,
        default_guidance=8.0,
        embedded_guidance=True,
        lcm_lora=False,
        licence="MIT (UNet), CreativeML OpenRAIL-M (text encoder, VAE)",
        fix=_fix("lcm-dreamshaper-v7"),
    ),
    ModelSpec(
        name="miniature",
        family="sdxl",
        native_size=128,
        # Four times the area of training: still generated within seconds on two CPU cores.
        max_pixels=256 * 256,
        max_clip_skip=1,
        drawn=True,
        licence="Apache-2.0",
        fix="git checkout -- weights/miniature",
    ),
)

MODELS: dict[str, ModelSpec] = {spec.name: spec for spec in _SPECS}
RANDOM = "-random"  # sdxl-random: the real shapes with random weights, see scripts/full-size


def get_model(name: str) -> ModelSpec:
    """Return the model of that name. Raises SettingsError, which lists the names, when there is none."""
    plain = name.removesuffix(RANDOM)
    if plain not in MODELS or (plain != name and not MODELS[plain].sources):
        raise SettingsError(f"FEWSTEP_MODEL holds no known model; set it to one of {', '.join(MODELS)}")
    spec = MODELS[plain]
    fix = f"scripts/full-size {plain}"
    return spec if plain == name else replace(spec, name=name, in_checkpoint=(), fix=fix)


def is_drawn(name: str) -> bool:
    """Whether that is a model whose world is drawn here; what is not in MODELS, such as a folder, is not."""
    return name in MODELS and MODELS[name].drawn
