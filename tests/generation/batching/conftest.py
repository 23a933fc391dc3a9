"""A batcher before a model that is none, since only the traffic matters here."""

import pytest
from traffic import Model, play

from fewstep.errors import GenerationError
from fewstep.generation.batcher import Batcher


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def batcher(model, request):
    """One before `model`; `traffic.options` gives it other options."""
    batcher = Batcher(model, **({"deadline_s": 20.0} | getattr(request, "param", {})))
    yield batcher
    model.gate.set()
    play(batcher.close())


@pytest.fixture
def failing(model):
    """`model`, which raises once its gate is open."""
    make = model.make

    def fail(requests, stopped):
        make(requests, stopped)
        raise GenerationError("the picture is not finite")

    model.make = fail
    return model
