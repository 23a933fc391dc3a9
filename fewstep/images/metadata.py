"""What an image was generated from, kept in its file: one JSON for us, one text for everybody else's tools.

The text is that of AUTOMATIC1111's `parameters`, which Civitai and many viewers read. A PNG has both as text
chunks, `parameters` and `fewstep`; a JPEG or WebP has them in EXIF, as UserComment and as MakerNote.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, BinaryIO

from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from fewstep.errors import InvalidRequest
from fewstep.models.specs import MODELS, RANDOM

Recipe = dict[str, Any]

KEY = "fewstep"  # of the JSON: a PNG's chunk, and its own first key
# What is in every recipe by the name that the input has.
SAME_NAMES = ("prompt", "negative_prompt", "steps", "guidance", "seed", "width", "height", "lcm_scale")
_NO_RECIPE = (SyntaxError, ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error)
_UNICODE = b"UNICODE\0"  # what EXIF wants before a UserComment in UTF-16


def inputs_of(recipe: Recipe) -> dict[str, Any]:
    """The inputs of predict() that a recipe stands for, but for the images."""
    inputs = {name: recipe[name] for name in SAME_NAMES}
    inputs["aspect_ratio"] = "custom"
    inputs |= {name: recipe[name] for name in ("clip_skip", "prompt_strength") if name in recipe}
    for prefix, style in zip(("", "extra_"), recipe["styles"], strict=False):
        inputs |= {f"{prefix}style": style["style"], f"{prefix}style_scale": style["style_scale"]}
    return inputs


def parameters_text(recipe: Recipe) -> str:
    """As AUTOMATIC1111 writes it: the prompt, the negative prompt, and one line of settings."""
    settings: dict[str, Any] = {
        "Steps": recipe["steps"],
        "Sampler": "LCM",
        "CFG scale": f"{recipe['guidance']:g}",
        "Seed": recipe["seed"],
        "Size": f"{recipe['width']}x{recipe['height']}",
        "Model hash": recipe["revision"][:10],
        "Model": recipe["model"],
    }
    if "clip_skip" in recipe:
        settings["Clip skip"] = recipe["clip_skip"] + 1  # they count from the last layer, we from 0
    if "prompt_strength" in recipe:
        settings["Denoising strength"] = f"{recipe['prompt_strength']:g}"
    if recipe["styles"]:
        hashes = (f"{Path(style['style']).stem}: {style['sha256'][:12]}" for style in recipe["styles"])
        settings["Lora hashes"] = f'"{", ".join(hashes)}"'
    settings["Version"] = f"fewstep {recipe[KEY]}"
    negative = recipe["negative_prompt"]
    lines = [recipe["prompt"], *([f"Negative prompt: {negative}"] if negative else [])]
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in settings.items())])


def save_options(recipe: Recipe, output_format: str) -> dict[str, Any]:
    """What Pillow's `save` needs to put `recipe` into a file."""
    text, content = parameters_text(recipe), json.dumps(recipe, ensure_ascii=False)
    if output_format == "png":
        chunks = PngInfo()
        for name, value in (("parameters", text), (KEY, content)):
            chunks.add_itxt(name, value)
        return {"pnginfo": chunks}
    exif = Image.Exif()
    fields = exif.get_ifd(ExifTags.IFD.Exif)
    fields[ExifTags.Base.UserComment] = _UNICODE + text.encode("utf-16-be")
    fields[ExifTags.Base.MakerNote] = content.encode()  # in UTF-8, so that all fits into a JPEG's 64 kB
    return {"exif": exif}


def read_recipe(file: Path | BinaryIO) -> Recipe:
    """The recipe in an image that fewstep generated.

    Raises InvalidRequest for a file that holds none, OSError for one that cannot be read.
    """
    try:
        with Image.open(file, formats=("PNG", "JPEG", "WEBP")) as image:
            content: Any
            if image.format == "PNG":
                image.load()  # texts may stand behind the pixels
                content = image.info.get(KEY)
            else:
                content = image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.MakerNote)
        recipe = json.loads(content, parse_constant=_refuse_constant)
        _check(recipe)
        return dict(recipe)
    except (*_NO_RECIPE, Image.DecompressionBombError, OSError) as error:
        if isinstance(error, OSError) and error.filename:  # not there, or not to be read
            raise
        raise InvalidRequest(
            "the picture holds no recipe of fewstep's; give a file as it was painted, since editors and "
            "messengers take such things out"
        ) from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _check(recipe: Recipe) -> None:
    """Raise ValueError, KeyError or TypeError unless it has every field, in the types of `Request.recipe`."""
    texts = [recipe[name] for name in (KEY, "model", "revision", "prompt", "negative_prompt")]
    texts += [style[name] for style in recipe["styles"] for name in ("style", "sha256")]
    texts += [recipe[name] for name in ("image_sha256", "mask_sha256") if name in recipe]
    numbers = [recipe[name] for name in ("steps", "guidance", "seed", "width", "height", "lcm_scale")]
    numbers += [style["style_scale"] for style in recipe["styles"]]
    numbers += [recipe[name] for name in ("clip_skip", "prompt_strength") if name in recipe]
    sound = {*map(type, texts)} == {str} and {*map(type, numbers)} <= {int, float}
    if not sound or recipe["model"].removesuffix(RANDOM) not in MODELS:
        raise ValueError("a field has the wrong type")
