import pytest
from loras import FOLDER, LORA, load_model

from fewstep.lora.merge import NETWORKS, WeightMerger
from fewstep.lora.types import Mix


@pytest.fixture(scope="module")
def model():
    return load_model()


@pytest.fixture
def adapters(model):
    found = WeightMerger(FOLDER, {name: getattr(model, name) for name in NETWORKS["sdxl"]})
    found.lcm_lora = found.read(LORA, "lcm")
    yield found
    found.apply(Mix(lcm_scale=0))  # the model is everybody's
