"""The miniature as most of these tests take it, loaded once."""

import pytest
from small import MINIATURE

from fewstep.generation.load import load_pipeline
from fewstep.generation.pipeline import Pipeline
from fewstep.settings import Settings


@pytest.fixture(scope="session")
def miniature() -> Pipeline:
    """In fp32, in which images of other batch sizes are nearest to each other on any CPU."""
    return load_pipeline(MINIATURE, Settings(dtype="fp32"))
