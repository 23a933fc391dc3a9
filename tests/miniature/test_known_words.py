"""The miniature's list of words: made from its world's wordings, and the committed one is of its world."""

import json
import random
from pathlib import Path

from fewstep.miniature.vocabulary import NEIGHBOURS, neighbours, world_words, write_vocabulary
from fewstep.miniature.world.scenes import caption, draw_scenes
from fewstep.models.specs import MODELS
from fewstep.models.vocabulary import load_vocabulary

WEIGHTS = Path(__file__).resolve().parents[2] / "weights" / "miniature"
EMOJI = [
    {"hexcode": "1F68C", "label": "bus", "tags": ["school"], "subgroup": 58, "order": 1},
    {"hexcode": "1F69A", "label": "delivery truck", "tags": [], "subgroup": 58, "order": 2},
    {"hexcode": "1F697", "label": "automobile", "tags": ["car", "driving"], "subgroup": 58, "order": 5},
    {"hexcode": "1F3CE", "label": "racing car", "tags": ["driving"], "subgroup": 58, "order": 1},
    {"hexcode": "1F680", "label": "rocket", "tags": ["launch", "space"], "subgroup": 60, "order": 9},
    {"hexcode": "2708-FE0F", "label": "airplane", "tags": ["jet"], "subgroup": 60, "order": 60},
    {"hexcode": "1F98A", "label": "fox", "tags": ["animal"], "subgroup": 20, "order": 3},
    {"hexcode": "1F1E6", "label": "flag: A"},
]
THINGS = {"1f680": ["rocket", "space rocket"], "1f697": ["car", "automobile"], "1f68c": ["bus"]}


def test_a_word_stands_for_the_thing_that_is_near_to_it():
    near = neighbours(EMOJI, THINGS)
    assert near["launch"] == "rocket" and near["driving"] == "car" and near["school"] == "bus"  # keywords
    assert near["airplane"] == "rocket"  # alone with it in its subgroup
    assert near["truck"] == "bus"  # next to it on the keyboard
    assert near["rockets"] == "rocket" and near["automobiles"] == "car" and near["buses"] == "bus"
    assert not {"fox", "animal"} & set(near)  # nothing is near


def test_what_is_written_is_the_world_and_neighbours_of_other_words(tmp_path):
    write_vocabulary(tmp_path)
    assert (tmp_path / "vocabulary.json").read_bytes() == (WEIGHTS / "vocabulary.json").read_bytes()
    content = json.loads((tmp_path / "vocabulary.json").read_text())
    assert set(content["words"]) == world_words() >= {"fox", "teddy", "t-rex", "rex", "snow", "a", "4k"}
    assert not world_words() & set(content["instead"]) and content["instead"]["mountain"] == "mountains"
    known = set(content["words"])
    for instead in {*content["instead"].values(), *json.loads(NEIGHBOURS.read_text()).values()}:
        assert set(instead.split()) <= known, instead


def test_the_committed_list_knows_all_that_the_base_saw_and_nothing_else_of_the_world():
    vocabulary = load_vocabulary(MODELS["miniature"], WEIGHTS.parent)
    assert vocabulary
    rng = random.Random(0)
    for scene in draw_scenes(2000, 0, reserved=None, new=True):
        unknown = vocabulary.unknown(caption(scene, rng))
        allowed = {"flamingo", "tractor", "farm", "pyramids", "ancient"} if scene.new_to_base else set()
        assert set(unknown) <= allowed, caption(scene, rng)
    assert vocabulary.unknown("a flamingo with pyramids").keys() == {"flamingo", "pyramids"}
    assert vocabulary.unknown("a helicopter") == {"helicopter": "rocket"}
    for example in MODELS["miniature"].examples:
        assert vocabulary.unknown(example) == {}
