"""How well the miniature follows prompts: what was said is there, and the image looks whole; by the judge,
for every way to sample it. Its model card and its manifest."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel

from fewstep.evaluation.generate import SEED, Generate, Sampler, ddim, few_steps, spaced
from fewstep.evaluation.metrics import kernel_distance, precision_recall, wilson_interval
from fewstep.evaluation.tables import markdown
from fewstep.generation.load import load_pipeline
from fewstep.generation.pipeline import Pipeline
from fewstep.miniature.base import TOKENS
from fewstep.miniature.judge import FILE, Judge, Seen, load_judge, right_attributes
from fewstep.miniature.vae import reconstruct
from fewstep.miniature.world.dataset import Images, draw_many
from fewstep.miniature.world.scenes import HELD_OUT_THINGS, Scene, say_half, unseen_scenes
from fewstep.miniature.world.things import THINGS
from fewstep.miniature.world.words import COLOURS
from fewstep.models.load import Diffusion
from fewstep.models.manifest import Origin, write_manifest
from fewstep.models.specs import get_model
from fewstep.settings import VAES, Settings
from fewstep.training.distill import LoraStudent
from fewstep.training.networks import load_base

logger = logging.getLogger(__name__)

TEACHER_STEPS, TEACHER_GUIDANCE = 50, 3.0  # of 2, 3 and 4 the one by which most are right
STEPS = (1, 2, 4, 8)
PROBES = 60  # images by which the better spacing is chosen
LICENCE = "Apache-2.0"
MakeSampler: TypeAlias = Callable[[Diffusion, float, str], Sampler]  # with a guidance and a spacing


@dataclass(frozen=True)
class Score:
    """Shares in percent of `images`: right in each attribute that was said, whole, and both; Wilson's 95 %
    interval of the latter; and how far the images are from drawings of the same scenes (KID, precision,
    recall)."""

    system: str
    images: int
    attributes: dict[str, float]
    whole: float
    all_right: float
    interval: tuple[float, float]
    distance: float
    precision: float
    recall: float
    by_thing: dict[str, float]


class Evaluator:
    """A judge that is shown one image of each of `scenes`, `side` px square, painted from a caption of it:
    of every other all of it is said, of the rest about half is left open."""

    def __init__(self, judge: Judge, scenes: Sequence[Scene], side: int = 256) -> None:
        self.judge, self.scenes, self.side = judge, list(scenes), side
        self.said = say_half(self.scenes)
        self.prompts = [one.text for one in self.said]

    @cached_property
    def _drawn(self) -> npt.NDArray[np.float64]:
        """Features of drawings of the same scenes, which distances compare with."""
        return self.judge.look(draw_many(self.scenes, 2 * 10**9, self.side, self.side)).features

    def first(self, count: int) -> Evaluator:
        """Return the same for the first `count` scenes."""
        return Evaluator(self.judge, self.scenes[:count], self.side)

    def attributes(self, seen: Seen) -> dict[str, npt.NDArray[np.bool_]]:
        """Return which images are right in each attribute that was said, bool (N,), by what was `seen`."""
        return right_attributes(seen.labels, self.scenes, self.said)

    def right(self, seen: Seen) -> npt.NDArray[np.bool_]:
        """Return which images are right in all that was said and look whole, bool (N,)."""
        both: npt.NDArray[np.bool_] = np.all([*self.attributes(seen).values(), seen.whole], 0)
        return both

    def measure(self, images: Images) -> dict[str, float]:
        """Return the percentage that is right and whole, and the distance to drawings."""
        seen = self.judge.look(images)
        distance = kernel_distance(seen.features, self._drawn)
        return {"all_right": 100 * float(self.right(seen).mean()), "distance": distance}

    def score(self, system: str, images: Images) -> Score:
        """Judge `images`."""
        seen = self.judge.look(images)
        right = self.right(seen)
        low, high = wilson_interval(int(right.sum()), len(right))
        names = np.array([scene.things[0].name for scene in self.scenes])
        score = Score(
            system,
            len(right),
            {name: 100 * float(value.mean()) for name, value in self.attributes(seen).items()},
            100 * float(seen.whole.mean()),
            100 * float(right.mean()),
            (100 * low, 100 * high),
            kernel_distance(seen.features, self._drawn),
            *precision_recall(seen.features, self._drawn),
            {name: 100 * float(right[names == name].mean()) for name in sorted({*names})},
        )
        logger.info("%s: %.1f (%.1f to %.1f)", system, score.all_right, *score.interval)
        return score

    def generate_and_score(self, system: str, generate: Generate) -> Score:
        """Judge images of every prompt, each with its own seed."""
        return self.score(system, generate(self.prompts, range(SEED, SEED + len(self.prompts))))


def _solver(diffusion: Diffusion, guidance: float, spacing: str) -> Sampler:
    name, options = "DPM-Solver++", {"algorithm_type": "dpmsolver++"}
    return spaced(name, DPMSolverMultistepScheduler, diffusion, guidance, spacing, **options)


def better_spacing(some: Evaluator, how: MakeSampler, base: Diffusion, steps: int) -> Sampler:
    """Return the sampler with the timesteps by which more of some images are right: few steps are worth
    little with "leading" ones, as SDXL is published, which begin far below pure noise."""
    ways = [how(base, TEACHER_GUIDANCE, spacing) for spacing in ("trailing", "leading")]
    scores = [some.generate_and_score(way.name, partial(way.generate, steps=steps)) for way in ways]
    # Where neither is ever right, the nearer to drawings is the better.
    best = max(range(len(ways)), key=lambda i: (scores[i].all_right, -scores[i].distance))
    return ways[best]


def score_all(
    evaluator: Evaluator, pipeline: Pipeline, tiny: Pipeline, base: Diffusion, base_captions: int
) -> list[Score]:
    """Return every row of the model card's table; the base's own samplers are asked for the first
    `base_captions` only, since they evaluate it often."""
    side, some = evaluator.side, evaluator.first(base_captions)
    probes = evaluator.first(min(PROBES, base_captions))
    drawn = draw_many(evaluator.scenes, 10**9, side, side)
    scores = [evaluator.score("drawings", drawn)]
    assert isinstance(base.vae, AutoencoderKL)
    scores.append(evaluator.score("VAE's reconstruction", reconstruct(base.vae, drawn)))
    for model, counts, more in ((pipeline, STEPS, ""), (tiny, (4,), ", tiny VAE")):
        for steps in counts:
            name = f"LCM-LoRA, {steps} step{'s' if steps > 1 else ''}{more}"
            scores.append(evaluator.generate_and_score(name, few_steps(model, steps, name)))
    for how in (ddim, _solver):
        for steps in STEPS:
            way = better_spacing(probes, how, base, steps)
            name = f"{way.name}, {steps} step{'s' if steps > 1 else ''}"
            scores.append(some.generate_and_score(name, partial(way.generate, steps=steps)))
    teacher = partial(ddim(base, TEACHER_GUIDANCE, "trailing").generate, steps=TEACHER_STEPS)
    scores.append(some.generate_and_score(f"teacher: DDIM, trailing, {TEACHER_STEPS} steps", teacher))
    return scores


def table(scores: Sequence[Score]) -> str:
    """Return them as Markdown, a row for each way to sample."""
    head = ["", *scores[0].attributes, "whole", "**all right**", "KID", "precision", "recall", "images"]
    rows = [
        [
            score.system,
            *(f"{value:.1f}" for value in (*score.attributes.values(), score.whole)),
            f"**{score.all_right:.1f}** ({score.interval[0]:.1f} to {score.interval[1]:.1f})",
            f"{score.distance:.3f}",
            f"{score.precision:.2f}",
            f"{score.recall:.2f}",
            str(score.images),
        ]
        for score in scores
    ]
    return markdown(head, rows)


def table_of_things(scores: Sequence[Score], systems: Sequence[str]) -> str:
    """Return as Markdown how often images of each thing are right and whole, for some of the rows."""
    chosen = [next(score for score in scores if score.system == system) for system in systems]
    rows = [
        [name, *(f"{score.by_thing[name]:.0f}" if name in score.by_thing else "" for score in chosen)]
        for name in scores[0].by_thing
    ]
    return markdown(["", *systems], rows)


def score_weights(weights: Path, captions: int, base_captions: int) -> list[Score]:
    """Return every row of the model card's table, of what lies in `weights`."""
    settings = Settings(weights_root=weights.parent, max_batch=25, verify="size", dtype="fp32")
    model = get_model("miniature")
    evaluator = Evaluator(load_judge(weights), unseen_scenes(captions), model.native_size)
    pipeline, tiny = (load_pipeline(model, replace(settings, vae=vae)) for vae in VAES)
    base = load_base("miniature", settings, pipeline.device)
    return score_all(evaluator, pipeline, tiny, base, base_captions)


