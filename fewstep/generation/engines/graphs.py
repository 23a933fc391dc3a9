"""CUDA graphs: what a function launches on a GPU is recorded once, and then replayed in one call.

SDXL's UNet is 1,855 launches, which take a CPU longer than they take a fast GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Any, TypeAlias

import torch
from cachetools import LRUCache
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fewstep.models.device import is_device_error, is_out_of_memory

logger = logging.getLogger(__name__)

# Of one function; each holds its inputs and outputs, and a list of its launches in the host's memory.
KEPT_GRAPHS = 32

# A function of tensors, or None where it takes none, and anything made of tensors that it returns.
Function: TypeAlias = Callable[..., Any]
Record: TypeAlias = Callable[[Function, tuple[Tensor | None, ...]], Function]


class Recorded:
    """A function of tensors that is replayed for shapes of inputs that have come in an earlier turn.

    In the first turn of a shape calls run as they are, which makes libraries ready, and in the next they are
    recorded; `turn` is counted by whoever owns it, so that a shape that comes once is never recorded. Weights
    are read where they are: what is written into them counts at the next call. The next call, of any function
    that was recorded, may overwrite a result. Without `record` every call runs as it is.
    """

    def __init__(self, function: Function, record: Record | None) -> None:
        self.function = function
        self.record = record
        self.turn = 0
        self._replays = LRUCache[Hashable, Function | int](KEPT_GRAPHS)  # or the first turn

    def __call__(self, *inputs: Tensor | None, anew: bool = False) -> Any:
        """`anew` drops what was recorded for this shape, and makes this its first turn."""
        if self.record is None:
            return self.function(*inputs)
        key = tuple(None if one is None else (one.shape, one.dtype) for one in inputs)
        if anew or key not in self._replays:
            self._replays[key] = self.turn
        replay = self._replays[key]
        if isinstance(replay, int):
            if replay == self.turn:
                return self.function(*inputs)
            replay = self._replays[key] = self._recorded(self.record, inputs)
        return replay(*inputs)

    def forget(self) -> bool:
        """Give the memory of all recordings back, which are made anew when they are asked for; whether there
        were any."""
        recorded = any(not isinstance(replay, int) for replay in self._replays.values())
        self._replays.clear()
        return recorded

    def _recorded(self, record: Record, inputs: tuple[Tensor | None, ...]) -> Function:
        try:
            return record(self.function, inputs)
        except RuntimeError as error:
            if is_out_of_memory(error) or is_device_error(error):
                raise
            # Something in it cannot be recorded: it goes on as it is, which is right and slower.
            logger.warning(
                "no CUDA graph of %s: %s", [one if one is None else one.shape for one in inputs], error
            )
            return self.function


def cuda_recorder() -> Record:
    """What records CUDA graphs, all in one pool of memory: they never run side by side.

    A pool whose graphs are all gone cannot be used again, so that then another recorder is needed. Each has
    a stream of its own to record on, since what cuBLAS works in belongs to a stream, and lies in the pool
    that was being recorded into when it was first needed.
    """
    make_stream: Callable[[], Any] = torch.cuda.Stream
    pool, stream = torch.cuda.graph_pool_handle(), make_stream()

    def record(function: Function, inputs: tuple[Tensor | None, ...]) -> Function:
        held = [None if one is None else one.clone() for one in inputs]
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # Other threads may pin memory meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                output = function(*held)
        finally:
            torch.cuda.set_stream(before)  # which a recording that fails leaves behind

        def replay(*inputs: Tensor | None) -> Any:
            for mine, given in zip(held, inputs, strict=True):
                if mine is not None and given is not None:
                    mine.copy_(given)
            graph.replay()
            return output

        return replay

    return record


def owned(output: Any) -> Any:
    """A copy of what a recorded function returned, which no later call overwrites."""
    return tree_map_only(Tensor, torch.clone, output)
