"""Plain diffusers behind the same server, one image at a time: what fewstep's throughput is compared with."""

import asyncio
import tempfile
from concurrent.futures import ThreadPoolExecutor

import cog
from cog import BasePredictor, Input, Path

from fewstep.benchmark.systems import Scenario, System, diffusers
from fewstep.images.codec import encode_image
from fewstep.models.device import DTYPES
from fewstep.settings import Settings

SCENARIO = Scenario(256)


class Predictor(BasePredictor):
    """Takes requests as they come, and generates one after the other."""

    system: System
    thread: ThreadPoolExecutor

    async def setup(self) -> None:  # type: ignore[override]  # coglet awaits it
        """Load the model and generate once."""
        # All on one thread: torch is half as fast on a second one of the same process.
        self.thread = ThreadPoolExecutor(1)
        self.system = await asyncio.get_running_loop().run_in_executor(self.thread, _load)

    @cog.concurrent(max=8)
    async def predict(
        self,
        prompt: str = Input(description="What to paint."),
        seed: int = Input(description="Of the noise.", default=0),
    ) -> list[Path]:
        """Generate in 4 steps, at the miniature's size."""
        loop = asyncio.get_running_loop()
        [image] = await loop.run_in_executor(self.thread, self.system.generate, SCENARIO, [prompt], [seed])
        with tempfile.NamedTemporaryFile(suffix=".webp", delete=False) as file:  # coglet reads it later
            file.write(encode_image(image, "webp", 90))
        return [Path(file.name)]


def _load() -> System:
    settings = Settings.from_env()
    system = diffusers(settings.model, settings.weights_root, SCENARIO.size, DTYPES[settings.dtype])
    system.generate(SCENARIO, ["warm up"], [0])
    return system
