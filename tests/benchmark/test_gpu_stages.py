"""All that is measured of a GPU, on a CPU with the miniature, and without the compiler that a GPU needs."""

import csv
import math
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch

from fewstep.benchmark import gpu_stages, gpu_systems
from fewstep.benchmark.gpu import COLUMNS, FAILED, LEFT_OUT, MEASURED, Run, run_stages
from fewstep.benchmark.gpu_figures import Figures
from fewstep.benchmark.gpu_systems import Extent, Systems
from fewstep.coglet.server import ROOT
from fewstep.errors import Refused
from fewstep.evaluation.tables import commit
from fewstep.settings import Settings

WEIGHTS = Settings().weights_root
# What a machine that this project did not set up may lack, and no figure is worth.
NOT_NEEDED = ("matplotlib", "compel", "cog", "playwright", "openvino", "websockets")
SAYS_WHAT_IT_LOADED = f"""import atexit, sys
atexit.register(lambda: print("loaded", *sorted({set(NOT_NEEDED)} & set(sys.modules)), file=sys.stderr))"""


def rows_in(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def run_on_cpu(path, seconds=10**6):
    return Run(torch.device("cpu"), path, time.monotonic() + seconds, {}, str)


@pytest.fixture
def small():
    return Extent(64, images=1, captions=4, matrix=64, batches=(1, 2), steps=1)


@pytest.fixture
def systems(tmp_path, small):
    with Systems(run_on_cpu(tmp_path / "gpu.csv"), "miniature", WEIGHTS, small) as made:
        yield made


def stage_names(path):
    """The stages of a whole run, each as often as it is one."""
    run = run_on_cpu(path)
    return Counter(
        stage.name
        for stage in gpu_stages.stages_of(run, Systems(run, "miniature", WEIGHTS, Extent(128)), Extent(128))
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_miniature_on_a_cpu_runs_to_its_end_where_little_is_installed(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(SAYS_WHAT_IT_LOADED)
    path = tmp_path / "out" / "gpu.csv"
    command = [ROOT / "scripts" / "benchmark", "gpu", "--model", "miniature", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--seconds", "800", "--out", path],
        env=os.environ | {"FEWSTEP_PYTHON": sys.executable, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1].split() == ["loaded"]
    rows = rows_in(path)
    assert {row["commit"] for row in rows} == {commit()} and list(rows[0]) == list(COLUMNS)
    # Every stage has its rows, and all that can be measured here is.
    names = {(row["stage"], row["engine"], row["vae"]) for row in rows}
    assert {name for name, *_ in names} == set(stage_names(tmp_path / "any.csv"))
    measured = {
        key
        for key in names
        if any(key == (r["stage"], r["engine"], r["vae"]) and r["status"] == MEASURED for r in rows)
    }
    left_out = {row["stage"]: row["note"] for row in rows if row["status"] == LEFT_OUT}
    assert {engine for _, engine, _ in names - measured} == {"compiled", "compiled-fp8", "torch"}
    assert {stage for stage, engine, _ in names - measured if engine == "torch"} == {"memory"}
    assert set(left_out.values()) == {"it needs CUDA"}
    assert {row["stage"] for row in rows if row["status"] == FAILED} <= {"attention"}  # other kernels
    whole = [
        row
        for row in rows
        if (row["stage"], row["what"], row["status"]) == ("whole", "new prompts", MEASURED)
    ]
    assert [(row["vae"], row["batch"]) for row in whole] == [
        (vae, n) for vae in ("full", "tiny") for n in "148"
    ]
    for row in whole:
        assert float(row["images_per_s"]) == pytest.approx(
            1000 * int(row["batch"]) / float(row["ms"]), rel=0.01
        )
        assert float(row["least"]) <= float(row["ms"]) <= float(row["most"]) and float(row["peak_gb"]) > 0
    ratios = [float(row["psnr"]) for row in rows if row["psnr"]]
    assert len(ratios) == 2 and min(ratios) > 35
    assert [float(row["right"]) >= 80 for row in rows if row["right"]] == [True]


def test_without_time_every_stage_is_one_row_and_nothing_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_systems, "load_own", None)
    path = tmp_path / "gpu.csv"
    assert gpu_stages.measure("miniature", WEIGHTS, path, time.monotonic(), str, device="cpu") == []
    rows = rows_in(path)
    assert Counter(row["stage"] for row in rows) == stage_names(tmp_path / "any.csv")
    assert {row["status"] for row in rows} == {LEFT_OUT}


def test_a_gpu_gets_every_engine_with_both_decoders_and_all_stages_fit_their_limits(tmp_path):
    run = run_on_cpu(tmp_path / "gpu.csv")
    run.device = torch.device("cuda")
    stages = gpu_stages.stages_of(run, Systems(run, "sdxl-random", WEIGHTS, Extent(1024)), Extent(1024))
    whole = {(stage.columns["engine"], stage.columns["vae"]) for stage in stages if stage.name == "whole"}
    assert whole == {(engine, "full") for engine in ("torch", "compiled", "compiled-fp8")} | {
        (engine, "tiny") for engine in ("torch", "compiled")
    }
    for name in ("quality", "judge"):
        assert {stage.columns["engine"] for stage in stages if stage.name == name} == {
            "torch",
            "compiled",
            "compiled-fp8",
        }
    assert all(stage.needs < stage.limit for stage in stages)
    assert sum(stage.needs for stage in stages) > 400  # or nothing would ever be left out


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["compile", "whole", "quality", "judged", "styles", "memory", "plain_compiled"]
)
def test_stages_of_a_gpu_run_without_its_compiler(name, systems, small, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    run, figures = systems.run, Figures(systems.run, systems, small)
    arguments = {
        "compile": ("compiled", "full", 5.0),
        "whole": ("compiled", "tiny"),
        "quality": ("compiled", "full"),
        "judged": ("compiled",),
        "styles": ("compiled",),
        "memory": (8,),
    }
    work = partial(getattr(figures, name), *arguments.get(name, ()))
    stage = next(stage for stage in gpu_stages.stages_of(run, systems, small) if stage.cuda)
    assert run_stages(run, [replace(stage, work=work, cuda=False, limit=math.inf)]) == [], run.rows
    assert all(row["status"] in (MEASURED, LEFT_OUT) for row in run.rows) and run.rows


@pytest.mark.slow
def test_a_style_comes_and_goes_and_what_stays_behind_is_seen(systems, small):
    figures = Figures(systems.run, systems, small)
    figures.styles("torch")
    rows = {row["what"]: row for row in systems.run.rows}
    assert rows["tensors with their bits after it"]["note"] == "all"
    merger, apply = systems.own().pipeline.adapters, systems.own().pipeline.adapters.apply
    merger.apply = lambda mix: apply(mix) if mix.styles else 0  # which takes nothing back
    figures.styles("torch")
    assert systems.run.rows[-1]["note"] == "not all"


@pytest.mark.slow
def test_random_weights_are_measured_as_the_miniature_is(toy, small, tmp_path):
    run = run_on_cpu(tmp_path / "gpu.csv")
    with Systems(run, "sdxl-random", toy, small) as systems:
        stages = [
            stage
            for stage in gpu_stages.stages_of(run, systems, small)
            if stage.name in ("load", "quality", "styles")
        ]
        assert run_stages(run, stages) == [], run.rows
    rows = {row["what"]: row for row in run.rows if row["status"] == MEASURED}
    assert float(rows["random weights made"]["value"]) > 0 and rows["PSNR to fp32"]["psnr"] > 20
    assert rows["applied"]["value"] > 10 and rows["tensors with their bits after it"]["note"] == "all"


def test_only_what_is_named_is_measured(tmp_path):
    path, until = tmp_path / "gpu.csv", time.monotonic()
    gpu_stages.measure("miniature", WEIGHTS, path, until, str, device="cpu", only=("judge", "diffusers"))
    rows = [(row["stage"], row["engine"]) for row in rows_in(path)]
    assert rows == [
        ("diffusers", "diffusers"),
        ("judge", "torch"),
        ("judge", "compiled-fp8"),
        ("judge", "compiled"),
        ("diffusers", "diffusers"),
    ]
    with pytest.raises(
        Refused, match="no stage or engine is x; there are after, attention, compile, compiled"
    ):
        gpu_stages.measure("miniature", WEIGHTS, path, until, str, device="cpu", only=("x", "judge"))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="it needs an NVIDIA GPU")
def test_the_miniature_on_a_gpu_is_measured_by_every_stage(tmp_path):
    path = tmp_path / "gpu.csv"
    assert gpu_stages.measure("miniature", WEIGHTS, path, time.monotonic() + 250, str, device="cuda") == []
    whole = [row for row in rows_in(path) if (row["stage"], row["status"]) == ("whole", MEASURED)]
    assert whole and all(0 < float(row["peak_gb"] or 1) < 100 and row["gpu"] for row in whole)


@pytest.mark.slow
def test_one_system_is_loaded_at_a_time_and_again_only_when_it_is_another(systems, monkeypatch):
    loaded, load = [], gpu_systems.load_own
    monkeypatch.setattr(
        gpu_systems,
        "load_own",
        lambda *names, **options: loaded.append(options["vae"]) or load(*names, **options),
    )
    full = systems.own()
    assert systems.own() is full and systems.own("torch", "full") is full
    assert systems.own(vae="tiny") is not full and systems.own() is not full
    assert loaded == ["full", "tiny", "full"]


def test_random_weights_are_made_once_and_only_where_there_are_none(tmp_path, monkeypatch):
    made = []

    def make(name, root, device):
        made.append((name, root, device.type))
        folder = root / f"{name}-random"
        folder.mkdir()
        (folder / "a").write_bytes(b"x" * 10)
        return folder

    monkeypatch.setattr(gpu_systems, "make_random", make)
    run = run_on_cpu(tmp_path / "gpu.csv")
    with Systems(run, "sdxl-random", tmp_path, Extent(1024)) as systems:
        assert systems.root() == systems.root() == systems.scratch
        assert made == [("sdxl", systems.scratch, "cpu")] and run.rows[0]["unit"] == "GB"
        scratch = systems.scratch
    assert not scratch.exists()
    (tmp_path / "sdxl-random").mkdir()
    with Systems(run, "sdxl-random", tmp_path, Extent(1024)) as systems:
        assert systems.root() == tmp_path and len(made) == 1
