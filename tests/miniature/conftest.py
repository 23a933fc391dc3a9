"""The committed judge and pipeline, loaded once for all tests of the miniature."""

import pytest

from fewstep.generation.load import load_pipeline
from fewstep.miniature.judge import load_judge
from fewstep.models.specs import get_model
from fewstep.settings import Settings


@pytest.fixture(scope="session")
def judge():
    return load_judge(Settings().weights_root / "miniature")


@pytest.fixture(scope="session")
def pipeline():
    return load_pipeline(get_model("miniature"), Settings(max_batch=32))
