"""Drawings: seeded, of any size, and of what the scene says."""

import numpy as np
import pytest

from fewstep.miniature.world.canvas import PALETTE
from fewstep.miniature.world.drawing import PLACES, draw
from fewstep.miniature.world.scenes import ATTRIBUTES, Scene, all_scenes

SCENE = Scene("car", "red", "snow", "hills", "day", "left")


def pixels(scene: Scene, seed: int = 0, width: int = 128, height: int = 128) -> np.ndarray:
    return np.asarray(draw(scene, seed, width, height)).astype(int)


def test_a_seed_draws_one_image_and_another_seed_another():
    assert np.array_equal(pixels(SCENE, 1), pixels(SCENE, 1))
    assert np.abs(pixels(SCENE, 1) - pixels(SCENE, 2)).mean() > 2


@pytest.mark.parametrize("size", [(128, 128), (192, 80), (80, 192), (64, 64)])
def test_any_size_is_drawn(size):
    assert draw(SCENE, 0, *size).size == size


def test_every_attribute_value_changes_the_image():
    for scene in all_scenes()[:: len(all_scenes()) // 60]:
        assert pixels(scene).std() > 10


@pytest.mark.parametrize("colour", ATTRIBUTES["colour"])
@pytest.mark.parametrize("name", ATTRIBUTES["object"])
def test_the_object_has_its_colour_and_stands_in_its_place(name, colour):
    ground = "lake" if colour in ("orange", "yellow", "red") else "desert"  # of other colours than the object
    columns = []
    for position in ("left", "middle", "right"):
        scene = Scene(name, colour, ground, "hills", "day", position)
        generated = np.abs(pixels(scene, 3)[40:120] - PALETTE["paint"][colour]).max(2) < 40
        assert generated.sum() > 150
        columns.append(np.median(np.nonzero(generated)[1]) / 128)
    left, middle, right = columns
    apart = PLACES["right"] - PLACES["middle"]
    assert middle - left > apart / 2 and right - middle > apart / 2
