"""The inputs of a Cog server, made of fields that anybody may have written."""

import asyncio
import base64
import io
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from PIL import Image

from fewstep.errors import InvalidRequest
from fewstep.models.specs import ModelSpec
from fewstep.request import SIDE, Inputs

AT_ONCE = 2
Opened = Callable[[Path, str], Image.Image]
# What the page may send, and what other routes of ours add.
PAGE_FIELDS = frozenset(
    "prompt steps guidance seed negative_prompt num_outputs aspect_ratio style style_scale "
    "prompt_strength".split()
)
AS_CHECKED = ("prompt", "steps", "guidance", "seed", "output_format", "output_quality")
FIELDS = PAGE_FIELDS | {"width", "height", "output_format", "output_quality"}


@dataclass(frozen=True, slots=True)
class CogInputs:
    """What is sent to a Cog server, `inputs`, and what is shown of it, `recipe`."""

    inputs: dict[str, Any]
    recipe: dict[str, Any]

    @classmethod
    def create(
        cls,
        spec: ModelSpec,
        fields: Mapping[str, Any],
        *,
        known: Collection[str] = FIELDS,
        styles: Collection[str] = (),
        image: Image.Image | None = None,
        mask: Image.Image | None = None,
        quick: bool = False,
    ) -> Self:
        """Check `fields`, which are named as predict()'s inputs; `quick` asks for one small image.

        Nothing that was not checked is handed on; images go as our own PNG, of the size that is generated.
        Raises InvalidRequest.
        """
        if not set(known).issuperset(fields):
            raise InvalidRequest(f"a field is unknown; send only {', '.join(sorted(known))}")
        style = fields.get("style")
        if style and style not in styles:  # other sources would have the server fetch what a stranger names
            raise InvalidRequest("style is not one of this server's; choose one that the page offers")
        sent = {"prompt": ""} | {name: value for name, value in fields.items() if value is not None}
        request = Inputs.create(spec, **sent, image=image, mask=mask)
        width, height = request.width, request.height
        if quick and spec.quick_size:
            scale = spec.quick_size / spec.native_size
            width, height = (max(64, round(side * scale / 8) * 8) for side in (width, height))
        inputs: dict[str, Any] = {name: getattr(request, name) for name in AS_CHECKED}
        inputs |= {"aspect_ratio": "custom", "width": width, "height": height}
        inputs["num_outputs"] = 1 if quick else request.num_outputs
        if request.guided and request.negative_prompt:
            inputs["negative_prompt"] = request.negative_prompt
        if style:
            inputs |= {"style": style, "style_scale": request.styles[0].scale}
        recipe = inputs | {
            "model": spec.name,
            "aspect_ratio": fields.get("aspect_ratio") or "auto",
            "negative_prompt": request.negative_prompt,
            "from_image": request.image is not None,
        }
        if request.image is not None:
            recipe["prompt_strength"] = request.strength
            inputs |= {"image": _data_url(request.image), "prompt_strength": request.strength}
        if request.mask is not None:
            inputs["mask"] = _data_url(request.mask)
        return cls(inputs, recipe)

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in px."""
        return self.inputs["width"], self.inputs["height"]

    @property
    def recipes(self) -> list[dict[str, Any]]:
        """What generates each image again, alone."""
        seeds = ((self.inputs["seed"] + i) % 2**31 for i in range(self.inputs["num_outputs"]))
        return [{**self.recipe, "seed": seed, "num_outputs": 1} for seed in seeds]


class ImageReader:
    """Opens clients' images, `AT_ONCE` at a time, since one of 32 megapixels takes up to 620 MB."""

    def __init__(self) -> None:
        self._places = asyncio.Semaphore(AT_ONCE)

    async def read(self, content: bytes, name: str, opened: Opened) -> Image.Image:
        """Return what `opened`, one of images.codec's open functions, makes of `content`, scaled down to what
        is ever generated. Raises InvalidRequest."""

        def read() -> Image.Image:
            with tempfile.NamedTemporaryFile() as file:  # what opens callers' files safely takes a path
                file.write(content)
                file.flush()
                image = opened(Path(file.name), name)
            image.thumbnail((SIDE[1], SIDE[1]))  # at once: every request scales it to its size
            return image

        async with self._places:
            return await asyncio.to_thread(read)


def _data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
