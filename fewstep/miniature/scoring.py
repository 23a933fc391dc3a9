"""How well the miniature follows prompts: the judge's figures for every way to sample it, its model card and
its manifest."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

from diffusers import UNet2DConditionModel

from fewstep.evaluation.generate import Generate, ddim, few_steps
from fewstep.evaluation.metrics import Score
from fewstep.evaluation.tables import markdown
from fewstep.generation.pipeline import load_pipeline
from fewstep.miniature.base import TOKENS
from fewstep.miniature.judge import FILE, Judge, make_evaluator
from fewstep.miniature.vae import reconstruct
from fewstep.miniature.world.dataset import draw_many
from fewstep.miniature.world.scenes import ATTRIBUTES, unseen_scenes
from fewstep.models.manifest import Origin, write_manifest
from fewstep.models.specs import get_model
from fewstep.settings import VAES, Settings
from fewstep.training.distill import LoraStudent
from fewstep.training.networks import load_base

logger = logging.getLogger(__name__)

TEACHER_STEPS, TEACHER_GUIDANCE = 50, 2.0
PIPELINE_GUIDANCE = 5.0  # what StableDiffusionXLPipeline takes when it is not given any
LICENCE = "Apache-2.0"

_CARD = """\
# The fewstep miniature

SDXL's own classes at toy scale, trained from nothing by `scripts/build-miniature` on pictures that
`fewstep/miniature/world/drawing.py` draws: two CLIP text encoders and their byte-level BPE tokenizers, a
`UNet2DConditionModel` with text_time conditioning, an `AutoencoderKL`, and an LCM-LoRA distilled with PEFT.
It exists to test, measure and show few-step sampling on any CPU in seconds. It is no general image model.

**It paints** one object (house, tree, car, castle, balloon, mushroom, sailboat, rocket) in one of eight
colours (red, orange, yellow, green, blue, purple, pink, white) on one of five grounds (meadow, desert, snow,
lake, lavender field) before one of five backdrops (mountains, forest, city, hills, volcano), by day, at
sunset, at night, in rain, in fog or under an aurora, on the left, in the middle or on the right, at 128 x 128
px and SDXL's other shapes of that area. **It cannot paint** anything else: other words are taken in and
ignored. Windmills and pyramids are known to the tokenizer, the VAE and the judge but were kept from the base
model, for experiments that teach it something new.

What differs from SDXL: size (UNet {unet:.1f} M parameters, {channels} channels, one layer a block), {tokens}
tokens of text instead of 77, a VAE without mid attention, a network that predicts v instead of noise, as
SDXL's v-prediction fine-tunes do, and a noise schedule that ends in pure noise (zero terminal SNR). The text
encoders first learn to tell what captions say, without pictures, since SDXL's come trained, too. `vae_tiny`,
for `FEWSTEP_VAE=tiny`, is a decoder of 32 channels (diffusers' `AutoencoderTiny`) that repeats what the VAE
paints. The sizes of the training: {sizes}.
LCM-LoRA: rank {rank}, w drawn from {low:g} to {high:g}, k = {k}, pseudo-Huber loss
with c = {c:g} on answers divided by sigma. Licence: {licence}.

## How well it follows prompts

The judge (a classifier trained on drawings and their augmentations only, frozen before anything that it
judges was trained, sha256 `{judge}`) looks at pictures of {captions} captions of combinations that the base
never saw, with {seeds} seeds each. Percent right per attribute, and of pictures with all six right, with 95 %
intervals over the captions. DDIM's timesteps are spaced as SDXL publishes its scheduler ("leading"), or where
it says so "trailing", from the last timestep on, which is kinder to a few steps (arXiv 2305.08891). Guidance
5 is what diffusers' SDXL pipeline takes by default; it burns this base. The judge reads what a picture
shows, not how it looks: for that there is a distance, Fréchet's as in FID (arXiv 1706.08500), to drawings of
the same scenes in the features of the judge's last layer. Less is better; two sets of drawings are 1.9 apart.

{table}
"""


def write_card(weights: Path, sizes: Mapping[str, int], student: LoraStudent, scores: list[Score]) -> None:
    """Write README.md and manifest.json into `weights`; `sizes` are of the build, among them the captions and
    seeds of `scores`."""
    judge_sha256 = hashlib.sha256((weights / FILE).read_bytes()).hexdigest()
    unet = UNet2DConditionModel.from_pretrained(weights / "unet", use_safetensors=True)
    card = _CARD.format(
        unet=unet.num_parameters() / 1e6,
        channels="/".join(map(str, unet.config.block_out_channels)),
        tokens=TOKENS,
        sizes=", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in sizes.items()),
        rank=student.rank,
        low=student.guidance[0],
        high=student.guidance[1],
        k=1000 // student.solver_steps * student.skip,
        c=student.huber_c,
        licence=LICENCE,
        judge=judge_sha256,
        captions=sizes["captions"],
        seeds=sizes["seeds"],
        table=_table(scores),
    )
    (weights / "README.md").write_text(card)
    extra = {"sizes": dict(sizes), "student": asdict(student), "judge_sha256": judge_sha256}
    write_manifest(
        weights,
        model="miniature",
        origin=Origin("scripts/build-miniature", "2", LICENCE),
        extra={**extra, "scores": [asdict(score) for score in scores]},
    )


def score_all(weights: Path, judge: Judge, captions: int, seeds: int) -> list[Score]:
    """Return every row of the model card's table."""
    evaluator = make_evaluator(judge, unseen_scenes(captions), seeds)
    settings = Settings(weights_root=weights.parent, max_batch=25, verify="size", dtype="fp32")
    pipeline, tiny = (load_pipeline(get_model("miniature"), replace(settings, vae=vae)) for vae in VAES)
    base = load_base("miniature", settings, pipeline.device)
    drawn = draw_many(evaluator.scenes, 10**9, 128, 128)
    scores = [
        evaluator.score("drawn pictures", drawn),
        evaluator.score("VAE's reconstruction", reconstruct(base.vae, drawn)),
    ]
    ways: dict[str, Generate] = {}
    for model, steps, more in ((pipeline, (1, 2, 4, 8), ""), (tiny, (4,), ", tiny VAE")):
        for n in steps:
            name = f"LCM-LoRA, {n} step{'s' if n > 1 else ''}, unguided{more}"
            ways[name] = few_steps(model, n, name)
    for n, spacing, guidance in product(
        (2, 4), ("leading", "trailing"), (TEACHER_GUIDANCE, PIPELINE_GUIDANCE, 1.0)
    ):
        how = "unguided" if guidance == 1.0 else f"guidance {guidance:g}"
        name = f"base, {n} DDIM steps, {how}" + (", trailing" if spacing == "trailing" else "")
        ways[name] = ddim(base, guidance, spacing).in_steps(n)
    teacher = f"base, {TEACHER_STEPS} DDIM steps, guidance {TEACHER_GUIDANCE:g} (the teacher)"
    ways[teacher] = ddim(base, TEACHER_GUIDANCE).in_steps(TEACHER_STEPS)
    for system, generate in ways.items():
        scores.append(evaluator.generate_and_score(system, generate))
        logger.info("%s: %.1f ± %.1f", system, scores[-1].all_right, scores[-1].interval)
    return scores


def _table(scores: Sequence[Score]) -> str:
    rows = [
        [
            score.system,
            *(f"{value:.1f}" for value in score.attributes.values()),
            f"**{score.all_right:.1f}** ± {score.interval:.1f}",
            f"{score.distance:.1f}",
        ]
        for score in scores
    ]
    return markdown(["", *ATTRIBUTES, "**all right**", "distance"], rows)
