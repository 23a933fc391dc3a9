"""Inputs through a pipeline, as predict.py and the batcher take them there."""

from collections.abc import Callable, Sequence

import numpy as np
from small import MINIATURE

from fewstep.errors import FewstepError
from fewstep.generation.pipeline import GenerationResult, Pipeline
from fewstep.lora.types import Lora
from fewstep.request import Inputs

MATES = (
    "a blue car on the left",
    "a white castle in the snow at night",
    "a pink tulip",
    "a green rocket in the rain",
)


def wish(prompt="a red house in a meadow with mountains at sunset", seed=7, **inputs) -> Inputs:
    return Inputs.create(MINIATURE, prompt=prompt, seed=seed, **inputs)


def results_of(
    pipeline: Pipeline,
    *inputs: Inputs,
    loras: Sequence[Lora] = (),
    stopped: Callable[[], bool] = lambda: False,
) -> list[GenerationResult | FewstepError]:
    """What one batch of `inputs` comes to, each with the same styles."""
    return pipeline.generate([pipeline.encode(pipeline.request(each, loras)) for each in inputs], stopped)


def pixels_of(pipeline: Pipeline, *inputs: Inputs, loras: Sequence[Lora] = ()) -> list[np.ndarray]:
    """All images of a batch; none of its requests may fail."""
    results = results_of(pipeline, *inputs, loras=loras)
    assert all(isinstance(result, GenerationResult) for result in results), results
    return [np.asarray(image, dtype=int) for result in results for image in result.images]
