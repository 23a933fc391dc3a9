"""Generate the README's images, and a strip for every input: python -m fewstep.miniature.showcase docs"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from fewstep.evaluation.figures import grid, sheet
from fewstep.evaluation.generate import ddim, few_steps
from fewstep.generation.pipeline import Pipeline, load_pipeline
from fewstep.images.codec import encode_image
from fewstep.miniature.scoring import TEACHER_GUIDANCE
from fewstep.miniature.styling import load_style
from fewstep.models.specs import get_model
from fewstep.settings import Settings
from fewstep.training.networks import load_base

PROMPTS = (
    "a red house in a meadow with mountains at sunset",
    "a white sailboat on a lake with hills by day, on the right",
    "an orange balloon in a lavender field with mountains under a blue sky, on the left",
    "a purple castle in the snow in front of a forest at night, in the middle",
    "a yellow car in the desert near a volcano at dusk, on the left",
    "a blue rocket on the sand with a city under the northern lights, in the middle",
    "a pink mushroom in a meadow with a forest in the rain, in the middle",
    "a green tree on a lake with a volcano at sunset, in the middle",
    "a yellow balloon in the snow with mountains under an aurora, on the left",
    "a white castle in a lavender field with hills at sunset, on the right",
    "a blue house on the lake with a city at night, on the right",
    "an orange sailboat in a meadow with a volcano on a sunny day",
)
COLUMNS = 6
STEPS = (1, 2, 4, 8)
BASE_STEPS = 2
IMAGE_PROMPT = "a red castle in the snow with hills by day, in the middle"
REPAINTED = "a purple castle in a meadow with mountains at night, in the middle"
STRENGTHS = (0.15, 0.3, 0.6)
UNDER_MASK = "a red castle in the snow with a volcano at sunset, in the middle"

HEIGHT = 96  # of a strip
COMMON: dict[str, Any] = {
    "prompt": "a red house in a meadow with mountains at sunset, in the middle",
    "seed": 7,
}
CASTLE: dict[str, Any] = {"prompt": IMAGE_PROMPT, "seed": 3}
AT_NIGHT = {"prompt": REPAINTED}
UNDER_NIGHT = {"prompt": "a red castle in the snow with hills at night, in the middle", "prompt_strength": 1}
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
    "mask": (CASTLE, UNDER_NIGHT | {"image": True, "mask": True}),
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


def repaintings(pipeline: Pipeline) -> list[Image.Image]:
    """Generate an image, others from it by prompt_strength, a mask, and another sky under that mask."""
    [image] = pipeline.images([IMAGE_PROMPT], [3])
    again = [
        pipeline.images([REPAINTED], [3], image=image, prompt_strength=strength)[0] for strength in STRENGTHS
    ]
    mask = upper_part(image)
    masked = pipeline.images([UNDER_MASK], [5], image=image, mask=mask, prompt_strength=1.0)
    return [image, *again, mask.convert("RGB"), *masked]


def upper_part(image: Image.Image) -> Image.Image:
    """Return a mask of the sky and what stands before it."""
    mask = Image.new("L", image.size, 0)
    mask.paste(255, (0, 0, image.width, round(0.58 * image.height)))
    return mask


@dataclass
class ExampleGenerator:
    """Generates what EXAMPLES names."""

    pipeline: Pipeline
    styles: Path

    def strip(self, examples: Sequence[dict[str, Any]]) -> Image.Image:
        """Return the images of all examples side by side, as their files show them."""
        images = [image for example in examples for image in self._generate(example)]
        sizes = [(round(image.width * HEIGHT / image.height), HEIGHT) for image in images]
        resized = zip(images, sizes, strict=True)
        return sheet([[image.resize(size, Image.Resampling.LANCZOS) for image, size in resized]])

    def _generate(self, example: dict[str, Any]) -> list[Image.Image]:
        inputs = COMMON | example
        if "image" in inputs:
            [inputs["image"]] = self._generate(CASTLE)
            inputs["seed"] = CASTLE["seed"]
        if "mask" in inputs:
            inputs["mask"] = upper_part(inputs["image"])
        loras = [
            load_style(self.pipeline, self.styles / f"{inputs[name]}.safetensors")
            for name in ("style", "extra_style")
            if inputs.get(name)
        ]
        prompt, seed = inputs.pop("prompt"), inputs.pop("seed")
        images = self.pipeline.images([prompt], [seed], loras=loras, **inputs)
        kind, quality = inputs.get("output_format", "webp"), inputs.get("output_quality", 90)
        return [Image.open(io.BytesIO(encode_image(image, kind, quality))).convert("RGB") for image in images]


def main() -> None:
    """Write pictures.webp: all prompts in four steps; images.webp: image to image and inpainting; steps.webp:
    six prompts by the base, then by the LCM-LoRA; and inputs/NAME.webp for every input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the pictures go")
    folder = parser.parse_args().folder
    settings = Settings(dtype="fp32")
    pipeline = load_pipeline(get_model("miniature"), settings)
    pictures = few_steps(pipeline, 4)(PROMPTS, range(len(PROMPTS)))
    base = load_base("miniature", settings, pipeline.device)
    ways = [ddim(base, TEACHER_GUIDANCE, "leading").in_steps(BASE_STEPS)]
    ways += [few_steps(pipeline, steps) for steps in STEPS]
    rows = [image for generate in ways for image in generate(PROMPTS[:COLUMNS], range(COLUMNS))]
    for name, images in (("pictures", pictures), ("images", repaintings(pipeline)), ("steps", rows)):
        grid(images, COLUMNS).save(folder / f"{name}.webp", quality=92)
    generator = ExampleGenerator(pipeline, settings.styles_root / "miniature")
    (folder / "inputs").mkdir(parents=True, exist_ok=True)
    for name, examples in EXAMPLES.items():
        generator.strip(examples).save(folder / "inputs" / f"{name}.webp", quality=90)


if __name__ == "__main__":
    main()
