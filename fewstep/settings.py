"""Everything that the environment decides, read in one place: `Settings.from_env()`."""

import logging
import math
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fewstep.errors import SettingsError
from fewstep.models.specs import get_model

logger = logging.getLogger(__name__)

DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("auto", "fp32", "bf16", "fp16")
INT8 = "openvino-int8"  # in which linear layers multiply in 8 bits
OPENVINO = ("openvino", INT8)
ENGINES = ("torch", "compiled", *OPENVINO)
VAES = ("full", "tiny")
VERIFY_MODES = ("sha256", "size")
SAFETY = ("clip", "vit", "off")
MAX_COMPILED = 8  # torch keeps as many versions of one module, and then gives up
MAX_DEADLINE_S = 24 * 60 * 60
MAX_BATCH_LIMIT = 64
MAX_GIGABYTES = 10_000
GIGABYTE = 10**9
HUB = "https://huggingface.co"
# Where LoRAs are shared, and where these sites send one on to.
STYLE_HOSTS = (
    "huggingface.co",
    "*.huggingface.co",
    "*.hf.co",
    "civitai.com",
    "*.civitai.com",
    "*.r2.cloudflarestorage.com",
    "replicate.delivery",
    "*.replicate.delivery",
)

# Variables of the same family that others read: scripts/python, and fewstep.web.settings.
_OF_OTHERS = {
    "FEWSTEP_TORCH_INDEX",
    "FEWSTEP_WEB_DATA",
    "FEWSTEP_API_KEY",
    "FEWSTEP_OPERATOR_KEY",
    "FEWSTEP_CHAT_MODEL",
}


def _weights_of_repository() -> Path:
    return Path(__file__).resolve().parents[1] / "weights"


def _styles_of_repository() -> Path:
    return Path(__file__).resolve().parents[1] / "styles"


def _styles_in_temporary_folder() -> Path:
    return Path(tempfile.gettempdir()) / "fewstep-styles"


def _outputs_in_temporary_folder() -> Path:
    return Path(tempfile.gettempdir()) / "fewstep-outputs"


@dataclass(frozen=True)
class Shape:
    """Of a batch: so many images of `width` x `height` px, with classifier-free guidance or without."""

    width: int
    height: int
    batch: int = 1
    guided: bool = False


@dataclass(frozen=True)
class Settings:
    """How this server runs; "auto" is resolved when the model loads."""

    model: str = "miniature"
    weights_root: Path = field(default_factory=_weights_of_repository)
    output_root: Path = field(default_factory=_outputs_in_temporary_folder)
    device: str = "auto"
    dtype: str = "auto"  # fp16 on a GPU; on a CPU bf16 where it multiplies that itself, else fp32
    verify: str = "sha256"
    deadline_s: float = 120.0
    max_batch: int = 8  # images in one forward pass
    coglet_root: Path | None = None  # coglet's prediction folders, where a script of ours started it
    safety: str = "clip"
    allow_unsafe: bool = False  # whether a request may switch the safety checker off
    styles_root: Path = field(default_factory=_styles_of_repository)  # the operator's own, by model
    style_hosts: tuple[str, ...] = STYLE_HOSTS  # where others are fetched; *.x is any subdomain of x
    style_repos: tuple[str, ...] = ()  # repos of the hub that are read with the operator's token
    style_cache: Path = field(default_factory=_styles_in_temporary_folder)
    style_disk_bytes: int = 20 * GIGABYTE
    style_memory_bytes: int = 4 * GIGABYTE
    engine: str = "torch"
    openvino_size: tuple[int, int] | None = None  # of the images that OpenVINO generates; None: native
    vae: str = "full"  # which decodes; "tiny" is coarser, and takes a small part of the time
    compiled: tuple["Shape", ...] = ()  # that the compiled engine is made for; none: one native image
    recipes: bool = True  # whether files carry what they were generated from
    hf_endpoint: str = HUB
    hf_token: str | None = field(default=None, repr=False)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> "Settings":
        """Read `environ` (the process's own by default); an empty variable counts as unset.

        Raises SettingsError that names the variable and what it may hold. A FEWSTEP_* variable that nothing
        reads is warned of, since a misspelt name would otherwise change nothing in silence.
        """
        read = _Reader(os.environ if environ is None else environ)
        settings = cls(
            model=get_model(read.text("FEWSTEP_MODEL", cls.model)).name,
            weights_root=read.path("FEWSTEP_WEIGHTS", _weights_of_repository()),
            output_root=read.path("FEWSTEP_OUTPUTS", _outputs_in_temporary_folder()),
            device=read.choice("FEWSTEP_DEVICE", cls.device, DEVICES),
            dtype=read.choice("FEWSTEP_DTYPE", cls.dtype, DTYPES),
            engine=read.choice("FEWSTEP_ENGINE", cls.engine, ENGINES),
            openvino_size=read.size("FEWSTEP_OPENVINO_SIZE"),
            vae=read.choice("FEWSTEP_VAE", cls.vae, VAES),
            compiled=read.shapes("FEWSTEP_COMPILED"),
            verify=read.choice("FEWSTEP_VERIFY", cls.verify, VERIFY_MODES),
            deadline_s=read.seconds("FEWSTEP_DEADLINE_S", cls.deadline_s, MAX_DEADLINE_S),
            max_batch=read.whole("FEWSTEP_MAX_BATCH", cls.max_batch, MAX_BATCH_LIMIT),
            coglet_root=read.optional_path("FEWSTEP_COGLET_ROOT"),
            safety=read.choice("FEWSTEP_SAFETY", cls.safety, SAFETY),
            allow_unsafe=read.choice("FEWSTEP_ALLOW_UNSAFE", "0", ("0", "1")) == "1",
            styles_root=read.path("FEWSTEP_STYLES", _styles_of_repository()),
            style_hosts=read.names("FEWSTEP_STYLE_HOSTS", STYLE_HOSTS),
            style_repos=read.names("FEWSTEP_STYLE_REPOS", ()),
            style_cache=read.path("FEWSTEP_STYLE_CACHE", _styles_in_temporary_folder()),
            style_disk_bytes=GIGABYTE * read.whole("FEWSTEP_STYLE_DISK_GB", 20, MAX_GIGABYTES),
            style_memory_bytes=GIGABYTE * read.whole("FEWSTEP_STYLE_MEMORY_GB", 4, MAX_GIGABYTES),
            recipes=read.choice("FEWSTEP_RECIPES", "on", ("on", "off")) == "on",
            hf_endpoint=read.text("HF_ENDPOINT", HUB).rstrip("/"),
            hf_token=read.text("HF_TOKEN", "") or None,
        )
        read.warn_of_the_rest()
        for name, given, engines in (
            ("FEWSTEP_OPENVINO_SIZE", settings.openvino_size, OPENVINO),
            ("FEWSTEP_COMPILED", settings.compiled, ("compiled",)),
        ):
            if given and settings.engine not in engines:
                logger.warning(
                    "%s is set, but FEWSTEP_ENGINE is %s, which does not read it", name, settings.engine
                )
        return settings


