"""Distances between sets of features, what a set covers of another, and how sure a share is."""

import numpy as np
import pytest

from fewstep.evaluation.metrics import frechet_distance, kernel_distance, precision_recall, wilson_interval


def test_the_kernel_distance_of_points_is_known_and_needs_no_certain_number():
    zeros, ones = np.zeros((4, 1)), np.ones((7, 1))
    assert kernel_distance(zeros, ones) == pytest.approx(1 + 8 - 2)  # (x y + 1)^3 of 0, 0; of 1, 1; of 0, 1
    assert kernel_distance(zeros, zeros) == 0
    rng = np.random.default_rng(0)

    def mean_distance(count: int, shift: float) -> float:
        pairs = [(rng.normal(size=(count, 8)), rng.normal(shift, size=(count, 8))) for _ in range(60)]
        return float(np.mean([kernel_distance(*pair) for pair in pairs]))

    # Without bias: as many as may be, two sets of one kind are 0 apart, and others as far as before.
    assert abs(mean_distance(20, 0)) < 0.06 and abs(mean_distance(200, 0)) < 0.01
    assert mean_distance(20, 1) == pytest.approx(mean_distance(200, 1), rel=0.1)


def test_precision_is_what_lies_within_the_real_and_recall_what_of_that_is_reached():
    rng = np.random.default_rng(1)
    here, there = rng.normal(0, 1, (200, 4)), rng.normal(40, 1, (200, 4))
    both = np.concatenate([here, there])
    again = rng.normal(0, 1, (200, 4))
    precision, recall = precision_recall(again, both)
    assert precision > 0.85 and 0.4 < recall < 0.5  # good, and half of the world
    precision, recall = precision_recall(both, again)
    assert 0.4 < precision < 0.5 and recall > 0.85
    assert precision_recall(there, here) == (0, 0)
    assert precision_recall(here, here) == (1, 1)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(0, 10, 0, 0.2775), (10, 10, 0.7225, 1), (50, 100, 0.4038, 0.5962), (299, 300, 0.9814, 0.9994)],
)
def test_wilsons_interval_is_as_in_the_tables(right, count, low, high):
    assert wilson_interval(right, count) == pytest.approx((low, high), abs=1e-4)


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
