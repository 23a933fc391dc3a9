"""The miniature as most of these tests take it, loaded once."""

import pytest

from fewstep.generation.load import load_pipeline
from fewstep.generation.pipeline import Pipeline
from fewstep.models.specs import get_model
from fewstep.settings import Settings


@pytest.fixture(scope="session")
def miniature() -> Pipeline:
    """In fp32, in which images of other batch sizes are nearest to each other on any CPU."""
    return load_pipeline(get_model("miniature"), Settings(dtype="fp32"))
