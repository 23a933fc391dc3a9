"""Inputs through a pipeline, as predict.py and the batcher take them there."""

from collections.abc import Callable, Sequence

import numpy as np

from fewstep.errors import FewstepError
from fewstep.generation.pipeline import GenerationResult, Pipeline
from fewstep.lora.types import Lora
from fewstep.request import Inputs


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
