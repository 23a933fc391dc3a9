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

from PIL import Image
from tqdm import tqdm

from fewstep.generation.pipeline import Pipeline, load_pipeline
from fewstep.lora.types import Lora
from fewstep.miniature.judge import Judge, load_judge, score
from fewstep.miniature.scoring import held_out_captions, reconstruct
from fewstep.miniature.showcase import grid
from fewstep.miniature.world.dataset import draw_many
from fewstep.miniature.world.restyling import STYLES, StyleMeter, draw_restyled
from fewstep.miniature.world.scenes import ATTRIBUTES, Scene, unseen_scenes
from fewstep.models.specs import get_model
from fewstep.settings import Settings

SCALES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
GRID_STEPS = (1, 2, 4, 8)
GRID_PROMPT, GRID_SEED = "a red house in a meadow with mountains at sunset, in the middle", 3
BATCH = 25
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
    """The style in `path`, as a request carries it."""
    return pipeline.adapters.read(path, hashlib.sha256(path.read_bytes()).hexdigest())


def generate_styled(
    pipeline: Pipeline, prompts: Sequence[str], style: Lora, scale: float, *, steps: int = 4, seed: int = 0
) -> list[Image.Image]:
    """One image of each prompt, the i-th with seed `seed + i`."""
    images: list[Image.Image] = []
    for start in range(0, len(prompts), BATCH):
        together = prompts[start : start + BATCH]
        seeds = range(seed + start, seed + start + len(together))
        images += pipeline.images(together, seeds, loras=[style], style="x", style_scale=scale, steps=steps)
    return images


def meter_of(name: str, pipeline: Pipeline, drawings: int) -> StyleMeter:
    """Fitted to drawings that went through the VAE, as all that is generated does."""
    scenes, vae = unseen_scenes(drawings, seed=9), pipeline.diffusion.vae
    plain, styled = draw_many(scenes, 5, 128, 128), draw_restyled(name, scenes, 5, 128, 128)
    return StyleMeter(reconstruct(vae, plain), reconstruct(vae, styled))


def score_style(
    name: str,
    style: Lora,
    pipeline: Pipeline,
    judge: Judge,
    scenes: Sequence[Scene],
    prompts: Sequence[str],
    scales: Sequence[float] = SCALES,
    drawings: int = 400,
) -> list[StyleScore]:
    """How the style and what it leaves alone come out, scale by scale."""
    meter, kept = (
        meter_of(name, pipeline, drawings),
        [list(ATTRIBUTES).index(one) for one in STYLES[name].leaves],
    )
    scores = []
    for scale in tqdm(scales, name):
        images = generate_styled(pipeline, prompts, style, scale)
        right = score(judge, images, scenes)[:, kept].all(1)
        scores.append(StyleScore(scale, float(meter(images).mean()), 100 * float(right.mean())))
    return scores


def main() -> None:
    """Score all styles in styles/miniature and write their card and their grid."""
    settings = Settings()
    pipeline = load_pipeline(get_model("miniature"), Settings(max_batch=BATCH, dtype="fp32"))
    judge = load_judge(settings.weights_root / "miniature" / "judge" / "judge.safetensors")
    scenes, prompts = held_out_captions(CAPTIONS)
    folder = settings.styles_root / "miniature"
    styles = {name: load_style(pipeline, folder / f"{name}.safetensors") for name in STYLES}
    found = {
        name: score_style(name, style, pipeline, judge, scenes, prompts) for name, style in styles.items()
    }
    leaves = ";\n".join(f"{name}: {', '.join(style.leaves)}" for name, style in STYLES.items())
    card = _CARD.format(captions=CAPTIONS, leaves=leaves, table=_table(found))
    (folder / "README.md").write_text(card)
    docs = Path(__file__).resolve().parents[2] / "docs"
    _grid(pipeline, list(styles.values())).save(docs / "styles.webp", quality=92)


def _table(found: dict[str, list[StyleScore]]) -> str:
    head = ["style_scale", *(f"{name}: style | right" for name in found)]
    lines = [f"| {' | '.join(head)} |", "|" + "---:|" * (1 + 2 * len(found))]
    for row in zip(*found.values(), strict=True):
        cells = (f"{one.style:.2f} | {one.all_right:.1f}" for one in row)
        lines.append(f"| {row[0].scale:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _grid(pipeline: Pipeline, styles: Sequence[Lora]) -> Image.Image:
    rows = [
        [
            generate_styled(pipeline, [GRID_PROMPT], style, scale, steps=steps, seed=GRID_SEED)[0]
            for style in styles
            for steps in GRID_STEPS
        ]
        for scale in SCALES
    ]
    return grid([image for row in rows for image in row], len(rows[0]))


if __name__ == "__main__":
    main()
