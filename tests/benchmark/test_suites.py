"""One run of a suite, in real processes, with the real server."""

import math
from dataclasses import replace

import pytest

from fewstep.benchmark.suites import HTTP, JUDGED, SUITES, plot, run, summarised
from fewstep.benchmark.systems import Scenario
from fewstep.errors import ServerFailed
from fewstep.settings import Settings

pytestmark = pytest.mark.slow


@pytest.mark.numeric
def test_a_run_measures_every_system_and_draws_it(tmp_path):
    first = Scenario(128, 1)
    systems = ("fewstep", HTTP, "fewstep-openvino", "diffusers")
    scenarios = (first, Scenario(64, 1), JUDGED)
    suite = replace(SUITES["miniature"], systems=systems, scenarios=scenarios, repeats=2, captions=5)
    reported = []
    samples, worth = run(suite, Settings().weights_root, 1, reported.append)
    assert reported == [f"round 1 of 1: {name}" for name in systems]
    every = {(name, one) for name in systems for one in scenarios} - {("fewstep-openvino", scenarios[1])}
    assert set(samples) == every
    assert {len(rows) for rows in samples.values()} == {2}
    assert set(worth) == {(name, one) for name, one in every if name != HTTP}
    for key in worth.keys() - {("diffusers", one) for one in scenarios}:
        # Images of fp32 may be the same to the last bit, and then it is infinite; 16 bits always show.
        most = math.inf if samples[key][0]["dtype"] == "fp32" else 100
        assert 30 < worth[key]["psnr"] <= most, key
    assert "psnr" not in worth["diffusers", JUDGED]
    assert worth["fewstep", JUDGED]["right"] >= 80 and "right" not in worth["fewstep", first]
    rows = [{"system": name, **vars(one), **summarised(rows)} for (name, one), rows in samples.items()]
    assert all(row["least"] <= row["seconds"] <= row["most"] and row["other"] > 0 for row in rows)
    rows.append({"system": "floor", **vars(first), "dtype": "fp32", "seconds": 0.1})
    plot([{"cpu": "any", "cores": 2, **row} for row in rows], tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_summary_is_of_medians():
    samples = zip((3, 9, 4), (2, 8, 2), (1, 5, 2), strict=True)
    row = summarised([{"seconds": s, "unet": u, "dtype": "fp32", "peak_gb": p} for s, u, p in samples])
    assert (row["seconds"], row["least"], row["most"], row["unet"], row["other"]) == (4, 3, 9, 2, 1)
    assert (row["samples"], row["dtype"], row["peak_gb"], row["vae"]) == (3, "fp32", 5, "")


def test_a_system_that_fails_is_named(tmp_path):
    suite = replace(SUITES["miniature"], systems=("diffusers",), scenarios=(Scenario(128, 1),))
    with pytest.raises(ServerFailed, match="diffusers ended with status 1"):
        run(suite, tmp_path, 1, str)  # where there are no weights
