"""CUDA graphs: what a function launches on a GPU is recorded once, and then replayed in one call.

SDXL's UNet is 1,855 launches, which take a CPU longer than they take a fast GPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from functools import partial
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
    """A function of tensors that is replayed for shapes of inputs that it has seen before.

    The first call of a shape runs as it is, which makes libraries ready, and the second is recorded.
    Weights are read where they are: what is written into them counts at the next call. The next call, of
    any function that was recorded, may overwrite a result. Without `record` every call runs as it is.
    """

    def __init__(self, function: Function, record: Record | None) -> None:
        self.function = function
        self._record = record
        self._replays = LRUCache[Hashable, Function](KEPT_GRAPHS)

    def __call__(self, *inputs: Tensor | None) -> Any:
        if self._record is None:
            return self.function(*inputs)
        key = tuple(None if one is None else (one.shape, one.dtype) for one in inputs)
        if key not in self._replays:
            self._replays[key] = self.function
            return self.function(*inputs)
        if self._replays[key] is self.function:
            try:
                self._replays[key] = self._record(self.function, inputs)
            except RuntimeError as error:
                if is_out_of_memory(error) or is_device_error(error):
                    raise
                # Something in it cannot be recorded: it goes on as it is, which is right and slower.
                logger.warning("no CUDA graph for inputs of %s: %s", key, error)
                self._replays[key] = partial(self.function)  # another object: it is not tried again
        return self._replays[key](*inputs)

    def forget(self) -> None:
        """Give the memory of all recordings back; they are made anew when they are asked for."""
        self._replays.clear()


def cuda_recorder() -> Record:
    """What records CUDA graphs, all in one pool of memory: they never run side by side. The pool is given
    back when the last of them is forgotten."""
    pool = torch.cuda.graph_pool_handle()

    def record(function: Function, inputs: tuple[Tensor | None, ...]) -> Function:
        held = [None if one is None else one.clone() for one in inputs]
        graph = torch.cuda.CUDAGraph()
        # Other threads may pin memory meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            output = function(*held)

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
