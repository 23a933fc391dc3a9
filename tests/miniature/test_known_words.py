"""The miniature's list of words: made from its world's wordings, and the committed one is of its world."""

import random
from pathlib import Path

from fewstep.miniature.vocabulary import known_words, neighbours
from fewstep.miniature.world.scenes import all_scenes, caption
from fewstep.models.specs import MODELS
from fewstep.models.vocabulary import load_vocabulary

ROOT = Path(__file__).resolve().parents[2]
EMOJI = [
    {"hexcode": "1F680", "label": "rocket", "tags": ["launch", "space"], "subgroup": 60},
    {"hexcode": "1F681", "label": "helicopter", "tags": ["vehicle"], "subgroup": 60},
    {"hexcode": "2708-FE0F", "label": "airplane", "tags": ["jet"], "subgroup": 60},
    {"hexcode": "1F697", "label": "automobile", "tags": ["car", "vehicle", "driving"], "subgroup": 58},
    {"hexcode": "1F69A", "label": "delivery truck", "tags": ["vehicle"], "subgroup": 58},
    {"hexcode": "1F98A", "label": "fox", "tags": ["animal"], "subgroup": 20},
    {"hexcode": "1F1E6", "label": "flag: A"},
]
THINGS = {"1f680": ["rocket", "space rocket"], "1f697": ["car", "automobile"]}


def test_a_word_stands_nearest_to_the_thing_that_shares_its_keywords_and_its_kind():
    near = neighbours(EMOJI, THINGS, known_words(["a rocket", "a space rocket", "a car", "an automobile"]))
    assert near["launch"] == "rocket" and near["driving"] == near["vehicle"] == "car"
    assert near["helicopter"] == near["airplane"] == "rocket"  # in the air, though a vehicle
    assert near["truck"] == "car"
    assert near["rockets"] == "rocket" and near["automobiles"] == "car"
    assert not {"fox", "animal", "rocket", "car"} & set(near)  # nothing is near, or it is known


def test_the_committed_list_knows_all_that_the_base_saw_and_nothing_else_of_the_world():
    vocabulary = load_vocabulary(MODELS["miniature"], ROOT / "weights")
    assert vocabulary
    rng = random.Random(0)
    for scene in rng.sample(all_scenes(), 2000):
        unknown = vocabulary.unknown(caption(scene, rng))
        allowed = {"windmill", "mill", "pyramids", "ancient"} if scene.new_to_base else set()
        assert set(unknown) <= allowed, caption(scene, rng)
    assert vocabulary.unknown("a windmill with pyramids").keys() == {"windmill", "pyramids"}
    assert vocabulary.unknown("a helicopter") == {"helicopter": "rocket"}
    assert set(vocabulary.instead.values()) <= vocabulary.words
    for example in MODELS["miniature"].examples:
        assert vocabulary.unknown(example) == {}
