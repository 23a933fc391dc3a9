"""How a run goes: whatever becomes of a stage is a row, which is in the file before the next stage begins."""

import csv
import signal
import time

import pytest
import torch

from fewstep.benchmark.gpu import COLUMNS, FAILED, LEFT_OUT, MEASURED, STOPPED, Run, Stage, run_stages

LONG = 10**6  # seconds


@pytest.fixture
def run(tmp_path):
    made = Run(torch.device("cpu"), tmp_path / "gpu.csv", time.monotonic() + LONG, {"gpu": "any"}, str)
    made.path = tmp_path / "new" / "gpu.csv"
    return made


def rows_in(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def statuses(run):
    return [(row["stage"], row["status"]) for row in rows_in(run.path)]


def raising(error):
    def work():
        raise error

    return work


def test_a_row_is_in_the_file_before_the_next_stage_begins(run):
    seen = []

    def first():
        run.row("a", ms=1.5)
        seen.append(statuses(run))
        run.row("b", seconds=2)

    stages = [
        Stage("first", first, columns={"engine": "torch"}),
        Stage("second", lambda: seen.append(statuses(run))),
    ]
    assert run_stages(run, stages) == []
    assert seen == [[("first", MEASURED)], [("first", MEASURED)] * 2]
    rows = rows_in(run.path)
    assert [list(row) for row in rows] == [list(COLUMNS)] * 3
    assert [(row["what"], row["ms"], row["engine"]) for row in rows] == [
        ("a", "1.5", "torch"),
        ("b", "", "torch"),
        ("", "", ""),
    ]
    assert {row["gpu"] for row in rows} == {"any"} and statuses(run)[-1] == ("second", MEASURED)


def test_a_stage_that_raises_is_a_row_with_its_error_and_the_next_one_goes_on(run):
    failing = [
        Stage("bad", raising(ValueError("it is odd\nand long"))),
        Stage("memory", raising(torch.OutOfMemoryError("x"))),
    ]
    assert run_stages(run, [*failing, Stage("good", lambda: run.row("a"))]) == ["bad", "memory"]
    assert statuses(run) == [("bad", FAILED), ("memory", FAILED), ("good", MEASURED)]
    note = rows_in(run.path)[0]["note"]
    assert note.startswith("ValueError: it is odd (test_gpu.py:") and "long" not in note


def test_a_figure_that_fails_is_a_row_and_its_stage_goes_on(run):
    def work():
        run.time("bad", raising(RuntimeError("no such kernel")), batch=4)
        run.time("good", lambda: None)

    assert run_stages(run, [Stage("whole", work)]) == []
    bad, good = rows_in(run.path)
    assert (bad["status"], bad["what"], bad["batch"], bad["ms"]) == (FAILED, "bad", "4", "")
    assert "no such kernel" in bad["note"]
    assert (good["status"], good["what"], good["n"]) == (MEASURED, "good", "2") and float(good["ms"]) >= 0


def test_a_stage_without_time_is_left_out_and_a_shorter_one_is_not(run):
    begun = []
    stages = [
        Stage(name, lambda name=name: begun.append(name), needs)
        for name, needs in (("long", 2 * LONG), ("short", 5))
    ]
    run_stages(run, stages)
    assert statuses(run) == [("long", LEFT_OUT), ("short", MEASURED)] and begun == ["short"]
    assert f"needs {2 * LONG}" in rows_in(run.path)[0]["note"]
    run.until = time.monotonic()
    run_stages(run, [Stage("late", lambda: begun.append("late"))])
    assert statuses(run)[-1] == ("late", LEFT_OUT) and begun == ["short"]


def test_what_a_cpu_has_no_use_for_is_left_out_of_its_run(run):
    run_stages(run, [Stage("graphs", raising(AssertionError), cuda=True)])
    assert statuses(run) == [("graphs", LEFT_OUT)] and rows_in(run.path)[0]["note"] == "it needs CUDA"


def sleep_on():
    while True:
        try:
            time.sleep(0.01)
        except Exception:  # as libraries do
            continue


@pytest.mark.parametrize("of_all", [False, True])
def test_a_stage_that_takes_too_long_is_stopped(run, of_all):
    handler = signal.getsignal(signal.SIGALRM)
    stages = [Stage("endless", sleep_on, limit=LONG if of_all else 0.05), Stage("next", lambda: run.row("a"))]
    if of_all:
        run.until = time.monotonic() + 0.05
    assert run_stages(run, stages) == []
    assert statuses(run) == [("endless", STOPPED), ("next", LEFT_OUT if of_all else MEASURED)]
    assert signal.getsignal(signal.SIGALRM) == handler


def test_the_clock_of_others_goes_on(run):
    before = signal.setitimer(signal.ITIMER_REAL, LONG)
    try:
        run_stages(run, [Stage("any", lambda: None)])
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= LONG
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)


def wrapped():
    try:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    except RuntimeError as error:
        raise ValueError("the image failed") from error


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize(
    "broken", [wrapped, raising(torch.AcceleratorError("CUDA error: unspecified launch failure"))]
)
def test_a_lost_device_ends_the_run_with_the_rows_so_far(run, within, broken):
    def work():
        run.row("before")
        if within:
            run.time("a", broken)
        broken()

    assert run_stages(run, [Stage("lost", work), Stage("next", raising(AssertionError))]) == ["lost"]
    assert statuses(run) == [("lost", MEASURED), ("lost", FAILED), ("next", LEFT_OUT)]
    assert rows_in(run.path)[-1]["note"] == "the device is lost"


def test_ctrl_c_ends_the_run_with_the_rows_so_far(run):
    def work():
        run.row("before")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_stages(run, [Stage("any", work)])
    assert statuses(run) == [("any", MEASURED)]


def test_a_column_that_no_table_has_is_refused(run):
    run.begin(Stage("any", str))
    with pytest.raises(ValueError, match="no column speed"):
        run.row("a", speed=1)
