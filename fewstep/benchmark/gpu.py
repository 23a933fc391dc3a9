"""How a run of many figures goes in one process: stage after stage, row after row, by a clock.

A stage that fails, is stopped or has no time left is a row like any figure, and the next one goes on. Only a
device that is lost to the process ends all. `gpu_stages` says what is measured.
"""

from __future__ import annotations

import logging
import math
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fewstep.benchmark.clock import forget_peak, milliseconds
from fewstep.benchmark.measure import line
from fewstep.evaluation.tables import commit, write_csv
from fewstep.models.device import is_device_error

logger = logging.getLogger(__name__)

COLUMNS = (
    *("commit", "date", "gpu", "driver", "torch"),  # of every row
    "stage",
    "status",  # one of those below; of a figure, "measured"
    "what",
    *("model", "engine", "vae", "dtype", "batch", "size", "steps"),  # size: px a side
    *("ms", "least", "most", "n"),  # the median, the extremes and the number of `n` calls
    "images_per_s",
    "seconds",  # of what happens once, such as loading
    "peak_gb",  # the most that torch reserved on the GPU; on a CPU, that the process held since its start
    "psnr",  # in dB, to the images of plain diffusers in fp32
    "right",  # of the judge's captions of the miniature, percent that are right and whole
    *("value", "unit"),  # of what has no column of its own
    "note",
)
MEASURED, FAILED, STOPPED, LEFT_OUT = "measured", "failed", "stopped", "left out"
REPEATS = {"cuda": (10, 2), "cpu": (2, 1)}  # of a call that is timed, and before it of some that are not
REASON = 200  # characters of a failure that are kept


@dataclass(frozen=True)
class Stage:
    """A part of a run: `work` writes rows, each of which has its `columns`.

    It is begun with `needs` seconds left or more, and stopped after `limit` of them.
    """

    name: str
    work: Callable[[], object]
    needs: float = 0.0
    limit: float = math.inf
    columns: Mapping[str, Any] = field(default_factory=dict)
    cuda: bool = False  # whether it means nothing on a CPU


class OutOfTime(BaseException):
    """The clock has run out within a stage: no Exception, so that no library takes it for its own."""


class Run:
    """The rows so far, which are in the CSV at `path` before `row` returns, and the clock.

    `until` is by `time.monotonic()`. `columns` are of every row.
    """

    def __init__(
        self,
        device: torch.device,
        path: Path,
        until: float,
        columns: Mapping[str, Any],
        report: Callable[[str], None],
    ) -> None:
        self.device, self.path, self.until, self.report = device, path, until, report
        self.rows: list[dict[str, Any]] = []
        self._columns = dict.fromkeys(COLUMNS, "") | {"commit": commit(), **columns}
        self._stage: dict[str, Any] = {}

    @property
    def on_cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"

    @property
    def left(self) -> float:
        """Seconds until the end."""
        return self.until - time.monotonic()

    def begin(self, stage: Stage) -> None:
        """Let the rows that follow be of `stage`."""
        self._stage = {"stage": stage.name, **stage.columns}

    def row(self, what: str = "", **figures: Any) -> None:
        """Write a row of what was measured, or of another `status`. Raises ValueError for an unknown
        column."""
        row = {**self._stage, "status": MEASURED, "what": what, **figures}
        if unknown := row.keys() - set(COLUMNS):
            raise ValueError(f"there is no column {', '.join(sorted(unknown))}")
        self.rows.append(self._columns | row)
        write_csv(self.path, self.rows)
        self.report(line({"left": f"{self.left:.0f} s", **row}))

    def fail(self, what: str, error: Exception, **columns: Any) -> None:
        """Write a row of what failed: the error's first line, and where it was raised."""
        reason = f"{type(error).__name__}: {error}".partition("\n")[0][:REASON]
        place = traceback.extract_tb(error.__traceback__)[-1]
        note = f"{reason} ({Path(place.filename).name}:{place.lineno})"
        self.row(what, **columns, status=FAILED, note=note)

    @contextmanager
    def attempt(self, what: str, **columns: Any) -> Iterator[None]:
        """Let what is within fail as a row, and the stage go on, unless the device is lost."""
        try:
            yield
        except Exception as error:
            if is_device_error(error):
                raise
            self.fail(what, error, **columns)

    def milliseconds(self, call: Callable[[], object], often: float = 1.0) -> dict[str, float]:
        """Return the columns of what `call` takes; it is made `often` times as often as most are."""
        repeats, warm_up = REPEATS[self.device.type]
        return milliseconds(call, max(2, math.ceil(often * repeats)), warm_up)

    def time(self, what: str, call: Callable[[], object], often: float = 1.0, **columns: Any) -> None:
        """Write a row of the milliseconds that `call` takes, or of its failure."""
        with self.attempt(what, **columns):
            self.row(what, **self.milliseconds(call, often), **columns)


def run_stages(run: Run, stages: Sequence[Stage]) -> list[str]:
    """Write the rows of all `stages`, one after the other; return the names of those that failed.

    Belongs to the main thread, since a signal stops what takes too long; what waits in a library that does
    not return to Python is stopped when it does.
    """
    failed: list[str] = []
    lost = False
    for stage in stages:
        run.begin(stage)
        if reason := "the device is lost" if lost else _left_out(run, stage):
            run.row(status=LEFT_OUT, note=reason)
            continue
        before, began = len(run.rows), time.monotonic()
        try:
            with _alarm(min(run.left, stage.limit)):
                forget_peak()
                stage.work()
        except OutOfTime:
            run.row(status=STOPPED, note=f"after {time.monotonic() - began:.0f} s")
        except Exception as error:
            failed.append(stage.name)
            lost = is_device_error(error)
            logger.warning("%s failed", stage.name, exc_info=error)
            run.fail("", error)
        else:
            if len(run.rows) == before:
                run.row()
    return failed


def _left_out(run: Run, stage: Stage) -> str:
    """Why `stage` is not begun; empty if it is."""
    if stage.cuda and not run.on_cuda:
        return "it needs CUDA"
    if run.left <= stage.needs:
        return f"{max(run.left, 0):.0f} s are left, and it needs {stage.needs:.0f}"
    return ""


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    """Raise OutOfTime within, in so many seconds, and again should a library swallow it."""

    def ring(*_: object) -> None:
        raise OutOfTime

    handler = signal.signal(signal.SIGALRM, ring)
    before = signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-6), 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *before)
        signal.signal(signal.SIGALRM, handler)
