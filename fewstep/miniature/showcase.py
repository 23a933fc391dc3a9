"""Generate the README's images: python -m fewstep.miniature.showcase docs"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from fewstep.generation.pipeline import Pipeline, load_pipeline
from fewstep.miniature.scoring import TEACHER_GUIDANCE, ddim_generator, few_step_generator, load_base
from fewstep.models.specs import get_model
from fewstep.settings import Settings

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


def grid(images: Sequence[Image.Image], columns: int, gap: int = 4) -> Image.Image:
    """Images of one size on a white sheet, row by row."""
    width, height = images[0].size
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, picture in enumerate(images):
        sheet.paste(picture, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet


def repaintings(pipeline: Pipeline) -> list[Image.Image]:
    """An image; others from it at rising prompt_strength; a mask; and another sky under that mask."""

    def generate(prompt: str, seed: int, **inputs: Any) -> Image.Image:
        [image] = pipeline.images([prompt], [seed], **inputs)
        return image

    image = generate(IMAGE_PROMPT, 3)
    again = [generate(REPAINTED, 3, image=image, prompt_strength=strength) for strength in STRENGTHS]
    mask = Image.new("L", image.size, 0)
    mask.paste(255, (0, 0, image.width, round(0.58 * image.height)))
    masked = generate(UNDER_MASK, 5, image=image, mask=mask, prompt_strength=1.0)
    return [image, *again, mask.convert("RGB"), masked]


def main() -> None:
    """images.webp: all prompts in four steps. steps.webp: six of them by the base, then by the LCM-LoRA.
    images.webp: image to image and inpainting."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the pictures go")
    folder = parser.parse_args().folder
    settings, spec = Settings(dtype="fp32"), get_model("miniature")
    pipeline = load_pipeline(spec, settings)
    seeds = range(len(PROMPTS))
    grid(few_step_generator(pipeline, 4)(PROMPTS, seeds), COLUMNS).save(folder / "pictures.webp", quality=92)

    grid(repaintings(pipeline), COLUMNS).save(folder / "images.webp", quality=92)

    base = load_base(settings.weights_root / spec.name, pipeline.device)
    prompts, seeds = PROMPTS[:COLUMNS], range(COLUMNS)
    rows = list(ddim_generator(base, BASE_STEPS, TEACHER_GUIDANCE)(prompts, seeds))
    for steps in STEPS:
        rows += few_step_generator(pipeline, steps)(prompts, seeds)
    grid(rows, COLUMNS).save(folder / "steps.webp", quality=92)


if __name__ == "__main__":
    main()