class _Reader:
    """Reads variables one by one and remembers their names, so that those left over can be reported."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ
        self._known = set(_OF_OTHERS)

    def text(self, name: str, default: str) -> str:
        self._known.add(name)
        return self._environ.get(name, "") or default

    def path(self, name: str, default: Path) -> Path:
        return Path(self.text(name, str(default))).absolute()

    def optional_path(self, name: str) -> Path | None:
        written = self.text(name, "")
        return Path(written).absolute() if written else None

    def names(self, name: str, default: tuple[str, ...]) -> tuple[str, ...]:
        """Words between commas; "none" is no word at all."""
        written = self.text(name, ",".join(default))
        words = (word.strip() for word in written.split(","))
        return () if written == "none" else tuple(word for word in words if word)

    def choice(self, name: str, default: str, allowed: tuple[str, ...]) -> str:
        value = self.text(name, default)
        if value not in allowed:
            raise SettingsError(f"{name} holds an unknown value; set it to one of {', '.join(allowed)}")
        return value

    def seconds(self, name: str, default: float, most: float) -> float:
        try:
            value = float(self.text(name, str(default)))
        except ValueError:
            value = math.nan
        if not 0 < value <= most:
            raise SettingsError(f"{name} must be a number of seconds above 0 and at most {most:g}")
        return value

    def whole(self, name: str, default: int, most: int) -> int:
        try:
            value = int(self.text(name, str(default)))
        except ValueError:
            value = 0
        if not 1 <= value <= most:
            raise SettingsError(f"{name} must be a whole number from 1 to {most}")
        return value

    def size(self, name: str) -> tuple[int, int] | None:
        """Width and height in px, as in 512x768, multiples of 8."""
        written = self.text(name, "")
        found = re.fullmatch(r"(\d{2,4})x(\d{2,4})", written)
        if not found:
            if written:
                raise SettingsError(f"{name} must be a width and a height in px, such as 512x768")
            return None
        width, height = int(found[1]), int(found[2])
        if width % 8 or height % 8:
            raise SettingsError(f"{name} must be of multiples of 8, since the VAE reduces by 8")
        return width, height

    def shapes(self, name: str) -> tuple[Shape, ...]:
        """Sizes as in 512x768, or 512x768x4 for batches of four, or 512x768x4g for those with guidance."""
        written = self.text(name, "")
        shapes = []
        for word in written.split(",") if written else ():
            found = re.fullmatch(r"(\d{2,4})x(\d{2,4})(?:x(\d{1,2}))?(g?)", word.strip())
            if not found or int(found[1]) % 8 or int(found[2]) % 8 or found[3] == "0":
                raise SettingsError(
                    f"{name} must list sizes in multiples of 8 px, such as 1024x1024, or 1024x1024x4 for "
                    "batches of 4, or 1024x1024x4g for those with guidance"
                )
            shapes.append(Shape(int(found[1]), int(found[2]), int(found[3] or 1), bool(found[4])))
        if len(shapes) > MAX_COMPILED:
            raise SettingsError(f"{name} lists more than {MAX_COMPILED} shapes; leave some out")
        return tuple(shapes)

    def warn_of_the_rest(self) -> None:
        for name in sorted(self._environ):
            if name.startswith("FEWSTEP_") and name not in self._known:
                logger.warning("%s is set, but fewstep reads no variable of that name", name)
