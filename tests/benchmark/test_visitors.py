"""Many clients, few and for seconds: what they saw is counted, on scripts/web as it is started."""

import pytest

from fewstep.benchmark import visitors

pytestmark = pytest.mark.slow


def test_clients_who_type_get_their_images(monkeypatch):
    monkeypatch.setattr(visitors, "PROMPTS", ("a cat", "a car"))
    row = visitors.measure(clients=2, seconds=2.0, warm_up_s=1.0)
    assert (row["visitors"], row["errors"]) == (2, 0)
    assert row["sentences"] >= 2 and row["seconds"] >= 3 and row["pictures_per_s"] > 0
    assert 0 < row["wait_median_s"] <= row["wait_most_s"]
    assert row["fair_share_s"] > 0 and row["most_of_fair_shares"] > 0
    assert 20 < row["front_mb_before"] < 1000 and 20 < row["front_mb_after"] < 1000
