"""How well the miniature follows prompts, by the judge: what was said is there, and the image looks whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fewstep.evaluation.generate import SEED, Generate
from fewstep.evaluation.metrics import kernel_distance, precision_recall, wilson_interval
from fewstep.miniature.next_build import draw_many
from fewstep.miniature.next_judge import NextJudge, right_attributes
from fewstep.miniature.next_world.scenes import NextScene, Said
from fewstep.miniature.world.dataset import Images


@dataclass(frozen=True)
class NextScore:
    """Shares in percent: right in each attribute that was said, whole, and both; Wilson's 95 % interval of
    the latter; and how far the images are from drawings of the same scenes (KID, precision, recall)."""

    system: str
    attributes: dict[str, float]
    whole: float
    all_right: float
    interval: tuple[float, float]
    distance: float
    precision: float
    recall: float
    by_thing: dict[str, float]


class NextEvaluator:
    """A judge that is shown one image of each of `said`, captions of `scenes`."""

    def __init__(
        self, judge: NextJudge, scenes: Sequence[NextScene], said: Sequence[Said], side: int
    ) -> None:
        self.judge, self.scenes, self.said = judge, list(scenes), list(said)
        self.prompts = [one.text for one in said]
        self._drawn = judge.looks.describe(draw_many(self.scenes, 2 * 10**9, side, side))

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
        return NextScore(
            system,
            {name: 100 * float(value.mean()) for name, value in attributes.items()},
            100 * float(whole.mean()),
            100 * float(right.mean()),
            (100 * low, 100 * high),
            kernel_distance(seen, self._drawn),
            *precision_recall(seen, self._drawn),
            {name: 100 * float(right[names == name].mean()) for name in sorted({*names})},
        )

    @torch.inference_mode()
    def generate_and_score(self, system: str, generate: Generate) -> NextScore:
        """Judge images of every prompt, each with its own seed."""
        return self.score(system, generate(self.prompts, range(SEED, SEED + len(self.prompts))))
