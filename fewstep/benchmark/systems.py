"""What is compared: fewstep, diffusers as its documentation has it, and what few-step containers set.

Each loads the weights that `save_model` wrote.
"""

from __future__ import annotations

import gc
import io
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn

from fewstep.evaluation.generate import fuse_lora
from fewstep.generation.engines.openvino import OpenVinoEngine
from fewstep.generation.engines.openvino_conversion import Decoder, converted, examples, write
from fewstep.generation.load import load_pipeline
from fewstep.generation.pipeline import Pipeline
from fewstep.models.device import name_of
from fewstep.models.sources import LCM_LORA
from fewstep.models.specs import get_model
from fewstep.settings import Settings, Shape

# Those that a CPU has no use for: it multiplies no fp16, and OpenVINO is its compiler.
ON_CUDA = ("fewstep-compiled", "diffusers-fp16")
PROMPT = "a red house in a meadow with mountains at sunset, in the middle"


@dataclass(frozen=True)
class Scenario:
    """A square image, or `batch` of them at once."""

    size: int
    steps: int = 4
    guidance: float = 1.0
    batch: int = 1

    @property
    def name(self) -> str:
        """The name of its images' files."""
        return f"{self.size}px-{self.steps}-{self.guidance:g}-{self.batch}"

    @property
    def inputs(self) -> dict[str, Any]:
        """The inputs of a request, but for prompt, seed and number."""
        size = {"aspect_ratio": "custom", "width": self.size, "height": self.size}
        return {"steps": self.steps, "guidance": self.guidance, **size}


def prompts_and_seeds(scenario: Scenario, seed: int) -> tuple[list[str], list[int]]:
    """Return those of `scenario`, with prompts that no cache has seen for another `seed`."""
    seeds = list(range(seed, seed + scenario.batch))
    return [f"{PROMPT} {seed}" for seed in seeds], seeds


@dataclass(frozen=True)
class System:
    """A loaded model: `generate(scenario, prompts, seeds)` gives an image of each prompt.

    Stopwatches go round `timed`: by part, objects and the names of their methods.
    """

    dtype: str
    generate: Callable[[Scenario, Sequence[str], Sequence[int]], list[Image.Image]]
    timed: dict[str, list[tuple[Any, str]]]


def fewstep(model: str, weights: Path, size: int, **options: Any) -> System:
    """Load `Pipeline`, as the container runs it but for the encoding of files, with all compiled that its
    engine compiles; `options` are of Settings."""
    pipeline = load_own(model, weights, size, **options)
    compile_all(pipeline)
    return system_of(pipeline)


def load_own(model: str, weights: Path, size: int, **options: Any) -> Pipeline:
    """Load `Pipeline`, for squares of `size` px where an engine is made for some sizes."""
    spec, sizes = get_model(model), {}
    if size != spec.native_size:
        sizes = {"openvino_size": (size, size), "compiled": (Shape(size, size),)}
    how: dict[str, Any] = {"verify": "size", "safety": "off", **sizes, **options}
    return load_pipeline(spec, Settings(model=model, weights_root=weights, **how))


def compile_all(pipeline: Pipeline, until: float = math.inf) -> bool:
    """Have `pipeline` compile all that its engine does, one part after the other, unless `time.monotonic()`
    passes `until`; return whether nothing is left."""
    while time.monotonic() < until:
        if not pipeline.improve():
            return True
    return False


