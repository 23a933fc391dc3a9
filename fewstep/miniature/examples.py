"""A strip of images for every input, for the README: python -m fewstep.miniature.examples docs"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from fewstep.errors import FewstepError
from fewstep.generation.pipeline import Pipeline, load_pipeline
from fewstep.images.codec import encode_image
from fewstep.miniature.styling import load_style
from fewstep.models.specs import get_model
from fewstep.request import Inputs
from fewstep.settings import Settings

HEIGHT = 96
GAP = 4
COMMON: dict[str, Any] = {
    "prompt": "a red house in a meadow with mountains at sunset, in the middle",
    "seed": 7,
}
CASTLE: dict[str, Any] = {"prompt": "a red castle in the snow with hills by day, in the middle", "seed": 3}
AT_NIGHT = {"prompt": "a purple castle in a meadow with mountains at night, in the middle"}
REPAINTED = {"prompt": "a red castle in the snow with hills at night, in the middle", "prompt_strength": 1}
ANY_SKY = {"prompt": "a red house in a meadow with mountains, in the middle", "guidance": 2}
ON_THE_LEFT = {"prompt": "a red house in a meadow with mountains at sunset, on the left", "seed": 3}
CUSTOM = {"aspect_ratio": "custom"}
STYLED = {"style": "postcard", "style_scale": 1}

# What each strip shows from left to right; an `image` or `mask` stands for the castle and for its upper part.
EXAMPLES: dict[str, tuple[dict[str, Any], ...]] = {
    "prompt": tuple(
        {"prompt": f"a (red){red} (blue){blue} house in a meadow by day, in the middle"}
        for red, blue in ((1.5, 0.5), (1, 1), (0.5, 1.5))
    ),
    "steps": tuple({"steps": steps} for steps in (1, 2, 4, 8)),
    "guidance": tuple({"guidance": guidance} for guidance in (None, 1.5, 2.5, 4)),
    "seed": tuple({"seed": seed} for seed in (1, 2, 3, 4)),
    "negative_prompt": tuple(ANY_SKY | {"negative_prompt": one} for one in ("", "night")),
    "num_outputs": ({"num_outputs": 4},),
    "aspect_ratio": tuple(ON_THE_LEFT | {"aspect_ratio": ratio} for ratio in ("1:1", "3:2", "2:3")),
    "width": tuple(ON_THE_LEFT | CUSTOM | {"width": px, "height": 128} for px in (96, 128, 208)),
    "height": tuple(ON_THE_LEFT | CUSTOM | {"width": 128, "height": px} for px in (128, 152, 176)),
    "image": (CASTLE, AT_NIGHT | {"image": True, "prompt_strength": 0.3}),
    "mask": (CASTLE, REPAINTED | {"image": True, "mask": True}),
    "prompt_strength": tuple(
        AT_NIGHT | {"image": True, "prompt_strength": strength} for strength in (0.1, 0.2, 0.4, 0.8)
    ),
    "style": tuple({"style": style} for style in ("postcard", "spotlight", "golden-hour")),
    "style_scale": tuple({"style": "spotlight", "style_scale": scale} for scale in (-0.5, 0, 0.5, 1)),
    "extra_style": tuple(STYLED | {"extra_style": style} for style in (None, "golden-hour", "spotlight")),
    "extra_style_scale": tuple(
        STYLED | {"extra_style": "spotlight", "extra_style_scale": scale} for scale in (-0.5, 0, 0.5, 1)
    ),
    "lcm_scale": tuple({"lcm_scale": scale} for scale in (0, 0.5, 1, 1.5)),
    "clip_skip": tuple({"clip_skip": skip} for skip in (0, 1)),
    "output_format": tuple({"output_format": kind} for kind in ("webp", "jpg", "png")),
    "output_quality": tuple({"output_format": "jpg", "output_quality": quality} for quality in (5, 30, 90)),
}


@dataclass
class Generator:
    """Generates what EXAMPLES names."""

    pipeline: Pipeline
    styles: Path

    def strip(self, wishes: Sequence[dict[str, Any]]) -> Image.Image:
        """The images of all wishes side by side, as their files show them."""
        images = [picture for wish in wishes for picture in self._generate(wish)]
        scaled = [
            picture.resize((round(picture.width * HEIGHT / picture.height), HEIGHT), Image.Resampling.LANCZOS)
            for picture in images
        ]
        sheet = Image.new("RGB", (sum(one.width + GAP for one in scaled) - GAP, HEIGHT), "white")
        x = 0
        for one in scaled:
            sheet.paste(one, (x, 0))
            x += one.width + GAP
        return sheet

    def _generate(self, wish: dict[str, Any]) -> list[Image.Image]:
        inputs = COMMON | wish
        if "image" in inputs:
            [castle] = self._generate(CASTLE)
            inputs |= {"image": castle, "seed": CASTLE["seed"]}
        if "mask" in inputs:
            inputs["mask"] = Image.new("L", castle.size, 0)
            inputs["mask"].paste(255, (0, 0, castle.width, round(0.58 * castle.height)))
        checked = Inputs.create(self.pipeline.spec, **inputs)
        loras = [
            load_style(self.pipeline, self.styles / f"{style.source.place}.safetensors")
            for style in checked.styles
        ]
        [result] = self.pipeline.generate([self.pipeline.encode(self.pipeline.request(checked, loras))])
        if isinstance(result, FewstepError):
            raise result
        kind, quality = checked.output_format, checked.output_quality
        return [
            Image.open(io.BytesIO(encode_image(image, kind, quality))).convert("RGB")
            for image in result.images
        ]


def main() -> None:
    """Write docs/inputs/NAME.webp for every input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the folder of pictures goes")
    folder = parser.parse_args().folder / "inputs"
    folder.mkdir(parents=True, exist_ok=True)
    settings, spec = Settings(dtype="fp32"), get_model("miniature")
    generator = Generator(load_pipeline(spec, settings), settings.styles_root / spec.name)
    for name, wishes in EXAMPLES.items():
        generator.strip(wishes).save(folder / f"{name}.webp", quality=90)


if __name__ == "__main__":
    main()
