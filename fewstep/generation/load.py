"""Load a model's weights and make a pipeline of them, by the settings."""

from __future__ import annotations

import logging
import math

import numpy as np
import torch

from fewstep.errors import DeviceLost, FewstepError, InvalidRequest, SettingsError
from fewstep.generation.engines.compiled import FOLDER as CACHE
from fewstep.generation.engines.compiled import CompiledEngine, keep_compiled
from fewstep.generation.engines.graphs import cuda_recorder
from fewstep.generation.engines.openvino import OpenVinoEngine
from fewstep.generation.engines.openvino_conversion import converted
from fewstep.generation.pipeline import Pipeline
from fewstep.generation.safety import load_safety_checker
from fewstep.lora.types import Mix
from fewstep.models import fp8
from fewstep.models.device import device_and_dtype, name_of
from fewstep.models.load import load_merged, load_tiny_vae
from fewstep.models.manifest import check_folder
from fewstep.models.memory import Footprint, plan_memory
from fewstep.models.specs import ModelSpec
from fewstep.request import Inputs
from fewstep.settings import COMPILED, FP8, OPENVINO, Settings

logger = logging.getLogger(__name__)

# By which an image may differ from that of 16 bits, as a peak signal-to-noise ratio in dB.
LEAST_PSNR = 20.0


def load_pipeline(spec: ModelSpec, settings: Settings) -> Pipeline:
    """Load the weights of `spec` straight to the device, verify them meanwhile, and fuse the LCM-LoRA.

    Raises WeightsError that names a missing or damaged file and its fix, SettingsError for a device that
    is not there, or has not the memory. Nothing is fetched: what is not in the folder does not exist.
    """
    folder = settings.weights_root / spec.name
    device, dtype = device_and_dtype(settings)
    size = _usual_size(spec, settings)
    manifest = check_folder(folder, fix=spec.fix)
    # First, while nothing else takes memory.
    place = converted(folder, settings, device, dtype) if settings.engine in OPENVINO else None
    memory = plan_memory(spec, Footprint.of(manifest, settings, dtype), settings, device, dtype)
    logger.info("%s on %s in %s: %s", spec.name, device.type, name_of(dtype), memory)
    diffusion, adapters = load_merged(spec, settings, manifest, device, dtype, memory)
    tiny = load_tiny_vae(folder, manifest, spec.fix, device, dtype) if settings.vae == "tiny" else None
    pipeline = Pipeline(spec, diffusion, adapters, memory.max_batch, tiny)
    pipeline.revision, pipeline.usual_size = manifest.revision, size
    pipeline.allow_unsafe = settings.allow_unsafe
    if settings.engine == FP8 and not memory.small:  # whose UNet has 8 bits already, for memory
        multiply_in_fp8(pipeline)  # before there is a checker, which might take offence at the probe
    if settings.safety == "off" or not spec.needs_safety_checker:
        logger.info("pictures of %s are not checked for safety", spec.name)
    else:
        fix = manifest.fix(spec.fix)
        pipeline.checker = load_safety_checker(
            folder, settings.safety, device, dtype, fix, small=memory.small
        )
    if place:
        pipeline.engine = OpenVinoEngine(diffusion, pipeline.decoder, place, settings, dtype, size)
    elif settings.engine in COMPILED:
        keep_compiled(folder.parent / CACHE / spec.name)
        recorder = None
        if device.type == "cuda" and not memory.small:  # which recordings would fill
            pipeline.text.record(cuda_recorder())
            recorder = cuda_recorder
        pipeline.compile(CompiledEngine(diffusion.unet, pipeline.decoder, recorder), settings.compiled)
    return pipeline


def _usual_size(spec: ModelSpec, settings: Settings) -> tuple[int, int]:
    """Of the images that the engine is made for, in px. Raises SettingsError for what cannot be generated."""
    name, sizes = "FEWSTEP_COMPILED", [(shape.width, shape.height) for shape in settings.compiled]
    if settings.engine in OPENVINO and settings.openvino_size:
        name, sizes = "FEWSTEP_OPENVINO_SIZE", [settings.openvino_size]
    elif settings.engine not in COMPILED or not sizes:
        return spec.native_size, spec.native_size
    for width, height in sizes:
        try:
            Inputs.create(spec, prompt="any", aspect_ratio="custom", width=width, height=height)
        except InvalidRequest as error:
            raise SettingsError(f"{name} has a size that cannot be painted: {error.sentence}") from None
    return sizes[0]


def multiply_in_fp8(pipeline: Pipeline) -> None:
    """Let the UNet's linear layers multiply in 8 bits, unless that fails, or an image comes out unlike that
    of 16 bits, or the GPU cannot; a line in the log says which. Raises DeviceLost."""
    device, unet = pipeline.device, pipeline.diffusion.unet
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < fp8.LEAST_CAPABILITY:
        logger.warning("this GPU does not multiply in 8 bits: FEWSTEP_ENGINE is taken for compiled")
        return
    prompts, seeds = pipeline.spec.examples[:1], [0]
    [exact] = pipeline.images(prompts, seeds)
    fp8.to_fp8(unet, multiply=True)
    pipeline.adapters.forget()
    pipeline.adapters.apply(Mix())
    try:
        [found] = pipeline.images(prompts, seeds)
        error = np.square(np.asarray(exact, dtype=float) - np.asarray(found, dtype=float)).mean()
        psnr = math.inf if error == 0 else 10 * math.log10(255**2 / error)
        if psnr >= LEAST_PSNR:
            logger.info("linear layers multiply in 8 bits: an image is %.1f dB from that of 16 bits", psnr)
            return
        why = f"an image is {psnr:.1f} dB from that of 16 bits, which is too far"
    except DeviceLost:
        raise
    except (FewstepError, RuntimeError) as failure:
        why = str(failure)
    logger.warning("linear layers do not multiply in 8 bits: %s", why)
    fp8.from_fp8(unet, pipeline.dtype)
    pipeline.adapters.forget()
    pipeline.adapters.apply(Mix())