def system_of(pipeline: Pipeline) -> System:
    """Return what generates by `pipeline`."""

    def generate(scenario: Scenario, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        return pipeline.images(prompts, seeds, **scenario.inputs)

    system = plain_system_of(pipeline.diffusion, pipeline.dtype)
    # Not the encoders alone: they may be replayed as a CUDA graph, in which nothing can be timed.
    system.timed["text"] = [(pipeline, "encode")]
    engines = {pipeline.engine, pipeline.eager}
    for part, name in (("unet", "unet"), ("vae", "decode")):
        system.timed[part] = [(engine, name) for engine in engines]
    return replace(system, generate=generate)


def diffusers(model: str, weights: Path, size: int, dtype: torch.dtype = torch.float32) -> System:
    """Load `StableDiffusionXLPipeline` with `load_lora_weights`, `fuse_lora` and `LCMScheduler`."""
    return plain_system_of(load_plain(weights / model, dtype), dtype)


def reference(model: str, weights: Path, size: int) -> System:
    """Load what the few-step container does that is copied most: slices, tiles and an fp32 VAE against a lack
    of memory, channels_last, fused QKV, emptied caches and a PNG with every image."""
    pipe = load_plain(weights / model, torch.float32)
    pipe.enable_attention_slicing()
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    pipe.vae.to(torch.float32)
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.fuse_qkv_projections()

    system = plain_system_of(pipe, torch.float32)

    def generate(scenario: Scenario, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        images = system.generate(scenario, prompts, seeds)
        for image in images:
            image.save(io.BytesIO(), "png")
        return images

    return replace(system, generate=generate)


def openvino(model: str, weights: Path, size: int) -> System:
    """`StableDiffusionXLPipeline` with the UNet and the decoder as OpenVINO converts them, in bf16 and for
    one size: what optimum-intel does, which does not go with today's transformers."""
    folder = weights / model
    settings = Settings(model=model, weights_root=weights, engine="openvino")
    place = converted(folder, settings, torch.device("cpu"), torch.bfloat16)  # with the LCM-LoRA fused
    pipe = _load(folder, torch.float32, unet=None)
    with torch.device("meta"):  # for its configuration
        pipe.unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
    plain = place.parent / "plain"  # with the decoder as it is
    plain.mkdir(exist_ok=True)
    write(Decoder(pipe.vae), examples(pipe, 8, 8)["vae"], plain / "vae.xml", "bf16")
    for name in ("unet.xml", "unet.bin"):
        (plain / name).unlink(missing_ok=True)
        (plain / name).symlink_to((place / name).resolve())

    @cache
    def engine(side: int) -> OpenVinoEngine:
        return OpenVinoEngine(pipe, pipe.vae, plain, settings, torch.bfloat16, (8 * side, 8 * side))

    def unet(latents: Tensor, timestep: Tensor, **condition: Any) -> tuple[Tensor]:
        return (engine(latents.shape[-1]).unet(latents, timestep, condition),)

    for encoder in (pipe.text_encoder, pipe.text_encoder_2):
        encoder.to(torch.bfloat16)
    pipe.unet.forward = unet
    pipe.vae.decoder.forward = lambda latents: engine(latents.shape[-1]).decode(latents)
    pipe.vae.post_quant_conv = nn.Identity()  # which is in the decoder that was converted
    return plain_system_of(pipe, torch.bfloat16)


def _load(folder: Path, dtype: torch.dtype, **parts: Any) -> Any:
    options = {"use_safetensors": True, "local_files_only": True, "add_watermarker": False, **parts}
    pipe = StableDiffusionXLPipeline.from_pretrained(folder, dtype=dtype, **options)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    return pipe


def load_plain(folder: Path, dtype: torch.dtype, device: str = "") -> Any:
    """Return diffusers' pipeline of the model in `folder` with its LCM-LoRA fused, as diffusers documents it,
    on `device`, by default a GPU if there is one."""
    pipe = _load(folder, dtype)
    pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    fuse_lora(pipe, folder / LCM_LORA)
    return pipe


def plain_system_of(pipe: Any, dtype: torch.dtype) -> System:
    """Return what generates by diffusers' pipeline `pipe`, whose networks are of `dtype`."""

    def generate(scenario: Scenario, prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        size = {"width": scenario.size, "height": scenario.size}
        options = {"num_inference_steps": scenario.steps, "guidance_scale": scenario.guidance, **size}
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe(list(prompts), generator=generators, **options).images  # type: ignore[no-any-return]

    timed = {
        "unet": [(pipe.unet, "forward")],
        "vae": [(pipe.vae.decoder, "forward")],
        "text": [(pipe.text_encoder, "forward"), (pipe.text_encoder_2, "forward")],
    }
    return System(name_of(dtype), generate, timed)


# Each loads a model, by where its weights are, for a size in px.
SYSTEMS: dict[str, Callable[[str, Path, int], System]] = {
    "fewstep": fewstep,
    "fewstep-compiled": partial(fewstep, engine="compiled"),
    "fewstep-openvino": partial(fewstep, engine="openvino"),
    "fewstep-openvino-int8": partial(fewstep, engine="openvino-int8"),
    "fewstep-openvino-int8-tiny-vae": partial(fewstep, engine="openvino-int8", vae="tiny"),
    "fewstep-fp32": partial(fewstep, dtype="fp32"),
    "openvino": openvino,
    "diffusers": diffusers,
    "diffusers-bf16": partial(diffusers, dtype=torch.bfloat16),
    "diffusers-fp16": partial(diffusers, dtype=torch.float16),
    "reference": reference,
}
