"""What the miniature's styles do on top of its LCM-LoRA: python -m fewstep.miniature.styling

Generates held-out captions in four steps at rising style_scale and writes styles/miniature/README.md with how
much of the style there is and how much of the prompt is still right; and docs/styles.webp, a grid like
Figure 3 of the LCM-LoRA report (arXiv 2311.05556): scales from top to bottom, steps from left to right.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fewstep.evaluation.figures import sheet
from fewstep.evaluation.generate import few_steps
from fewstep.evaluation.tables import ROOT, markdown
from fewstep.generation.pipeline import Pipeline, load_pipeline
from fewstep.lora.types import Lora
from fewstep.miniature.judge import Judge, load_judge
from fewstep.miniature.vae import reconstruct
from fewstep.miniature.world.dataset import draw_many
from fewstep.miniature.world.restyling import STYLES, StyleMeter, draw_restyled
from fewstep.miniature.world.scenes import ATTRIBUTES, Scene, complete_captions, unseen_scenes
from fewstep.models.specs import get_model
from fewstep.settings import Settings

SCALES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
GRID_STEPS = (1, 2, 4, 8)
GRID_PROMPT, GRID_SEED = "a red house in a meadow with mountains at sunset, in the middle", 3
CAPTIONS = 200

_CARD = """\
# Three styles for the miniature

Ordinary LoRAs of rank 8 on the base, trained by `scripts/build-miniature --from styles` on drawings that
`fewstep/miniature/world/restyling.py` restyles, with no knowledge of few steps. Licence: Apache-2.0.

    scripts/predict -i prompt="a red house in the snow at night" -i style=spotlight -i style_scale=1

Painted in four steps on top of the LCM-LoRA, {captions} captions of combinations that the base never saw.
*Style*: 0 as in plain drawings, 1 as in restyled ones, both after the VAE (a linear discriminant, in
restyling.py). *Right*: percent of pictures in which the judge reads right all that the style leaves alone:
{leaves}.

{table}
"""


@dataclass(frozen=True)
class StyleScore:
    """One cell pair of the table."""

    scale: float
    style: float  # 0: as plain drawings; 1: as restyled ones
    all_right: float  # percent, of the attributes that the style leaves alone


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
) -> list[StyleScore]:
    """Measure how a style and what it leaves alone come out, scale by scale."""
    # Fitted to drawings that went through the VAE, as all that is generated does.
    drawn, vae = unseen_scenes(drawings, seed=9), pipeline.diffusion.vae
    plain, styled = draw_many(drawn, 5, 128, 128), draw_restyled(name, drawn, 5, 128, 128)
    meter = StyleMeter(reconstruct(vae, plain), reconstruct(vae, styled))
    kept = [list(ATTRIBUTES).index(attribute) for attribute in STYLES[name].leaves]
    prompts, scores = complete_captions(scenes), []
    for scale in scales:
        generate = few_steps(
            pipeline, 4, f"{name} at {scale:g}", loras=[style], style=name, style_scale=scale
        )
        images = generate(prompts, range(len(prompts)))
        right = judge.score(images, scenes)[:, kept].all(1)
        scores.append(StyleScore(scale, float(meter(images).mean()), 100 * float(right.mean())))
    return scores


def main() -> None:
    """Score all styles in styles/miniature and write their card and their grid."""
    settings = Settings()
    pipeline = load_pipeline(get_model("miniature"), Settings(max_batch=25, dtype="fp32"))
    judge = load_judge(settings.weights_root / "miniature")
    folder = settings.styles_root / "miniature"
    styles = {name: load_style(pipeline, folder / f"{name}.safetensors") for name in STYLES}
    scenes = unseen_scenes(CAPTIONS)
    scores = {name: score_style(name, style, pipeline, judge, scenes) for name, style in styles.items()}
    rows = [
        [f"{row[0].scale:g}", *(f"{score.style:.2f} | {score.all_right:.1f}" for score in row)]
        for row in zip(*scores.values(), strict=True)
    ]
    head = ["style_scale", *(cell for name in scores for cell in (f"{name}: style", "right"))]
    leaves = ";\n".join(f"{name}: {', '.join(style.leaves)}" for name, style in STYLES.items())
    card = _CARD.format(captions=CAPTIONS, leaves=leaves, table=markdown(head, rows))
    (folder / "README.md").write_text(card)
    columns = [(style, steps) for style in styles.values() for steps in GRID_STEPS]
    images = [
        [
            few_steps(pipeline, steps, loras=[style], style="x", style_scale=scale)(
                [GRID_PROMPT], [GRID_SEED]
            )[0]
            for style, steps in columns
        ]
        for scale in SCALES
    ]
    sheet(images).save(ROOT / "docs" / "styles.webp", quality=92)


if __name__ == "__main__":
    main()