def write_card(weights: Path, sizes: dict[str, Any], student: LoraStudent, scores: Sequence[Score]) -> None:
    """Write README.md and manifest.json into `weights`; `sizes` are of the build."""
    judge_sha256 = hashlib.sha256((weights / FILE).read_bytes()).hexdigest()
    unet = UNet2DConditionModel.from_pretrained(weights / "unet", use_safetensors=True)
    stages = "; ".join(
        f"{stage['steps']:,} steps of {stage['batch']} at {stage['side']} px" for stage in sizes["base"]
    )
    others = (f"{name.replace('_', ' ')} {count:,}" for name, count in sizes.items() if name != "base")
    shown = ("drawings", "LCM-LoRA, 4 steps", scores[-1].system) if scores else ()
    template = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    card = template.format(
        unet=unet.num_parameters() / 1e6,
        channels="/".join(map(str, unet.config.block_out_channels)),
        tokens=TOKENS,
        stages=stages,
        all_sizes=", ".join(others),
        sizes=sizes,
        student=student,
        k=1000 // student.solver_steps * student.skip,
        things_known=len(THINGS) - len(HELD_OUT_THINGS),
        colours=len(COLOURS),
        licence=LICENCE,
        judge=judge_sha256,
        guidance=TEACHER_GUIDANCE,
        table=table(scores) if scores else "",
        things=table_of_things(scores, shown) if scores else "",
    )
    (weights / "README.md").write_text(card)
    extra: dict[str, Any] = {"sizes": sizes, "student": asdict(student), "judge_sha256": judge_sha256}
    extra["scores"] = [asdict(score) for score in scores]
    origin = Origin("scripts/build-miniature", "3", LICENCE)
    write_manifest(weights, model="miniature", origin=origin, extra=extra)
