"""How well the miniature follows prompts: the judge's figures for every way to sample it, its model card and
its manifest."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from diffusers import UNet2DConditionModel

from fewstep.evaluation.generate import Generate, ddim, few_steps
from fewstep.evaluation.tables import markdown
from fewstep.generation.load import load_pipeline
from fewstep.miniature.base import TOKENS
from fewstep.miniature.judge import FILE, Evaluator, Judge, Score
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


def write_card(weights: Path, sizes: Mapping[str, int], student: LoraStudent, scores: list[Score]) -> None:
    """Write README.md and manifest.json into `weights`; `sizes` are of the build, among them the captions and
    seeds of `scores`."""
    judge_sha256 = hashlib.sha256((weights / FILE).read_bytes()).hexdigest()
    unet = UNet2DConditionModel.from_pretrained(weights / "unet", use_safetensors=True)
    rows = [
        [
            score.system,
            *(f"{value:.1f}" for value in score.attributes.values()),
            f"**{score.all_right:.1f}** ± {score.interval:.1f}",
            f"{score.distance:.1f}",
        ]
        for score in scores
    ]
    template = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    card = template.format(
        unet=unet.num_parameters() / 1e6,
        channels="/".join(map(str, unet.config.block_out_channels)),
        tokens=TOKENS,
        all_sizes=", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in sizes.items()),
        sizes=sizes,
        student=student,
        k=1000 // student.solver_steps * student.skip,
        licence=LICENCE,
        judge=judge_sha256,
        table=markdown(["", *ATTRIBUTES, "**all right**", "distance"], rows),
    )
    (weights / "README.md").write_text(card)
    extra: dict[str, Any] = {"sizes": dict(sizes), "student": asdict(student), "judge_sha256": judge_sha256}
    extra["scores"] = [asdict(score) for score in scores]
    origin = Origin("scripts/build-miniature", "2", LICENCE)
    write_manifest(weights, model="miniature", origin=origin, extra=extra)


def score_all(weights: Path, judge: Judge, captions: int, seeds: int) -> list[Score]:
    """Return every row of the model card's table."""
    evaluator = Evaluator(judge, unseen_scenes(captions), seeds)
    settings = Settings(weights_root=weights.parent, max_batch=25, verify="size", dtype="fp32")
    pipeline, tiny = (load_pipeline(get_model("miniature"), replace(settings, vae=vae)) for vae in VAES)
    base = load_base("miniature", settings, pipeline.device)
    drawn = draw_many(evaluator.scenes, 10**9, 128, 128)
    decoded = reconstruct(base.vae, drawn)
    scores = [evaluator.score("drawn pictures", drawn), evaluator.score("VAE's reconstruction", decoded)]
    ways: dict[str, Generate] = {}
    for model, steps, more in ((pipeline, (1, 2, 4, 8), ""), (tiny, (4,), ", tiny VAE")):
        for n in steps:
            name = f"LCM-LoRA, {n} step{'s' if n > 1 else ''}, unguided{more}"
            ways[name] = few_steps(model, n, name)
    guidances = (TEACHER_GUIDANCE, PIPELINE_GUIDANCE, 1.0)
    for n, spacing, guidance in product((2, 4), ("leading", "trailing"), guidances):
        how = "unguided" if guidance == 1.0 else f"guidance {guidance:g}"
        name = f"base, {n} DDIM steps, {how}" + (", trailing" if spacing == "trailing" else "")
        ways[name] = partial(ddim(base, guidance, spacing).generate, steps=n)
    teacher = f"base, {TEACHER_STEPS} DDIM steps, guidance {TEACHER_GUIDANCE:g} (the teacher)"
    ways[teacher] = partial(ddim(base, TEACHER_GUIDANCE).generate, steps=TEACHER_STEPS)
    for system, generate in ways.items():
        scores.append(evaluator.generate_and_score(system, generate))
        logger.info("%s: %.1f ± %.1f", system, scores[-1].all_right, scores[-1].interval)
    return scores
