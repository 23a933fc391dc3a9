"""Load on real servers, small: what is counted is what was answered."""

from itertools import count

import pytest

from fewstep.benchmark.throughput import (
    LoadResult,
    beside_generate,
    differences,
    plot,
    put_load,
    rows_of,
    served,
)
from fewstep.errors import ServerFailed
from fewstep.settings import Settings

pytestmark = pytest.mark.slow

WEIGHTS = Settings().weights_root


def test_nothing_is_lost_beyond_the_servers_slots_and_batched_images_are_the_lone_ones():
    with served("fewstep-fp32", WEIGHTS) as server:
        # Four callers at a time are told to come again.
        load = put_load(server, clients=12, numbers=range(24))
        assert (len(load.waited), load.lost) == (24, 0)
        assert load.seconds >= max(load.waited) and load.together > 4
        assert differences(server, 6)["most_apart"] <= 1


def test_loads_take_turns_with_generate(monkeypatch):
    monkeypatch.setattr("fewstep.benchmark.throughput.TURNS", 2)
    numbers = count()
    with served("fewstep", WEIGHTS) as server:
        turns = list(beside_generate("fewstep", server, WEIGHTS, numbers, requests=8))
    assert [(len(load.waited), load.lost, load.alone > 0) for load in turns] == [(8, 0, True)] * 2
    assert next(numbers) == 16  # each with prompts that no cache has seen


def test_plain_diffusers_is_served_by_the_same_server():
    with served("diffusers-bf16", WEIGHTS) as server:
        load = put_load(server, clients=3, numbers=range(6))
    assert (len(load.waited), load.lost) == (6, 0)


def test_what_fails_is_counted_as_lost(monkeypatch):
    with served("fewstep-fp32", WEIGHTS) as server:
        monkeypatch.setattr("fewstep.benchmark.throughput.PROMPT", "(" + "x " * 3000)
        assert put_load(server, clients=2, numbers=range(3)).lost == 3


def test_a_server_that_does_not_start_is_told(tmp_path):
    with pytest.raises(ServerFailed), served("fewstep", tmp_path):
        pass


def test_rows_are_medians_over_rounds_and_are_drawn(tmp_path):
    loads = {
        ("fewstep", clients): [
            LoadResult(2.0, [0.5] * 4, 0, 1, rates[0]),
            LoadResult(1.0, [0.1] * 8, 1, 1, rates[1]),
            LoadResult(1.0, [0.1] * 4, 0, 4, rates[2]),
        ]
        for clients, rates in ((1, (0, 0, 0)), (8, (16, 10, 8)))
    }
    rows = rows_of(loads, {"fewstep": {"most_apart": 2}}, {8: 0.1, 1: 0.2})
    first, second, generate, lone, _ = rows
    names = ["fewstep", "fewstep", "fewstep-generate", "fewstep-lone-max-batch-8", "fewstep-lone-max-batch-1"]
    assert [row["system"] for row in rows] == names
    assert [row["clients"] for row in rows] == [1, 8, "", 1, 1]
    assert (first["images_per_s"], first["least"], first["most"]) == (4, 2, 8)
    assert (first["requests"], first["lost"], first["wait_ms"], first["together"]) == (17, 1, 100, 2)
    assert "most_apart" not in first and second["most_apart"] == 2
    assert (first["of_generate"], second["of_generate"]) == ("", 50)  # of 12.5, 80 and 50 %
    assert (generate["images_per_s"], lone["wait_ms"]) == (10, 100)
    plot([{"cpu": "any", "cores": 2, **row} for row in rows], tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
