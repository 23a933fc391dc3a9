"""One run of a suite, in real processes, with the real server."""

import math
from dataclasses import replace

import pytest

from fewstep.benchmark.plots import plot
from fewstep.benchmark.suites import HTTP, JUDGED, SUITES, run, summarised
from fewstep.benchmark.systems import Wish
from fewstep.server import ServerFailed
from fewstep.settings import Settings


@pytest.mark.numeric
def test_a_run_measures_every_system_and_draws_it(tmp_path):
    wish = Wish(128, 1)
    systems = ("fewstep", HTTP, "fewstep-openvino", "diffusers")
    wishes = (wish, Wish(64, 1), JUDGED)
    suite = replace(SUITES["miniature"], systems=systems, wishes=wishes, repeats=2, captions=5)
    told = []
    found, worth = run(suite, Settings().weights_root, 1, told.append)
    assert told == [f"round 1 of 1: {name}" for name in systems]
    every = {(name, wish) for name in systems for wish in wishes} - {("fewstep-openvino", wishes[1])}
    assert set(found) == every
    assert {len(rows) for rows in found.values()} == {2}
    assert set(worth) == {(name, wish) for name, wish in every if name != HTTP}
    for key in every - {key for key in every if key[0] in (HTTP, "diffusers")}:
        # Pictures of fp32 may be the same to the last bit, and then it is infinite; 16 bits always show.
        most = math.inf if found[key][0]["dtype"] == "fp32" else 100
        assert 30 < worth[key]["psnr"] <= most, key
    assert "psnr" not in worth["diffusers", JUDGED]
    assert worth["fewstep", JUDGED]["right"] >= 80 and "right" not in worth["fewstep", wish]
    machine = {"cpu": "any", "cores": 2}
    rows = [
        {**machine, "system": name, **vars(wish), **summarised(rows)} for (name, wish), rows in found.items()
    ]
    assert all(row["least"] <= row["seconds"] <= row["most"] and row["other"] > 0 for row in rows)
    plot(
        [*rows, {**machine, "system": "floor", **vars(wish), "dtype": "fp32", "seconds": 0.1}],
        tmp_path / "x.png",
    )
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_summary_is_of_medians():
    samples = [
        {"seconds": s, "unet": u, "dtype": "fp32", "peak_gb": p}
        for s, u, p in [(3, 2, 1), (9, 8, 5), (4, 2, 2)]
    ]
    row = summarised(samples)
    assert (row["seconds"], row["least"], row["most"], row["unet"], row["other"]) == (4, 3, 9, 2, 1)
    assert (row["samples"], row["dtype"], row["peak_gb"], row["vae"]) == (3, "fp32", 5, "")


def test_a_system_that_fails_is_named(tmp_path):
    suite = replace(SUITES["miniature"], systems=("diffusers",), wishes=(Wish(128, 1),))
    with pytest.raises(ServerFailed, match="diffusers ended with status 1"):
        run(suite, tmp_path, 1, str)  # where there are no weights
