"""Single-file checkpoints, as fine-tunes are shared: whether one is of a model's kind, and its networks.

The layout is that of the original releases: CompVis' for SD, Stability's for SDXL. diffusers converts it; it
also passes over keys that it does not know and parts that are missing, so those are looked for here first.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import SafetensorError, safe_open

from fewstep.errors import WeightsError
from fewstep.models.load import PIPELINES
from fewstep.models.specs import ModelSpec

logger = logging.getLogger(__name__)

_PREFIXES = {
    "sdxl": {
        "unet": "model.diffusion_model.",
        "text_encoder": "conditioner.embedders.0.transformer.text_model.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
    "sd": {
        "unet": "model.diffusion_model.",
        "text_encoder": "cond_stage_model.transformer.text_model.",
        "vae": "first_stage_model.",
    },
}
# Keys that mark a model whose network answers another question than SDXL's, or on another noise schedule.
_OTHER_PREDICTIONS = {"v_pred", "ztsnr", "edm_mean", "edm_vpred.sigma_max"}


def check_checkpoint(spec: ModelSpec, checkpoint: Path, unet_config: Path) -> None:
    """Raise WeightsError, in one sentence, unless `checkpoint` holds all networks of a model like `spec`.

    Only the file's list of tensors is read. What it cannot tell is an SD 1.5 model that predicts v.
    """
    prefixes = _PREFIXES[spec.family]
    if checkpoint.suffix != ".safetensors":  # diffusers would unpickle it
        raise WeightsError("a checkpoint must be a .safetensors file; nothing else is opened")
    try:
        with safe_open(checkpoint, framework="pt") as file:
            keys, metadata = list(file.keys()), file.metadata() or {}
            first = prefixes["unet"] + "input_blocks.0.0.weight"
            channels = file.get_slice(first).get_shape()[1] if first in keys else 0
    except SafetensorError:
        raise WeightsError(f"{checkpoint.name} is not a whole safetensors file; fetch it anew") from None
    for component in spec.in_checkpoint:
        if not any(key.startswith(prefixes[component]) for key in keys):
            raise _refused(spec, checkpoint, f"has no {component} of {spec.name}'s kind in it")
    if _OTHER_PREDICTIONS & set(keys) or metadata.get("modelspec.prediction_type") == "v":
        raise _refused(spec, checkpoint, "predicts v or has a noise schedule of its own")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(unet_config))
    if channels != unet.config.in_channels:
        raise _refused(
            spec, checkpoint, f"has {channels} input channels, as inpainting and editing models do"
        )
    count, expected = sum(key.startswith(prefixes["unet"]) for key in keys), len(unet.state_dict())
    if count != expected:  # the names differ, but each tensor has its own
        raise _refused(spec, checkpoint, f"has a UNet of {count} tensors where {expected} are expected")


def save_component(spec: ModelSpec, checkpoint: Path, component: str, folder: Path) -> None:
    """Write one network of `checkpoint` into the diffusers folder `folder`, in fp16. Raises WeightsError."""
    pipeline = PIPELINES[spec.family]
    index = pipeline.load_config(folder)
    others = {name: None for name, kind in index.items() if isinstance(kind, list) and name != component}
    try:
        loaded: Any = pipeline.from_single_file(
            str(checkpoint), config=str(folder), torch_dtype=torch.float16, local_files_only=True, **others
        )
        network = getattr(loaded, component)
        broken = [name for name, value in network.state_dict().items() if not value.isfinite().all()]
        if broken:
            raise _refused(spec, checkpoint, f"does not fit in fp16, first in {broken[0]} of its {component}")
        network.save_pretrained(folder / component, safe_serialization=True)
    # NotImplementedError, which is a RuntimeError: a tensor that the checkpoint lacks has no data to copy.
    except (KeyError, ValueError, RuntimeError, SingleFileComponentError) as error:
        logger.info("diffusers cannot read its %s: %s", component, error)
        raise _refused(spec, checkpoint, f"has no whole {component} of {spec.name}'s kind in it") from None


def _refused(spec: ModelSpec, checkpoint: Path, what: str) -> WeightsError:
    return WeightsError(
        f"{checkpoint.name} {what}, and cannot become {spec.name}; give a plain checkpoint of that family"
    )
