"""How well the miniature follows prompts: what was said is there, and the image looks whole; by the judge,
for every way to sample it."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler

from fewstep.evaluation.generate import SEED, Generate, Sampler, ddim, few_steps, spaced
from fewstep.evaluation.metrics import kernel_distance, precision_recall, wilson_interval
from fewstep.evaluation.tables import markdown
from fewstep.generation.pipeline import Pipeline
from fewstep.miniature.next_judge import NextJudge, right_attributes
from fewstep.miniature.next_world.dataset import draw_many
from fewstep.miniature.next_world.scenes import NextScene, Said, draw_scenes, say
from fewstep.miniature.vae import reconstruct
from fewstep.miniature.world.dataset import Images
from fewstep.models.load import Diffusion

logger = logging.getLogger(__name__)

TEACHER_STEPS, TEACHER_GUIDANCE = 50, 3.0
STEPS = (1, 2, 4, 8)
PROBES = 60  # images by which the better spacing is chosen
MakeSampler: TypeAlias = Callable[[Diffusion, float, str], Sampler]  # with a guidance and a spacing


def asked(count: int, seed: int = 0) -> tuple[list[NextScene], list[Said]]:
    """Return `count` combinations that the base never saw, and a caption of each: of every other all of it,
    of the rest with about half of it left open."""
    scenes, rng = draw_scenes(count, seed, reserved=True), random.Random(seed)
    return scenes, [say(scene, rng, complete=i % 2 == 0) for i, scene in enumerate(scenes)]


@dataclass(frozen=True)
class NextScore:
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


class NextEvaluator:
    """A judge that is shown one image of each of `said`, captions of `scenes`, `side` px square."""

    def __init__(
        self, judge: NextJudge, scenes: Sequence[NextScene], said: Sequence[Said], side: int
    ) -> None:
        self.judge, self.scenes, self.said, self.side = judge, list(scenes), list(said), side
        self.prompts = [one.text for one in said]
        self._drawn = judge.looks.describe(draw_many(self.scenes, 2 * 10**9, side, side))

    def first(self, count: int) -> NextEvaluator:
        """Return the same for the first `count` captions."""
        return NextEvaluator(self.judge, self.scenes[:count], self.said[:count], self.side)

    def right(self, images: Images) -> npt.NDArray[np.bool_]:
        """Return which images are right in all that was said and look whole, bool (N,)."""
        attributes = right_attributes(self.judge.reader.read(images), self.scenes, self.said)
        both: npt.NDArray[np.bool_] = np.all([*attributes.values(), self.judge.looks.look(images) > 0], 0)
        return both

    def score(self, system: str, images: Images) -> NextScore:
        """Judge `images`."""
        attributes = right_attributes(self.judge.reader.read(images), self.scenes, self.said)
        whole = self.judge.looks.look(images) > 0
        right = np.all([*attributes.values(), whole], 0)
        low, high = wilson_interval(int(right.sum()), len(right))
        seen = self.judge.looks.describe(images)
        names = np.array([scene.things[0].name for scene in self.scenes])
        score = NextScore(
            system,
            len(right),
            {name: 100 * float(value.mean()) for name, value in attributes.items()},
            100 * float(whole.mean()),
            100 * float(right.mean()),
            (100 * low, 100 * high),
            kernel_distance(seen, self._drawn),
            *precision_recall(seen, self._drawn),
            {name: 100 * float(right[names == name].mean()) for name in sorted({*names})},
        )
        logger.info("%s: %.1f (%.1f to %.1f)", system, score.all_right, *score.interval)
        return score

    def generate_and_score(self, system: str, generate: Generate) -> NextScore:
        """Judge images of every prompt, each with its own seed."""
        return self.score(system, generate(self.prompts, range(SEED, SEED + len(self.prompts))))


def _solver(diffusion: Diffusion, guidance: float, spacing: str) -> Sampler:
    name, options = "DPM-Solver++", {"algorithm_type": "dpmsolver++"}
    return spaced(name, DPMSolverMultistepScheduler, diffusion, guidance, spacing, **options)


def better_spacing(some: NextEvaluator, how: MakeSampler, base: Diffusion, steps: int) -> Sampler:
    """Return the sampler with the timesteps by which more of some images are right: few steps are worth
    little with "leading" ones, as SDXL is published, which begin far below pure noise."""
    ways = [how(base, TEACHER_GUIDANCE, spacing) for spacing in ("trailing", "leading")]
    scores = [some.generate_and_score(way.name, partial(way.generate, steps=steps)) for way in ways]
    # Where neither is ever right, the nearer to drawings is the better.
    best = max(range(len(ways)), key=lambda i: (scores[i].all_right, -scores[i].distance))
    return ways[best]


def score_all(
    evaluator: NextEvaluator, pipeline: Pipeline, tiny: Pipeline, base: Diffusion, rivals: int
) -> list[NextScore]:
    """Return every row of the model card's table; the base's own samplers are asked for the first `rivals`
    of the captions only, since they evaluate it often."""
    side, some, probes = evaluator.side, evaluator.first(rivals), evaluator.first(min(PROBES, rivals))
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


def table(scores: Sequence[NextScore]) -> str:
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
