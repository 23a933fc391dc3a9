"""What the miniature's styles do on top of its LCM-LoRA: python -m fewstep.miniature.styling

Generates held-out captions in four steps at rising style_scale and writes styles/miniature/README.md with how
much of the style there is and how much of the prompt is still right; and docs/styles.webp, a grid like
Figure 3 of the LCM-LoRA report (arXiv 2311.05556): scales from top to bottom, steps from left to right.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np

from fewstep.evaluation.figures import grid
from fewstep.evaluation.generate import few_steps
from fewstep.evaluation.tables import ROOT, markdown
from fewstep.generation.load import load_pipeline
from fewstep.generation.pipeline import Pipeline
from fewstep.lora.types import Lora
from fewstep.miniature.judge import Judge, load_judge
from fewstep.miniature.scoring import Evaluator
from fewstep.miniature.vae import reconstruct
from fewstep.miniature.world.dataset import draw_many
from fewstep.miniature.world.drawing import draw
from fewstep.miniature.world.restyling import STYLES, StyleMeter
from fewstep.miniature.world.scenes import Scene, unseen_scenes
from fewstep.models.specs import get_model
from fewstep.settings import Settings

SCALES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
GRID_STEPS = (1, 2, 4, 8)
GRID_PROMPT, GRID_SEED = "a fox in the snow with mountains at night", 3
CAPTIONS = 200


def load_style(pipeline: Pipeline, path: Path) -> Lora:
    """Load the style in `path`, as a request carries it."""
    return pipeline.adapters.read(path, hashlib.sha256(path.read_bytes()).hexdigest())


def score_style(
    name: str,
    style: Lora,
    pipeline: Pipeline,
    judge: Judge,
    scenes: Sequence[Scene],
    scales: Sequence[float] = SCALES,
    drawings: int = 400,
) -> list[tuple[float, float]]:
    """Return how much of a style images have, from 0 as plain drawings to 1 as restyled ones, and in how many
    percent of them all that it leaves alone is right and looks whole; for each of `scales`."""
    side = pipeline.spec.native_size
    # Fitted to drawings that went through the VAE, as all that is generated does.
    drawn, vae = unseen_scenes(drawings, seed=9), pipeline.diffusion.vae
    plain, styled = (draw_many(drawn, 5, side, side, how) for how in (draw, STYLES[name].draw))
    meter = StyleMeter(reconstruct(vae, plain), reconstruct(vae, styled))
    evaluator, scores = Evaluator(judge, scenes, side), []
    for scale in scales:
        title = f"{name} at {scale:g}"
        generate = few_steps(pipeline, 4, title, loras=[style], style=name, style_scale=scale)
        images = generate(evaluator.prompts, range(len(evaluator.prompts)))
        seen = judge.look(images)
        attributes = evaluator.attributes(seen)
        right = np.all([seen.whole, *(attributes[attribute] for attribute in STYLES[name].leaves)], 0)
        scores.append((float(meter(images).mean()), 100 * float(right.mean())))
    return scores


def main() -> None:
    """Score all styles in styles/miniature and write their card and their grid."""
    settings = Settings(max_batch=25, dtype="fp32")
    pipeline = load_pipeline(get_model("miniature"), settings)
    judge = load_judge(settings.weights_root / "miniature")
    folder = settings.styles_root / "miniature"
    styles = {name: load_style(pipeline, folder / f"{name}.safetensors") for name in STYLES}
    scenes = unseen_scenes(CAPTIONS)
    scores = [score_style(name, style, pipeline, judge, scenes) for name, style in styles.items()]
    rows = [
        [f"{scale:g}", *(f"{style:.2f} | {right:.1f}" for style, right in row)]
        for scale, *row in zip(SCALES, *scores, strict=True)
    ]
    head = ["style_scale", *(cell for name in styles for cell in (f"{name}: style", "right"))]
    leaves = ";\n".join(f"{name}: {', '.join(style.leaves)}" for name, style in STYLES.items())
    card = Path(__file__).with_name("styling.md").read_text(encoding="utf-8")
    card = card.format(captions=CAPTIONS, leaves=leaves, table=markdown(head, rows))
    (folder / "README.md").write_text(card)
    images, generate = [], partial(pipeline.images, [GRID_PROMPT], [GRID_SEED], style="x")
    for scale, style, steps in product(SCALES, styles.values(), GRID_STEPS):
        images += generate(loras=[style], style_scale=scale, steps=steps)
    grid(images, len(styles) * len(GRID_STEPS)).save(ROOT / "docs" / "styles.webp", quality=92)


if __name__ == "__main__":
    main()
