"""What counts as right of what was said, and that broken drawings are other than whole ones."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from fewstep.miniature.judge import (
    PLACE_COUNT,
    UNREAD,
    Judge,
    labels_in_any_hand,
    right_attributes,
    soften,
)
from fewstep.miniature.scoring import Evaluator
from fewstep.miniature.world.breaking import PUTS, SPOILS, draw_broken, draw_in_any_hand, hand_of
from fewstep.miniature.world.dataset import draw_many, to_tensor
from fewstep.miniature.world.drawing import draw
from fewstep.miniature.world.scenes import Placed, Said, Scene, draw_scenes, unseen_scenes

LABELLED = Path(__file__).resolve().parents[2] / "benchmarks" / "judge"
FOX = Scene((Placed("fox"),), "snow", "mountains", "night", "left")
BOTH = Scene((Placed("car", "blue"), Placed("owl")), "meadow", "city", "day", "right")
EVERYTHING = frozenset({"ground", "backdrop", "sky", "position"})


def right(seen: Scene, asked: Scene, said: frozenset[str] = EVERYTHING) -> set[str]:
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
            Scene((Placed("cat"),), "snow", "mountains", "night", "left"),
            FOX,
            {"things", "colours", "position"},
        ),
        (Scene((Placed("fox"), Placed("owl")), "snow", "mountains", "night", "left"), FOX, {"things"}),
        (Scene((Placed("fox"),), "snow", "mountains", "night", "right"), FOX, {"position"}),
        (Scene((Placed("fox"),), "desert", "city", "day", "left"), FOX, {"ground", "backdrop", "sky"}),
        (
            Scene((Placed("car", "red"), Placed("owl")), "meadow", "city", "day", "right"),
            BOTH,
            {"colours"},
        ),
        (
            Scene((Placed("owl"), Placed("car", "blue")), "meadow", "city", "day", "right"),
            BOTH,
            {"position"},
        ),
        (Scene((Placed("car", "blue"),), "meadow", "city", "day", "right"), BOTH, {"things"}),
    ],
)
def test_what_is_shown_otherwise_is_wrong_in_that(seen, asked, wrong):
    missing = ALL - right(seen, asked)
    assert wrong <= missing <= wrong | {"colours", "position"}


def test_what_was_left_open_may_be_anything():
    other = Scene((Placed("fox"),), "desert", "city", "day", "middle")
    assert right(other, FOX, frozenset()) == ALL
    assert right(other, FOX, frozenset({"sky"})) == ALL - {"sky"}
    turned = Scene((Placed("owl"), Placed("car", "blue")), "meadow", "city", "day", "right")
    assert right(turned, BOTH, EVERYTHING - {"position"}) == ALL


def test_a_colour_swapped_between_two_things_is_wrong():
    asked = Scene((Placed("car", "blue"), Placed("tulip", "red")), "meadow", "city", "day", "left")
    seen = Scene((Placed("car", "red"), Placed("tulip", "blue")), "meadow", "city", "day", "left")
    assert right(seen, asked) == ALL - {"colours"}


def test_it_takes_any_size_and_answers_for_every_label():
    judge = Judge().eval()
    images = [draw(FOX, seed, 192, 80) for seed in range(3)]
    seen = judge.look(images)
    assert seen.labels.shape == (3, len(FOX.labels)) == (3, 2 * PLACE_COUNT + 3)
    assert seen.whole.shape == (3,) and seen.features.shape == (3, 16 * 160)
    again = judge.look(np.stack([np.asarray(image) for image in images]))
    assert np.array_equal(again.features, seen.features)
    rows, looks, patches = judge(torch.zeros(1, 3, 256, 256))
    assert looks.shape == (1,) and patches.shape == (1, 1, 16, 16)
    sizes = [row.shape[1] for row in rows]
    assert all(
        label < size
        for scene in draw_scenes(300, 0, reserved=None, new=True)
        for label, size in zip(scene.labels, sizes, strict=True)
    )


@pytest.mark.parametrize("put", dict.fromkeys(PUTS), ids=lambda put: put.__name__)
def test_a_thing_put_badly_is_another_image_in_the_same_place(put):
    rabbit = Scene((Placed("rabbit"),), "meadow", "mountains", "day", "left")
    for seed in range(3):
        whole, broken = (np.asarray(draw(rabbit, seed, put=how), np.int16) for how in (None, put))
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


def test_softening_is_seeded_and_changes_less_than_breaking():
    scenes = draw_scenes(8, 0)
    x, broken = (to_tensor(draw_many(scenes, 0, 256, 256, how)) for how in (draw_in_any_hand, draw_broken))
    one, two = (soften(x, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, two) and not torch.equal(one, x)
    assert one.shape == x.shape and one.abs().max() <= 1.0
    assert (soften(x[:1], torch.Generator().manual_seed(6)) - x[:1]).abs().mean() < 0.12
    assert (one - x).abs().mean() < (broken - x).abs().mean()


def test_colours_are_unread_in_drawings_of_ink_and_nowhere_else():
    """The labels' hands are those of the drawings of the same seeds: ink's have no colour."""
    scenes, seed = draw_scenes(60, 3), 1_000
    labels = labels_in_any_hand(scenes, seed)
    ink = (labels[:, PLACE_COUNT : 2 * PLACE_COUNT] == UNREAD).all(1).numpy()
    assert 2 < ink.sum() < 30
    golden = np.array([hand_of(seed + i)[1] for i in range(60)])
    pixels = draw_many(scenes, seed, 64, 64, draw_in_any_hand).astype(int)
    colourful = (pixels.max(3) - pixels.min(3)).mean((1, 2))
    assert colourful[ink & ~golden].max() < 40
    assert np.median(colourful[~ink]) > 50
    rest = labels[~torch.from_numpy(ink)]
    assert torch.equal(rest, torch.tensor([s.labels for s, one in zip(scenes, ink, strict=True) if not one]))


@pytest.mark.numeric
def test_it_is_not_fooled_by_the_wrong_scene(judge):
    evaluator = Evaluator(judge, unseen_scenes(60, seed=4), 128)
    drawn = draw_many(evaluator.scenes, 0, 128, 128)
    shifted = np.roll(drawn, 1, 0)
    assert evaluator.right(judge.look(drawn)).mean() > 0.9
    assert evaluator.right(judge.look(shifted)).mean() < 0.05


@pytest.mark.numeric
def test_what_is_damaged_is_further_from_drawings_and_a_slight_blur_is_still_right(judge):
    evaluator = Evaluator(judge, unseen_scenes(150, seed=5))
    drawn = draw_many(evaluator.scenes, 10**6, 256, 256)
    blurred = [[Image.fromarray(p).filter(ImageFilter.GaussianBlur(r)) for p in drawn] for r in (0.7, 2, 4)]
    figures = [evaluator.measure(images) for images in (drawn, *blurred)]
    far = [one["distance"] for one in figures]
    assert far == sorted(far) and far[2] > 3 * abs(far[0])
    assert figures[1]["all_right"] > 90 > 50 > figures[3]["all_right"]


@pytest.mark.slow
@pytest.mark.numeric
@pytest.mark.xfail(reason="it calls three of five broken images of the new miniature whole")
def test_it_finds_whole_and_broken_what_eyes_have_found_so(judge):
    """benchmarks/judge: generated images of the old miniature and of this one, each looked at by a person."""
    with (LABELLED / "labels.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    images = []
    for row in rows:
        with Image.open(LABELLED / f"{row['sheet']}.webp") as sheet:
            side = sheet.width // 10
            left, top = int(row["place"]) % 10 * side, int(row["place"]) // 10 * side
            images.append(sheet.convert("RGB").crop((left, top, left + side, top + side)).resize((256, 256)))
    eyes, found = np.array([row["whole"] == "1" for row in rows]), judge.look(images).whole
    assert len(rows) == 200 and (~eyes).sum() >= 60
    assert found[eyes].mean() >= 0.9 and (~found)[~eyes].mean() >= 0.9
