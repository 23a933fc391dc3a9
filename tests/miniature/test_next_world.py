"""The world of the next miniature: its things, its scenes, how they are said, and how they are drawn."""

import random
from collections import Counter

import numpy as np

from fewstep.miniature.next_world.drawing import draw
from fewstep.miniature.next_world.scenes import (
    HELD_OUT_BACKDROP,
    HELD_OUT_THINGS,
    NextScene,
    Placed,
    caption,
    draw_scenes,
    say_all,
)
from fewstep.miniature.next_world.things import CELL, OWN, SHEETS, THINGS, picture
from fewstep.miniature.next_world.words import ATTRIBUTES, WORDS

FOX = NextScene((Placed("fox"),), "snow", "mountains", "night", "left")
TWO = NextScene((Placed("car", "blue"), Placed("owl")), "meadow", "city", "day", "right")


def test_the_sheet_is_small_and_holds_every_thing_cut_out():
    assert sum(sheet.stat().st_size for sheet in SHEETS.values()) < 1_000_000
    for name in THINGS:
        cut = picture(name)
        alpha = np.asarray(cut.getchannel("A"))
        assert CELL * 0.9 < max(cut.size) <= CELL and (alpha > 250).mean() > 0.15, name
        # All four edges touch something, and the corners of most are empty: nothing of a neighbour is seen.
        assert all(edge.any() for edge in (alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1])), name


def test_every_colour_of_a_thing_looks_another_and_leaves_its_outline():
    for name, thing in THINGS.items():
        seen = [np.asarray(picture(name, colour), np.int16) for colour in thing.colours]
        for i, one in enumerate(seen):
            assert np.array_equal(one[..., 3], seen[0][..., 3])
            opaque = one[..., 3] > 200
            for other in seen[:i]:
                changed = np.abs(one - other)[..., :3].max(-1)[opaque] > 24
                natural = other is seen[0]  # a red car is red by itself
                assert natural or changed.mean() > 0.08, (name, thing.colours[i])


def test_one_seed_draws_one_image_and_another_seed_another():
    first, again, other = (np.asarray(draw(FOX, seed, 128, 128)) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert draw(TWO, 3, 192, 80).size == (192, 80)


def test_things_stand_where_the_scene_says():
    """Two scenes that differ in a thing differ where it stands, by the mean of many drawings."""
    other = NextScene((Placed("owl"),), "snow", "mountains", "night", "left")
    for place, middle in {"left": 0.29, "middle": 0.50, "right": 0.71}.items():
        one, two = (NextScene(scene.things, "snow", "hills", "day", place) for scene in (FOX, other))
        means = [np.mean([np.asarray(draw(scene, i), float) for i in range(40)], 0) for scene in (one, two)]
        differs = np.square(means[0] - means[1]).mean((0, 2))
        centre = (differs * np.arange(256)).sum() / differs.sum() / 256
        assert abs(centre - middle) < 0.06, place
    assert [*TWO.places] == ["right", "left"]


def test_labels_say_what_stands_where():
    labels = FOX.labels
    names = list(THINGS)
    assert labels[:3] == (1 + names.index("fox"), 0, 0) and labels[3:6] == (1, 0, 0)
    assert labels[6:] == tuple(
        ATTRIBUTES[name].index(getattr(FOX, name)) for name in ("ground", "backdrop", "sky")
    )
    assert TWO.labels[:3] == (1 + names.index("owl"), 0, 1 + names.index("car"))


def test_training_sees_neither_what_is_held_out_nor_what_is_reserved_and_tests_only_that():
    training, tests = draw_scenes(3000, 1), draw_scenes(300, 2, reserved=True)
    assert not any(scene.reserved or scene.new_to_base for scene in training)
    assert all(scene.reserved and not scene.new_to_base for scene in tests)
    anything = draw_scenes(3000, 3, reserved=None, new=True)
    assert 0.07 < np.mean([scene.reserved for scene in anything]) < 0.13
    seen = {thing.name for scene in training for thing in scene.things}
    assert seen == set(THINGS) - set(HELD_OUT_THINGS)
    assert HELD_OUT_BACKDROP in {scene.backdrop for scene in anything}
    counts = Counter(scene.things[0].name for scene in training)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_about_half_is_left_open_but_never_a_colour_that_is_not_the_things_own():
    rng, said = random.Random(0), Counter[str]()
    scenes = draw_scenes(3000, 4)
    for scene in scenes:
        text = caption(scene, rng)
        for name, values in ATTRIBUTES.items():
            words = WORDS[name][getattr(scene, name)]
            said[name] += any(word in text for word in words)
            assert getattr(scene, name) in values
        for thing in scene.things:
            assert any(word in text for word in THINGS[thing.name].words)
            if thing.colour != OWN:
                assert any(word in text for word in WORDS["colour"][thing.colour])
    shares = {name: count / len(scenes) for name, count in said.items()}
    assert all(0.35 < share < 0.70 for share in shares.values()), shares
    for scene, said_of in zip(scenes, say_all(scenes, complete=True), strict=True):
        text = said_of.text
        assert said_of.attributes == set(ATTRIBUTES)
        assert all(
            any(word in text for word in WORDS[name][getattr(scene, name)])
            for name in ("ground", "backdrop", "sky")
        )
