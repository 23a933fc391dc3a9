"""The drawn styles: what they leave alone, and that the meter tells how much of one there is."""

import numpy as np
import pytest

from fewstep.miniature.judge import load_judge
from fewstep.miniature.world.dataset import draw_many
from fewstep.miniature.world.restyling import STYLES, StyleMeter, draw_restyled
from fewstep.miniature.world.scenes import ATTRIBUTES, unseen_scenes
from fewstep.settings import Settings

pytestmark = pytest.mark.slow

WEIGHTS = Settings().weights_root / "miniature"
SCENES = unseen_scenes(300, seed=9)


@pytest.fixture(scope="module")
def plain():
    return draw_many(SCENES, 5, 128, 128)


@pytest.fixture(scope="module", params=STYLES)
def styled(request):
    return request.param, draw_restyled(request.param, SCENES, 5, 128, 128)


def test_the_same_seed_draws_the_same_image_and_another_does_not(styled):
    name, images = styled
    assert np.array_equal(images[:3], draw_restyled(name, SCENES[:3], 5, 128, 128))
    assert not np.array_equal(images[:3], draw_restyled(name, SCENES[:3], 6, 128, 128))
    assert draw_restyled(name, SCENES[:2], 5, 192, 80).shape == (2, 80, 192, 3)


def test_the_judge_still_reads_what_a_style_leaves_alone(styled):
    name, images = styled
    read = dict(zip(ATTRIBUTES, load_judge(WEIGHTS).score(images, SCENES).mean(0), strict=True))
    assert {attribute for attribute, share in read.items() if share >= 0.98} >= set(STYLES[name].leaves)


def test_the_meter_tells_how_much_of_a_style_images_have(styled, plain):
    _, images = styled
    meter = StyleMeter(plain[:200], images[:200])
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    found = []
    for share in shares:  # images that it has not seen, ever more of their styled selves
        mixed = (1 - share) * plain[200:] + share * images[200:]
        found.append(meter(mixed.round().astype(np.uint8)).mean())
    assert found == sorted(found)
    assert abs(found[0]) < 0.1 and abs(found[-1] - 1) < 0.15


def test_the_meter_of_one_style_does_not_take_another_for_it(plain):
    card, gold = (draw_restyled(name, SCENES, 5, 128, 128) for name in ("postcard", "golden-hour"))
    meter = StyleMeter(plain[:200], gold[:200])
    assert meter(card[200:]).mean() < 0.2
