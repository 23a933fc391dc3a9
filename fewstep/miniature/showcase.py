"""Generate the README's images: python -m fewstep.miniature.showcase docs"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image

from fewstep.evaluation.figures import grid
from fewstep.evaluation.generate import ddim, few_steps
from fewstep.generation.pipeline import Pipeline, load_pipeline
from fewstep.miniature.scoring import TEACHER_GUIDANCE
from fewstep.models.specs import get_model
from fewstep.settings import Settings
from fewstep.training.sources import load_base

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


def main() -> None:
    """pictures.webp: all prompts in four steps. steps.webp: six of them by the base, then by the LCM-LoRA.
    images.webp: image to image and inpainting."""
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


if __name__ == "__main__":
    main()
