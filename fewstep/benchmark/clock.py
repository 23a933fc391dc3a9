"""Stopwatches that wait for the GPU, and the most memory that was held.

A GPU computes after the call that asked for it has returned: a clock that is read at once has seen the call.
Nothing here touches a GPU that this process has not used before.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeAlias
from unittest.mock import patch

import torch

from fewstep.benchmark.measure import memory_bytes, spread

# By part, the objects and the names of their methods that take its time.
Parts: TypeAlias = Mapping[str, Sequence[tuple[Any, str]]]


def _uses_cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def now() -> float:
    """The clock, in seconds, once the GPU has done all that was asked of it."""
    if _uses_cuda():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(call: Callable[[], object]) -> float:
    """Return how long `call` takes, to the end of what it asks of the GPU."""
    started = now()
    call()
    return now() - started


def milliseconds(
    call: Callable[[], object], repeats: int, warm_up: int, most_s: float = 10.0
) -> dict[str, float]:
    """Return the median, the extremes and the number `n` of timed calls, after `warm_up` others.

    There are `repeats`, or as many as begin before they have taken `most_s` seconds.
    """
    for _ in range(warm_up):
        call()
    spent: list[float] = []
    while len(spent) < repeats and sum(spent) < most_s:
        spent.append(seconds_of(call))
    return spread("ms", [1000 * seconds for seconds in spent], 3) | {"n": len(spent)}


@contextmanager
def stopwatches(parts: Parts) -> Iterator[dict[str, float]]:
    """Count the seconds that are spent within each part; what is left is everybody's own overhead.

    Each waits for the GPU twice, so the whole takes longer on one than it does without.
    """
    spent = dict.fromkeys(parts, 0.0)

    def timed(part: str, call: Callable[..., Any], /, *arguments: Any, **named: Any) -> Any:
        started = now()
        try:
            return call(*arguments, **named)
        finally:
            spent[part] += now() - started

    with ExitStack() as stack:
        for part, methods in parts.items():
            for owner, name in methods:
                stack.enter_context(patch.object(owner, name, partial(timed, part, getattr(owner, name))))
        yield spent


def forget_peak() -> None:
    """Let `peak_gb` begin anew, with what is in use now; on a CPU, the process's peak stays."""
    gc.collect()
    if _uses_cuda():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb() -> float:
    """Return the most that torch reserved on the GPU; on a CPU, the most that was resident of the process."""
    if _uses_cuda():
        return round(torch.cuda.max_memory_reserved() / 1e9, 2)
    return round(memory_bytes(os.getpid(), "VmHWM") / 1e9, 2)
