"""torch.compile for the sizes of batches that are asked for most: compiled at setup, and nothing after it.

A batch of any other shape runs as torch runs it without, so no request ever waits for a compiler. Weights
stay where they are, so styles are compiled code too.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.generation.engines import Engine
from fewstep.settings import Shape

logger = logging.getLogger(__name__)

FOLDER = ".compiled"  # beside the models: what a compiler has made is kept, and can be shipped in an image


class CompiledEngine(Engine):
    """The model's own networks: `compile_for` has them compiled, and nothing is after it.

    It serves everything: what was not compiled is not slower here than elsewhere.
    """

    def __init__(self, unet: Any, decoder: Any, cache: Path, backend: str = "inductor") -> None:
        self.cache = cache
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
        how: dict[str, Any] = {"dynamic": False, "fullgraph": True, "backend": backend}
        if unet.device.type == "cuda":
            how["mode"] = "reduce-overhead"  # CUDA graphs
        super().__init__(torch.compile(unet, **how), decoder)
        self._decode: Any = torch.compile(decoder.decode, **how)
        self._stance = "default"

    def compile_for(self, shapes: Sequence[Shape], generate: Callable[[Shape], object]) -> None:
        """Have `generate` make a batch of each of `shapes` by this engine; then compile nothing more."""
        for shape in shapes:
            started = time.perf_counter()
            for _ in range(2):  # the second time, CUDA graphs are recorded
                generate(shape)
            logger.info("compiled %s in %.1f s", shape, time.perf_counter() - started)
        self._stance = "eager_on_recompile"

    def unet(self, latents: Tensor, timestep: Tensor, condition: dict[str, Any]) -> Tensor:
        with self._step():
            return super().unet(latents, timestep, condition)

    def decode(self, latents: Tensor) -> Tensor:
        with self._step():
            pixels: Tensor = self._decode(latents.to(self._decoder.dtype), return_dict=False)[0]
        return pixels

    def _step(self) -> AbstractContextManager[None]:
        """Around each call: CUDA graphs may take back what the last one returned."""
        compiler: Any = torch.compiler
        compiler.cudagraph_mark_step_begin()
        stance: AbstractContextManager[None] = compiler.set_stance(self._stance)
        return stance
