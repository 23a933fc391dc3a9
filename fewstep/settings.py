"""Everything that the environment decides, for server and page, in one place: `Settings.from_env()`."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from fewstep.errors import SettingsError

logger = logging.getLogger(__name__)

INT8 = "openvino-int8"  # in which linear layers multiply in 8 bits
OPENVINO = ("openvino", INT8)
FP8 = "compiled-fp8"  # likewise, on a GPU
COMPILED = ("compiled", FP8)
VAES = ("full", "tiny")
MAX_COMPILED = 8  # torch keeps as many versions of one module, and then gives up
MAX_DEADLINE_S = 24 * 60 * 60
MAX_BATCH_LIMIT = 64
MAX_GIGABYTES = 10_000
GIGABYTE = 10**9
HUB = "https://huggingface.co"
# Where LoRAs are shared, and where these sites send one on to.
STYLE_HOSTS = tuple(
    "huggingface.co *.huggingface.co *.hf.co civitai.com *.civitai.com *.r2.cloudflarestorage.com "
    "replicate.delivery *.replicate.delivery".split()
)
REPOSITORY = Path(__file__).resolve().parents[1]
OF_SCRIPTS = {"FEWSTEP_PYTHON", "FEWSTEP_TORCH_INDEX"}  # variables of the family that scripts/python reads

# Makes a setting of a variable's text, which is never empty. Raises ValueError that says what it may hold.
Parser = Callable[[str], Any]


@dataclass(frozen=True)
class Shape:
    """The shape of a batch: so many images of `width` x `height` px, with classifier-free guidance or not."""

    width: int
    height: int
    batch: int = 1
    guided: bool = False


def _path(text: str) -> Path:
    return Path(text).absolute()


def _choice(*allowed: str, on: str | None = None) -> Parser:
    """One of `allowed`; of a switch, whether that is `on`."""

    def parse(text: str) -> str | bool:
        if text not in allowed:
            raise ValueError(f"holds an unknown value; set it to one of {', '.join(allowed)}")
        return text if on is None else text == on

    return parse


def _whole(most: int, unit: int = 1) -> Parser:
    def parse(text: str) -> int:
        if not re.fullmatch(r"\d{1,9}", text.strip()) or not 1 <= int(text) <= most:
            raise ValueError(f"must be a whole number from 1 to {most}")
        return unit * int(text)

    return parse


def _gigabytes(text: str) -> int | None:
    return None if text == "auto" else int(_whole(MAX_GIGABYTES)(text))


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 0 < seconds <= MAX_DEADLINE_S:
        raise ValueError(f"must be a number of seconds above 0 and at most {MAX_DEADLINE_S:g}")
    return seconds


def _names(text: str) -> tuple[str, ...]:
    """Return the words between commas; "none" is no word at all."""
    words = (word.strip() for word in text.split(","))
    return () if text == "none" else tuple(word for word in words if word)


def _size(text: str) -> tuple[int, int]:
    """Return width and height in px, multiples of 8, of what is written as 512x768."""
    match = re.fullmatch(r"(\d{2,4})x(\d{2,4})", text)
    if not match:
        raise ValueError("must be a width and a height in px, such as 512x768")
    width, height = int(match[1]), int(match[2])
    if width % 8 or height % 8:
        raise ValueError("must be of multiples of 8, since the VAE reduces by 8")
    return width, height


def _shapes(text: str) -> tuple[Shape, ...]:
    """Return shapes: 512x768, 512x768x4 for batches of four, or 512x768x4g for those with guidance."""
    shapes = []
    for word in text.split(","):
        match = re.fullmatch(r"(\d{2,4})x(\d{2,4})(?:x(\d{1,2}))?(g?)", word.strip())
        if not match or int(match[1]) % 8 or int(match[2]) % 8 or match[3] == "0":
            raise ValueError(
                "must list sizes in multiples of 8 px, such as 1024x1024, or 1024x1024x4 for batches of 4, "
                "or 1024x1024x4g for those with guidance"
            )
        shapes.append(Shape(int(match[1]), int(match[2]), int(match[3] or 1), bool(match[4])))
    if len(shapes) > MAX_COMPILED:
        raise ValueError(f"lists more than {MAX_COMPILED} shapes; leave some out")
    return tuple(shapes)


def _from(variable: str, default: Any, parse: Parser = str, *, secret: bool = False) -> Any:
    """Return a field that `variable` sets; a callable `default` makes one for each Settings."""
    kind = "default_factory" if callable(default) else "default"
    metadata = {"variable": variable, "parse": parse}
    return field(**{kind: default}, repr=not secret, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How this process runs: a server that generates, the page before it, or a command.

    "auto" is resolved when the model loads, and the name of the model is looked up there too.
    """

    model: str = _from("FEWSTEP_MODEL", "miniature")
    weights_root: Path = _from("FEWSTEP_WEIGHTS", REPOSITORY / "weights", _path)
    output_root: Path = _from("FEWSTEP_OUTPUTS", lambda: Path(gettempdir(), "fewstep-outputs"), _path)
    device: str = _from("FEWSTEP_DEVICE", "auto", _choice("auto", "cpu", "cuda"))
    dtype: str = _from("FEWSTEP_DTYPE", "auto", _choice("auto", "fp32", "bf16", "fp16"))
    engine: str = _from("FEWSTEP_ENGINE", "torch", _choice("torch", *COMPILED, *OPENVINO))
    openvino_size: tuple[int, int] | None = _from("FEWSTEP_OPENVINO_SIZE", None, _size)  # None: native
    vae: str = _from("FEWSTEP_VAE", "full", _choice(*VAES))  # tiny decodes coarser, and much quicker
    compiled: tuple[Shape, ...] = _from("FEWSTEP_COMPILED", (), _shapes)  # none: native images
    verify: str = _from("FEWSTEP_VERIFY", "sha256", _choice("sha256", "size"))
    deadline_s: float = _from("FEWSTEP_DEADLINE_S", 120.0, _seconds)
    max_batch: int = _from("FEWSTEP_MAX_BATCH", 8, _whole(MAX_BATCH_LIMIT))  # images in one forward pass
    # How much of the GPU's memory may be used, in GB; None: what is free.
    memory_gb: int | None = _from("FEWSTEP_MEMORY", None, _gigabytes)
    # Of coglet's prediction folders, where a script of ours started it.
    coglet_root: Path | None = _from("FEWSTEP_COGLET_ROOT", None, _path)
    safety: str = _from("FEWSTEP_SAFETY", "clip", _choice("clip", "vit", "off"))
    # Whether a request may switch the safety checker off, and whether files carry what made them.
    allow_unsafe: bool = _from("FEWSTEP_ALLOW_UNSAFE", False, _choice("0", "1", on="1"))
    recipes: bool = _from("FEWSTEP_RECIPES", True, _choice("on", "off", on="on"))
    # The operator's own LoRAs, by model; where others are fetched (*.x is any subdomain of x); and the repos
    # of the hub that are read with the operator's token.
    styles_root: Path = _from("FEWSTEP_STYLES", REPOSITORY / "styles", _path)
    style_hosts: tuple[str, ...] = _from("FEWSTEP_STYLE_HOSTS", STYLE_HOSTS, _names)
    style_repos: tuple[str, ...] = _from("FEWSTEP_STYLE_REPOS", (), _names)
    style_cache: Path = _from("FEWSTEP_STYLE_CACHE", lambda: Path(gettempdir(), "fewstep-styles"), _path)
    style_disk_bytes: int = _from("FEWSTEP_STYLE_DISK_GB", 20 * GIGABYTE, _whole(MAX_GIGABYTES, GIGABYTE))
    style_memory_bytes: int = _from("FEWSTEP_STYLE_MEMORY_GB", 4 * GIGABYTE, _whole(MAX_GIGABYTES, GIGABYTE))
    hf_endpoint: str = _from("HF_ENDPOINT", HUB, lambda text: text.rstrip("/"))
    hf_token: str | None = _from("HF_TOKEN", None, secret=True)
    # The page's own: the folder holds images, the SQLite database and the cookies' key.
    web_data: Path = _from("FEWSTEP_WEB_DATA", REPOSITORY / "data", _path)
    database_url: str = _from("DATABASE_URL", "", secret=True)  # may hold a password
    api_key: str = _from("FEWSTEP_API_KEY", "", secret=True)  # of /v1; none: open
    operator_key: str = _from("FEWSTEP_OPERATOR_KEY", "", secret=True)  # of /operator; none: no such page
    chat_key: str = _from("OPENAI_API_KEY", "", secret=True)  # with it, prompts can be improved
    chat_url: str | None = _from("OPENAI_BASE_URL", None)
    chat_model: str = _from("FEWSTEP_CHAT_MODEL", "gpt-5-mini")
    replicate_token: str = _from("REPLICATE_API_TOKEN", "", secret=True)

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read `environ` (the process's own by default); an empty variable counts as unset.

        Raises SettingsError that names the variable and what it may hold. A FEWSTEP_* variable that nothing
        reads is warned of, since a misspelt name would otherwise change nothing in silence.
        """
        environ = os.environ if environ is None else environ
        values, read = {}, set(OF_SCRIPTS)
        for setting in fields(cls):
            variable = setting.metadata["variable"]
            read.add(variable)
            if text := environ.get(variable):
                try:
                    values[setting.name] = setting.metadata["parse"](text)
                except ValueError as error:
                    raise SettingsError(f"{variable} {error}") from None
        settings = cls(**values)
        for variable in sorted(environ.keys() - read):
            if variable.startswith("FEWSTEP_"):
                logger.warning("%s is set, but fewstep reads no variable of that name", variable)
        for name, engines in (("openvino_size", OPENVINO), ("compiled", COMPILED)):
            if name in values and settings.engine not in engines:
                unread = "FEWSTEP_%s is set, but FEWSTEP_ENGINE is %s, which does not read it"
                logger.warning(unread, name.upper(), settings.engine)
        return settings
