"""What counts as right of what was said, and that broken drawings are other than whole ones."""

import numpy as np
import pytest
import torch

from fewstep.miniature.next_judge import PLACES, Looks, Reader, right_attributes
from fewstep.miniature.next_world.breaking import PUTS, SPOILS, draw_broken, draw_in_any_hand
from fewstep.miniature.next_world.drawing import draw
from fewstep.miniature.next_world.scenes import NextScene, Placed, Said, draw_scenes

FOX = NextScene((Placed("fox"),), "snow", "mountains", "night", "left")
BOTH = NextScene((Placed("car", "blue"), Placed("owl")), "meadow", "city", "day", "right")
EVERYTHING = frozenset({"ground", "backdrop", "sky", "position"})


def right(seen: NextScene, asked: NextScene, said: frozenset[str] = EVERYTHING) -> set[str]:
    """The attributes in which a picture that shows `seen` is right when `asked` was said."""
    found = right_attributes(np.array([seen.labels]), [asked], [Said("", said)])
    return {name for name, value in found.items() if value.all()}


ALL = EVERYTHING | {"things", "colours"}


def test_what_is_shown_as_it_was_said_is_right():
    assert right(FOX, FOX) == right(BOTH, BOTH) == ALL


@pytest.mark.parametrize(
    ("seen", "asked", "wrong"),
    [
        (
            NextScene((Placed("cat"),), "snow", "mountains", "night", "left"),
            FOX,
            {"things", "colours", "position"},
        ),
        (NextScene((Placed("fox"), Placed("owl")), "snow", "mountains", "night", "left"), FOX, {"things"}),
        (NextScene((Placed("fox"),), "snow", "mountains", "night", "right"), FOX, {"position"}),
        (NextScene((Placed("fox"),), "desert", "city", "day", "left"), FOX, {"ground", "backdrop", "sky"}),
        (
            NextScene((Placed("car", "red"), Placed("owl")), "meadow", "city", "day", "right"),
            BOTH,
            {"colours"},
        ),
        (
            NextScene((Placed("owl"), Placed("car", "blue")), "meadow", "city", "day", "right"),
            BOTH,
            {"position"},
        ),
        (NextScene((Placed("car", "blue"),), "meadow", "city", "day", "right"), BOTH, {"things"}),
    ],
)
def test_what_is_shown_otherwise_is_wrong_in_that(seen, asked, wrong):
    missing = ALL - right(seen, asked)
    assert wrong <= missing <= wrong | {"colours", "position"}


def test_what_was_left_open_may_be_anything():
    other = NextScene((Placed("fox"),), "desert", "city", "day", "middle")
    assert right(other, FOX, frozenset()) == ALL
    assert right(other, FOX, frozenset({"sky"})) == ALL - {"sky"}
    turned = NextScene((Placed("owl"), Placed("car", "blue")), "meadow", "city", "day", "right")
    assert right(turned, BOTH, EVERYTHING - {"position"}) == ALL


def test_a_colour_swapped_between_two_things_is_wrong():
    asked = NextScene((Placed("car", "blue"), Placed("tulip", "red")), "meadow", "city", "day", "left")
    seen = NextScene((Placed("car", "red"), Placed("tulip", "blue")), "meadow", "city", "day", "left")
    assert right(seen, asked) == ALL - {"colours"}


def test_the_networks_take_any_size_and_answer_for_every_label():
    reader, looks = Reader().eval(), Looks().eval()
    images = np.stack([np.asarray(draw(FOX, seed, 192, 80)) for seed in range(3)])
    labels = reader.read(images)
    assert labels.shape == (3, len(FOX.labels)) == (3, 2 * PLACES + 3)
    assert looks.look(images).shape == (3,) and looks.describe(images).shape == (3, 16 * 96)
    sizes = [row.shape[1] for row in reader(torch.zeros(1, 3, 128, 128))]
    assert all(
        label < size
        for scene in draw_scenes(300, 0, reserved=None, new=True)
        for label, size in zip(scene.labels, sizes, strict=True)
    )


@pytest.mark.parametrize("put", PUTS, ids=lambda put: put.__name__)
def test_a_thing_put_badly_is_another_image_in_the_same_place(put):
    for seed in range(3):
        whole, broken = (np.asarray(draw(FOX, seed, put=how), np.int16) for how in (None, put))
        differs = np.abs(whole - broken).max(2) > 30
        assert differs.mean() > 0.004, seed


@pytest.mark.parametrize("spoil", SPOILS, ids=lambda spoil: spoil.__name__)
def test_a_spoilt_image_is_far_from_the_drawing(spoil):
    drawn = draw(FOX, 1)
    others = [draw(BOTH, seed) for seed in range(3)]
    for seed in range(3):
        spoilt = spoil(np.random.default_rng(seed), drawn, others)
        assert spoilt.size == drawn.size
        assert np.abs(np.asarray(spoilt, np.int16) - np.asarray(drawn, np.int16)).mean() > 2, seed


def test_a_seed_breaks_a_drawing_in_one_way():
    for how in (draw_broken, draw_in_any_hand):
        first, again, other = (np.asarray(how(FOX, seed, 96, 96)) for seed in (4, 4, 5))
        assert np.array_equal(first, again) and not np.array_equal(first, other)
