"""The world: what is held out stays held out, and captions say what they mean."""

import random

import pytest

from fewstep.miniature.world import scenes
from fewstep.miniature.world.scenes import ATTRIBUTES, Scene, all_scenes, caption, training_scenes

RED_HOUSE = Scene("house", "red", "meadow", "mountains", "sunset", "middle")


def test_the_world_has_the_promised_size():
    assert len(scenes.OBJECTS) - 1 >= 8
    assert len(scenes.COLOURS) >= 8 and len(scenes.GROUNDS) >= 5 and len(scenes.SKIES) >= 6
    assert len(scenes.BACKDROPS) - 1 >= 5 and len(scenes.POSITIONS) >= 3
    assert len(set(all_scenes())) == 9 * 8 * 5 * 6 * 6 * 3


def test_the_base_never_sees_what_is_held_out():
    seen = training_scenes()
    assert not any(scene.object == "windmill" or scene.backdrop == "pyramids" for scene in seen)
    assert not set(seen) & set(scenes.unseen_scenes(1000))
    known = [scene for scene in all_scenes() if not scene.new_to_base]
    assert len(seen) / len(known) == pytest.approx(0.9, abs=0.01)


def test_every_single_attribute_of_a_test_scene_is_known_to_the_base():
    seen = training_scenes()
    known = [{scene.labels[i] for scene in seen} for i in range(len(ATTRIBUTES))]
    assert all(
        label in values
        for s in scenes.unseen_scenes(500)
        for label, values in zip(s.labels, known, strict=True)
    )


def test_labels_name_the_attributes():
    assert [names[i] for names, i in zip(ATTRIBUTES.values(), RED_HOUSE.labels, strict=True)] == [
        *("house", "red", "meadow", "mountains", "sunset", "middle")
    ]


def test_captions_vary_and_a_complete_one_says_everything():
    rng = random.Random(0)
    wordings = {caption(RED_HOUSE, rng, complete=True) for _ in range(200)}
    assert len(wordings) > 150
    for wording in wordings:
        assert any(word in wording for word in ("red", "crimson"))
        assert any(word in wording for word in ("house", "cottage"))
        assert any(word in wording for word in ("left", "middle", "cent"))
        assert any(word in wording for word in ("sunset", "dusk", "evening"))


def test_a_caption_never_names_another_scene():
    """No word of a colour, object or ground that is not the scene's: the judge would punish the reader."""
    rng = random.Random(1)
    for _ in range(300):
        text = caption(RED_HOUSE, rng).split(" ")
        assert not set(text) & (set(scenes.COLOURS) - {"red"})
        assert not set(text) & (set(scenes.OBJECTS) - {"house"})


def test_captions_are_clean_text():
    rng = random.Random(2)
    for scene in all_scenes()[::17]:
        text = caption(scene, rng)
        assert text == text.strip() and "  " not in text and " ," not in text
        assert not text.startswith((",", "."))
