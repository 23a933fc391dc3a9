"""One system in a process of its own:

    python -m fewstep.benchmark.worker SYSTEM MODEL WEIGHTS REPEATS CAPTIONS PICTURES SCENARIO...

Each SCENARIO is JSON. Of every timed image one line of JSON is written, after one that is not timed. PICTURES
is a folder for what was generated: these and, of the miniature, one image of each of the judge's CAPTIONS.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from zlib import crc32

from PIL import Image

from fewstep.benchmark.clock import now, peak_gb, stopwatches
from fewstep.benchmark.systems import SYSTEMS, Scenario, System, prompts_and_seeds
from fewstep.miniature.world.scenes import say_half, unseen_scenes

BATCH = 4


def main(arguments: Sequence[str]) -> None:
    """Load, and generate every scenario."""
    name, model, weights, repeats, captions, folder, *texts = arguments
    scenarios = [Scenario(**json.loads(text)) for text in texts]
    system = SYSTEMS[name](model, Path(weights), scenarios[0].size)
    for scenario in scenarios:
        # The first of a size is slower.
        system.generate(replace(scenario, steps=1), *prompts_and_seeds(scenario, 10**6))
        images = []
        for repeat in range(int(repeats)):
            # Another one for every image, and the same for every system.
            prompts, seeds = prompts_and_seeds(scenario, crc32(f"{scenario.name}-{repeat}".encode()) // 4)
            with stopwatches(system.timed) as spent:
                started = now()
                images += system.generate(scenario, prompts, seeds)
                seconds = now() - started
            figures = {"seconds": seconds, **spent, "dtype": system.dtype, "peak_gb": peak_gb()}
            print(json.dumps(figures), flush=True)
        _save(images, Path(folder), scenario.name)
    if int(captions):
        _save(generate_captions(system, int(captions)), Path(folder), "caption")


def generate_captions(system: System, count: int) -> list[Image.Image]:
    """Generate one image in 4 steps of each of the judge's first `count` captions."""
    captions = [said.text for said in say_half(unseen_scenes(count))]
    images: list[Image.Image] = []
    for start in range(0, count, BATCH):
        prompts = captions[start : start + BATCH]
        seeds = range(start, start + len(prompts))
        images += system.generate(Scenario(256, batch=len(prompts)), prompts, seeds)
    return images


def _save(images: Sequence[Image.Image], folder: Path, name: str) -> None:
    """Save them as NAME-0.png and so on, in which no pixel is lost."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        image.save(folder / f"{name}-{i}.png", compress_level=1)


if __name__ == "__main__":
    main(sys.argv[1:])
