"""Milliseconds that the stages of a batch take, on the device that computes them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Stopwatch:
    """Time stages, and read the sum of each when all is done.

    On a GPU, where a call returns before its work is done, the marks are CUDA events in the stream itself, so
    that nothing waits for them; they are to be read after a wait for what came last.
    """

    def __init__(self, device: torch.device) -> None:
        self._mark = _event if device.type == "cuda" else time.perf_counter
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begun = self._mark()
        yield
        self._spans.append((name, begun, self._mark()))

    def read(self) -> dict[str, float]:
        """Return the ms by stage."""
        total: dict[str, float] = defaultdict(float)
        for name, begun, ended in self._spans:
            total[name] += 1000 * (ended - begun) if isinstance(begun, float) else begun.elapsed_time(ended)
        return total


def _event() -> Any:
    make: Callable[..., Any] = torch.cuda.Event
    event = make(enable_timing=True)
    event.record()
    return event
