"""The judge: shapes, its reading of fresh drawings, and its robustness to small damage."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from fewstep.evaluation.metrics import frechet_distance
from fewstep.miniature.judge import INPUT_PX, Judge, augment, judge_input
from fewstep.miniature.world.dataset import draw_many
from fewstep.miniature.world.scenes import ATTRIBUTES, all_scenes, unseen_scenes


def test_it_answers_for_every_attribute():
    logits = Judge()(torch.zeros(2, 3, INPUT_PX, INPUT_PX))
    assert [tuple(row.shape) for row in logits] == [(2, len(values)) for values in ATTRIBUTES.values()]


def test_augmentation_is_seeded_and_keeps_range_and_shape():
    x = judge_input(draw_many(all_scenes()[:4], 0, 128, 128))
    one, two = (augment(x, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, two)
    assert one.shape == x.shape and one.abs().max() <= 1.0
    assert not torch.equal(one, x)


def test_the_committed_judge_reads_fresh_drawings_even_blurred(judge):
    scenes = unseen_scenes(200, seed=3)
    drawn = draw_many(scenes, 7 * 10**8, 128, 128)
    blurred = [Image.fromarray(image).filter(ImageFilter.GaussianBlur(1)) for image in drawn]
    assert judge.score(drawn, scenes).all(1).mean() >= 0.99
    assert judge.score(blurred, scenes).all(1).mean() >= 0.95


def test_it_is_not_fooled_by_the_wrong_scene(judge):
    scenes = unseen_scenes(60, seed=4)
    drawn = draw_many(scenes, 0, 128, 128)
    right = judge.score(drawn, scenes[1:] + scenes[:1])
    assert right.all(1).mean() < 0.05
    assert np.all(right.mean(0) < 0.7)


def test_frechet_distance_of_gaussians_that_are_known():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 6)) @ rng.normal(size=(6, 6))
    shift = np.arange(6.0)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x + shift) == pytest.approx(55)
    # sqrt(A * 9 A) is 3 A: what is left is (1 + 9 - 6) tr A, and the means' own square.
    spread = np.trace(np.cov(x, rowvar=False))
    assert frechet_distance(x, 3 * x) == pytest.approx(4 * spread + 4 * x.mean(0) @ x.mean(0))
    turned = x @ np.linalg.qr(rng.normal(size=(6, 6)))[0]
    assert frechet_distance(x, turned) == pytest.approx(frechet_distance(turned, x))


def test_what_is_damaged_is_further_from_drawings(judge):
    scenes = unseen_scenes(300, seed=5)
    drawn, others = (draw_many(scenes, seed, 128, 128) for seed in (0, 10**6))
    damaged = [[Image.fromarray(p).filter(ImageFilter.GaussianBlur(r)) for p in others] for r in (1, 2, 3)]
    far = [frechet_distance(judge.describe(images), judge.describe(drawn)) for images in (others, *damaged)]
    assert far == sorted(far) and far[3] > 1.5 * far[0]
