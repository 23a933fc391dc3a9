"""The Cog door: typed inputs become a Request, the Batcher runs it, and the files go back to Cog.

`scripts/predict -i prompt="..."` runs this behind the server of a Cog container. Cog reads the inputs without
running this file, so everything within Input(...) is a literal; a test holds them to fewstep/request.py.
"""

import asyncio
import atexit
import logging
import time
from typing import TYPE_CHECKING, Any

import cog
from cog import BasePredictor, Input, Path

from fewstep.coglet.adapter import check_cog, fetched_file, log_to_stderr, mask_unexpected_errors
from fewstep.generation.batcher import Batcher
from fewstep.images.codec import open_image, open_mask
from fewstep.images.outputs import Outputs
from fewstep.lora.resolve import LoraResolver
from fewstep.models.specs import get_model
from fewstep.models.vocabulary import load_vocabulary
from fewstep.request import Inputs
from fewstep.settings import Settings

if TYPE_CHECKING:
    from fewstep.generation.pipeline import Pipeline

logger = logging.getLogger("fewstep.predict")


class Predictor(BasePredictor):
    """One loaded model for all callers; everything that belongs to one request stays in predict()."""

    async def setup(self) -> None:  # type: ignore[override]  # coglet awaits it
        """Load the model and paint once. Whatever fails ends the start with one sentence."""
        log_to_stderr()
        with mask_unexpected_errors():
            check_cog()
            settings = Settings.from_env()
            self.outputs, self.recipes = Outputs(settings.output_root, settings.coglet_root), settings.recipes
            self.outputs.prepare()
            self.vocabulary = load_vocabulary(get_model(settings.model), settings.weights_root)
            atexit.register(self.outputs.remove_all)
            self.batcher = Batcher(deadline_s=settings.deadline_s)

            def load() -> "Pipeline":
                from fewstep.generation.load import load_pipeline  # imports torch, which takes seconds

                return load_pipeline(get_model(settings.model), settings)

            self.batcher.model = self.pipeline = await self.batcher.run(load)
            self.styles = LoraResolver(settings, self.pipeline.adapters.read)
            self.batcher.idle_work = self.pipeline.improve
            await self.batcher.run(self.pipeline.warm_up)

    @cog.concurrent(max=8)
    async def predict(
        self,
        prompt: str = Input(description="What to paint. (word)1.3, (word:1.3) and (word)++ count more, (word)0.7 and (word)-- less.", max_length=2000),
        steps: int = Input(description="How many steps: 4 is the usual, 1 the fastest, 8 the finest.", default=4, ge=1, le=8),
        guidance: float | None = Input(description="How strictly to follow the prompt. Empty or up to 1 is fastest; with an LCM-LoRA, 1 to 4 takes twice the work, makes negative_prompt count, and more is refused.", default=None, ge=0, le=20),
        seed: int | None = Input(description="The same seed paints the same image; empty draws one, which is logged and among the metrics.", default=None, ge=0, le=2147483647),
        negative_prompt: str = Input(description="What not to paint; counts only when guidance is above 1.", default="", max_length=2000),
        num_outputs: int = Input(description="How many images; image i is painted with seed + i.", default=1, ge=1, le=4),
        aspect_ratio: str = Input(description="The shape of the image; custom takes width and height.", default="auto", choices=["auto", "1:1", "16:9", "9:16", "4:3", "3:4", "3:2", "2:3", "21:9", "9:21", "custom"]),
        width: int | None = Input(description="In pixels, with aspect_ratio custom only; rounded to a multiple of 8.", default=None, ge=64, le=2048),
        height: int | None = Input(description="In pixels, with aspect_ratio custom only; rounded to a multiple of 8.", default=None, ge=64, le=2048),
        image: Path | None = Input(description="Paint from this picture, an https address or a data URL of a JPEG, PNG or WebP; its shape is kept unless aspect_ratio says otherwise.", default=None, regex="^(https?://|data:image/)"),
        mask: Path | None = Input(description="Repaint image only where this picture is white.", default=None, regex="^(https?://|data:image/)"),
        prompt_strength: float = Input(description="How far to go from image: 0 keeps nearly all of it, 1 nothing.", default=0.8, ge=0, le=1),
        style: str | None = Input(description="A style LoRA: a name in this server's styles folder, a hub id as owner/repo or owner/repo/file.safetensors, or an https address of a .safetensors file.", default=None, max_length=2000),
        style_scale: float = Input(description="How much of the style is added; below 0 takes it away.", default=0.8, ge=-2, le=2),
        extra_style: str | None = Input(description="A second style LoRA, named like the first.", default=None, max_length=2000),
        extra_style_scale: float = Input(description="How much of the second style is added.", default=0.8, ge=-2, le=2),
        lcm_scale: float = Input(description="How much of the LCM-LoRA is added: 1 as it was distilled, less is softer; with a full LCM only 1.", default=1.0, ge=0, le=2),
        clip_skip: int = Input(description="How many of the text encoders' last layers are left out besides what the model always leaves out; 1 is what other tools call clip skip 2.", default=0, ge=0, le=4),
        output_format: str = Input(description="The type of the image files.", default="webp", choices=["webp", "jpg", "png"]),
        output_quality: int = Input(description="Quality of webp and jpg files; png keeps every pixel as it is.", default=90, ge=1, le=100),
        disable_safety_checker: bool = Input(description="Give out pictures unchecked; counts only where the operator of the server allows it.", default=False),
    ) -> list[Path]:
        """Paint; raises a FewstepError, which callers see as `[code] sentence`."""
        inputs = {name: value for name, value in locals().items() if name != "self"}
        began = time.monotonic()
        with self.outputs.prediction(), mask_unexpected_errors():
            # A thread costs a quarter of a millisecond, which only images are worth.
            drawn = inputs["image"] is not None or inputs["mask"] is not None
            checked = await asyncio.to_thread(self._check, inputs) if drawn else self._check(inputs)
            loras = await self.styles.load(checked.styles, time.monotonic() - began) if checked.styles else []
            request = self.pipeline.request(checked, loras)
            result = await self.batcher.submit(request, time.monotonic() - began)
            recipes = [request.recipe(seed, self.pipeline.spec.name, self.pipeline.revision) if self.recipes else {} for seed in result.seeds]
            started = time.perf_counter()
            files = await asyncio.to_thread(self.outputs.save, result.images, recipes, checked.output_format, checked.output_quality)
            for name, value in {**result.metrics, "encode_ms": 1000 * (time.perf_counter() - started)}.items():
                self.record_metric(name, round(value, 1) if isinstance(value, float) else value)
            if self.vocabulary and (unknown := self.vocabulary.unknown(prompt)):
                self.record_metric("unknown_words", unknown)
                logger.info("%d words of the prompt are unknown to this model; the metric unknown_words names them", len(unknown))
            logger.info("seed %d: painted %d of %dx%d in %d steps", checked.seed, checked.num_outputs, checked.width, checked.height, checked.real_steps)
            return [Path(file) for file in files]

    async def healthcheck(self) -> bool:
        """Whether a request sent now would be painted."""
        return self.batcher.healthy()

    def _check(self, inputs: dict[str, Any]) -> Inputs:
        """Open the images among the inputs, of which large ones take a second, and check all of them."""
        openers = {"image": open_image, "mask": open_mask}
        images = {name: openers[name](fetched_file(name, inputs[name]), name) for name in openers if inputs[name] is not None}
        return Inputs.create(self.pipeline.spec, **(inputs | images))
