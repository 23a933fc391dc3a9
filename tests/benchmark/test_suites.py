"""One run of a suite, in real processes, with the real server."""

import csv
import math
from dataclasses import replace

import pytest

from fewstep.benchmark import suites
from fewstep.benchmark.suites import HTTP, JUDGED, SUITES, Suite, plot, run, summarised
from fewstep.benchmark.systems import SYSTEMS, Scenario
from fewstep.cli import benchmark
from fewstep.errors import ServerFailed
from fewstep.evaluation.tables import commit
from fewstep.settings import Settings

pytestmark = pytest.mark.slow


@pytest.mark.numeric
def test_a_run_measures_every_system_and_draws_it(tmp_path):
    first = Scenario(256, 1)
    systems = ("fewstep", HTTP, "fewstep-openvino", "diffusers")
    scenarios = (first, Scenario(64, 1), JUDGED)
    suite = replace(SUITES["miniature"], systems=systems, scenarios=scenarios, repeats=2, captions=5)
    reported = []
    [results] = run(suite, Settings().weights_root, 1, reported.append)
    samples, worth = results.samples, results.qualities
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


def test_a_system_that_fails_is_named_and_the_others_are_measured(tmp_path, monkeypatch):
    suite = Suite("miniature", ("nothing", "fewstep"), (Scenario(64, 1),), repeats=1)
    monkeypatch.setitem(suites.SUITES, "any", suite)
    monkeypatch.setattr(suites, "roofline", lambda *_: [{"system": "floor"}])
    reported = []
    first, second = suites.measure("any", Settings().weights_root, 2, reported.append)
    failed = "nothing ended with status 1; its message is above"
    assert reported == ["round 1 of 2: nothing", failed, "round 1 of 2: fewstep", "round 2 of 2: fewstep"]
    for rounds, rows in enumerate((first, second), 1):
        assert [row["system"] for row in rows] == ["fewstep", "nothing", "floor"]
        assert rows[0]["samples"] == rounds and rows[1]["error"] == failed and "seconds" not in rows[1]


def test_where_nothing_comes_up_there_is_no_measurement(tmp_path):
    suite = replace(SUITES["miniature"], systems=("diffusers",), scenarios=(Scenario(256, 1),))
    with pytest.raises(ServerFailed, match="diffusers ended with status 1"):
        list(run(suite, tmp_path, 1, str))  # where there are no weights


def test_a_gpu_is_compared_without_openvino_and_in_its_own_ways():
    for suite in SUITES.values():
        assert suite.on(cuda=False) == suite
        systems = suite.on(cuda=True).systems
        assert not any("openvino" in name for name in systems)
        assert {"fewstep", "fewstep-compiled", "diffusers", "diffusers-fp16", HTTP} <= set(systems)
        assert set(systems) - {HTTP} <= set(SYSTEMS)


def test_the_table_is_written_after_every_round(tmp_path, monkeypatch):
    path = tmp_path / "full.csv"

    def rounds(name, weights, count, report):
        yield [{"system": "a", "seconds": 1}]
        assert path.read_text().count("\n") == 2
        yield [{"system": "a", "seconds": 2}, {"system": "b", "error": "it failed"}]

    monkeypatch.setattr("fewstep.benchmark.measure.BENCHMARKS", tmp_path)
    monkeypatch.setattr("fewstep.cli.full_size.make", lambda *_, **__: None)
    monkeypatch.setattr(suites, "measure", rounds)
    monkeypatch.setattr(suites, "plot", lambda rows, path: None)
    assert benchmark.main(["full"]) == 0
    rows = list(csv.DictReader(path.read_text().splitlines()))
    assert [(row["system"], row["seconds"], row["error"]) for row in rows] == [
        ("a", "2", ""),
        ("b", "", "it failed"),
    ]
    assert all(row["cpu"] and row["commit"] == commit() for row in rows)
