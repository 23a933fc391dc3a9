"""One system in a process of its own:

    python -m fewstep.benchmark.worker SYSTEM MODEL WEIGHTS REPEATS CAPTIONS PICTURES WISH...

Each WISH is JSON. Of every timed image one line of JSON is written, after one that is not timed. PICTURES
is a folder for what was generated: these and, of the miniature, one image of each of the judge's CAPTIONS.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zlib import crc32

from torch import nn

from fewstep.benchmark.quality import generate_captions, save
from fewstep.benchmark.systems import SYSTEMS, System, Wish, prompts_and_seeds


def main(arguments: Sequence[str]) -> None:
    """Load, and generate every wish."""
    name, model, weights, repeats, captions, pictures, *wishes = arguments
    asked = [Wish(**json.loads(text)) for text in wishes]
    system = SYSTEMS[name](model, Path(weights), asked[0].size)
    for wish in asked:
        # The first of a size is slower.
        system.generate(Wish(wish.size, 1, wish.guidance, wish.batch), *prompts_and_seeds(wish, 10**6))
        for repeat in range(int(repeats)):
            # Another one for every image, and the same for every system.
            prompts, seeds = prompts_and_seeds(wish, crc32(f"{wish.name}-{repeat}".encode()) // 4)
            with stopwatches(system) as spent:
                started = time.perf_counter()
                images = system.generate(wish, prompts, seeds)
                seconds = time.perf_counter() - started
            row = {"seconds": seconds, **spent, "dtype": system.dtype, "peak_gb": _peak_gb()}
            print(json.dumps(row), flush=True)
            save(images, Path(pictures), f"{wish.name}-{repeat}")
    if int(captions):
        save(generate_captions(system, int(captions)), Path(pictures), "caption")


@contextmanager
def stopwatches(system: System) -> Iterator[dict[str, float]]:
    """The seconds that are spent within each network; what is left is everybody's own overhead."""
    spent = dict.fromkeys(system.networks, 0.0)
    engine: Any = system.engine
    # What an engine does is not timed on torch as well, so that nobody takes the one for the other.
    engines = ("unet", "vae") if engine else ()
    handles = [
        handle
        for name, parts in system.networks.items()
        if name not in engines
        for part in parts
        for handle in _time(part, name, spent)
    ]
    if engine:
        engine.unet = _timed(engine.unet, "unet", spent)
        engine.decode = _timed(engine.decode, "vae", spent)
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()
        if engine:
            del engine.unet, engine.decode  # what the class has comes to light again


def _timed(call: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    def timed(*given: Any) -> Any:
        started = time.perf_counter()
        try:
            return call(*given)
        finally:
            spent[name] += time.perf_counter() - started

    return timed


def _time(module: nn.Module, name: str, spent: dict[str, float]) -> list[Any]:
    began: list[float] = []

    def before(*_: object) -> None:
        began.append(time.perf_counter())

    def after(*_: object) -> None:
        spent[name] += time.perf_counter() - began.pop()

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


def _peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main(sys.argv[1:])
