"""Generate the README's images, a strip for every input, and sheets of all things:

    python -m fewstep.miniature.showcase docs

Their inputs stand in showcase.toml.
"""

from __future__ import annotations

import argparse
import io
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from fewstep.evaluation.figures import grid
from fewstep.evaluation.generate import ddim, few_steps
from fewstep.generation.load import load_pipeline
from fewstep.generation.pipeline import Pipeline
from fewstep.images.codec import encode_image
from fewstep.miniature.scoring import TEACHER_GUIDANCE
from fewstep.miniature.styling import load_style
from fewstep.miniature.world.scenes import HELD_OUT_THINGS
from fewstep.miniature.world.things import THINGS
from fewstep.models.specs import get_model
from fewstep.settings import Settings
from fewstep.training.networks import load_base

SHOWCASE = tomllib.loads(Path(__file__).with_name("showcase.toml").read_text(encoding="utf-8"))
CASTLE, PROMPTS = SHOWCASE["castle"], SHOWCASE["prompts"]
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    name: [strip.get("all", {}) | each for each in strip["each"]]
    for name, strip in SHOWCASE["strips"].items()
}
COLUMNS, SHEET_COLUMNS = 6, 8
SHEET_SEEDS, SHEET_PX = (1, 2, 3), 144
STEPS, BASE_STEPS = (1, 2, 4, 8), 2
HEIGHT = 96  # of a strip
SETTINGS = Settings(dtype="fp32")
STYLES = SETTINGS.styles_root / "miniature"


def repaintings(pipeline: Pipeline) -> list[Image.Image]:
    """Generate the castle, others from it by prompt_strength, a mask, and another sky under that mask."""
    inputs, seed = SHOWCASE["images"], [CASTLE["seed"]]
    [image] = pipeline.images([CASTLE["prompt"]], seed)
    again = [
        pipeline.images([inputs["again"]], seed, image=image, prompt_strength=strength)[0]
        for strength in inputs["strengths"]
    ]
    mask = upper_part(image)
    masked = pipeline.images([inputs["under_mask"]], [5], image=image, mask=mask, prompt_strength=1.0)
    return [image, *again, mask.convert("RGB"), *masked]


def upper_part(image: Image.Image) -> Image.Image:
    """Return a mask of the sky and what stands before it."""
    mask = Image.new("L", image.size, 0)
    mask.paste(255, (0, 0, image.width, round(0.58 * image.height)))
    return mask


def strip(pipeline: Pipeline, examples: Sequence[dict[str, Any]]) -> Image.Image:
    """Return the images of all examples side by side, as their files show them."""
    images = [image for example in examples for image in _generate(pipeline, example)]
    sizes = [(round(image.width * HEIGHT / image.height), HEIGHT) for image in images]
    resized = zip(images, sizes, strict=True)
    return grid([image.resize(size, Image.Resampling.LANCZOS) for image, size in resized], len(images))


def _generate(pipeline: Pipeline, example: dict[str, Any]) -> list[Image.Image]:
    inputs = SHOWCASE["common"] | example
    if "image" in inputs:
        [inputs["image"]] = _generate(pipeline, CASTLE)
        inputs["seed"] = CASTLE["seed"]
    if "mask" in inputs:
        inputs["mask"] = upper_part(inputs["image"])
    names = [inputs[name] for name in ("style", "extra_style") if name in inputs]
    loras = [load_style(pipeline, STYLES / f"{name}.safetensors") for name in names]
    images = pipeline.images([inputs.pop("prompt")], [inputs.pop("seed")], loras=loras, **inputs)
    kind, quality = inputs.get("output_format", "webp"), inputs.get("output_quality", 90)
    return [Image.open(io.BytesIO(encode_image(image, kind, quality))).convert("RGB") for image in images]


def things(pipeline: Pipeline, seed: int) -> Image.Image:
    """Return a sheet of four-step images of every thing that the base knows, in their order: of the plain
    word for it and nothing else, all of them of one seed."""
    words = [thing.words[0] for name, thing in THINGS.items() if name not in HELD_OUT_THINGS]
    prompts = [f"an {word}" if word[0] in "aeio" else f"a {word}" for word in words]
    images = few_steps(pipeline, 4)(prompts, [seed] * len(prompts))
    small = [image.resize((SHEET_PX, SHEET_PX), Image.Resampling.LANCZOS) for image in images]
    return grid(small, SHEET_COLUMNS)


def main() -> None:
    """Write pictures.webp: all prompts in four steps; images.webp: image to image and inpainting; steps.webp:
    six prompts by the base, then by the LCM-LoRA; things-SEED.webp: every thing; and inputs/NAME.webp for
    every input."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the pictures go")
    folder = parser.parse_args().folder
    pipeline = load_pipeline(get_model("miniature"), SETTINGS)
    pictures = few_steps(pipeline, 4)(PROMPTS, range(len(PROMPTS)))
    base = load_base("miniature", SETTINGS, pipeline.device)
    first = PROMPTS[:COLUMNS], range(COLUMNS)
    rows = ddim(base, TEACHER_GUIDANCE, "leading").generate(*first, steps=BASE_STEPS)
    rows += [image for steps in STEPS for image in few_steps(pipeline, steps)(*first)]
    for name, images in (("pictures", pictures), ("images", repaintings(pipeline)), ("steps", rows)):
        grid(images, COLUMNS).save(folder / f"{name}.webp", quality=92)
    for seed in SHEET_SEEDS:
        things(pipeline, seed).save(folder / f"things-{seed}.webp", quality=88)
    (folder / "inputs").mkdir(parents=True, exist_ok=True)
    for name, examples in EXAMPLES.items():
        strip(pipeline, examples).save(folder / "inputs" / f"{name}.webp", quality=90)


if __name__ == "__main__":
    main()
