"""Make `weights/<name>/` from downloaded files: a diffusers folder in fp16, its LCM-LoRA, and a manifest.

One file at a time, so that no more than the largest is in memory; and in a folder beside the final one, which
takes its place only when everything is written: an interrupted save never looks finished.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import LCMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError
from safetensors import safe_open
from safetensors.torch import save_file

from fewstep.errors import WeightsError
from fewstep.hub import Download, link_or_copy
from fewstep.models import ModelSpec
from fewstep.weights import Origin, write_manifest

logger = logging.getLogger(__name__)

LCM_LORA = "lcm_lora.safetensors"
PIPELINES = {"sdxl": StableDiffusionXLPipeline, "sd": StableDiffusionPipeline}
_ENCODERS = {
    "sdxl": {
        "text_encoder": ("transformers", "CLIPTextModel"),
        "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
        "tokenizer_2": ("transformers", "CLIPTokenizer"),
    },
    "sd": {
        "text_encoder": ("transformers", "CLIPTextModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
    },
}

_CHECKPOINT_PREFIXES = {
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


def save_model(
    spec: ModelSpec, files: Sequence[Download], weights_root: Path, checkpoint: Path | None = None
) -> Path:
    """Write the folder of `spec` from `files`, its networks from `checkpoint` if there is one, and return it.

    `checkpoint` is a single safetensors file as CivitAI's and the original SDXL's are. Raises WeightsError.
    """
    folder, part = weights_root / spec.name, weights_root / f".{spec.name}.part"
    if part.exists():
        shutil.rmtree(part)
    part.mkdir(parents=True)
    origins = {}
    for one in files:
        _save_file(one, part / one.file.place)
        origins[one.file.place] = Origin(one.repo.name, one.repo.revision, one.repo.licence)
    (part / "model_index.json").write_text(json.dumps(_model_index(spec), indent=2) + "\n")
    if checkpoint is not None:
        for component in spec.in_checkpoint:
            _save_component(spec, checkpoint, component, part)
    for path in part.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes files that only their owner may read
    write_manifest(
        part,
        model=spec.name,
        origin=Origin(checkpoint.name if checkpoint else "fewstep", "", spec.licence),
        origins=origins,
    )
    _replace(folder, part)
    return folder


def _save_file(one: Download, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    place = one.file.place
    if place == "scheduler/scheduler_config.json":
        config = json.loads(one.path.read_text(encoding="utf-8"))
        LCMScheduler.from_config(config).save_config(target.parent)
    elif place == "vae/config.json":
        config = json.loads(one.path.read_text(encoding="utf-8"))
        target.write_text(json.dumps({**config, "force_upcast": False}, indent=2) + "\n")
    elif place == LCM_LORA:
        link_or_copy(one.path, target)
    elif place.endswith(".safetensors"):
        _save_in_fp16(one.path, target)
    else:
        shutil.copyfile(one.path, target)  # not a link: people edit these in place


def _save_in_fp16(source: Path, target: Path) -> None:
    """A file in fp16 is taken as it is; of any other, one tensor after the other is converted."""
    wide = (torch.float32, torch.bfloat16, torch.float64)
    tensors = {}
    with safe_open(source, framework="pt") as file:
        kinds = {file.get_slice(name).get_dtype() for name in file.keys()}
        if kinds.isdisjoint({"F32", "BF16", "F64"}):
            link_or_copy(source, target)
            return
        for name in file.keys():
            tensor = file.get_tensor(name)
            tensors[name] = tensor.half() if tensor.dtype in wide else tensor
            if not torch.isfinite(tensors[name]).all():
                raise WeightsError(
                    f"{target.parent.name}/{source.name} does not fit in fp16, first in {name}"
                )
    save_file(tensors, target, metadata={"format": "pt"})


def _save_component(spec: ModelSpec, checkpoint: Path, component: str, part: Path) -> None:
    """Take one network out of a single-file checkpoint; all others are left where they are."""
    pipeline = PIPELINES[spec.family]
    names = [name for name in _model_index(spec) if not name.startswith("_") and name != component]
    with safe_open(checkpoint, framework="pt") as file:
        found = any(key.startswith(_CHECKPOINT_PREFIXES[spec.family][component]) for key in file.keys())
    if not found:  # diffusers would leave some of them as they were made: random
        raise _not_of_family(spec, checkpoint, component)
    try:
        loaded = pipeline.from_single_file(
            str(checkpoint),
            config=str(part),
            torch_dtype=torch.float16,
            local_files_only=True,
            **dict.fromkeys(names),
        )
    except (KeyError, ValueError, RuntimeError, OSError, SingleFileComponentError) as error:
        logger.debug("%s", error, exc_info=True)
        raise _not_of_family(spec, checkpoint, component) from None
    getattr(loaded, component).save_pretrained(part / component, safe_serialization=True)


def _not_of_family(spec: ModelSpec, checkpoint: Path, component: str) -> WeightsError:
    return WeightsError(
        f"{checkpoint.name} does not hold the {component} of a checkpoint of {spec.name}; give one of the "
        "same family, or the name of another model"
    )


def _model_index(spec: ModelSpec) -> dict[str, Any]:
    """What diffusers reads first: the class of the pipeline and of each of its parts."""
    parts = {
        "scheduler": ("diffusers", "LCMScheduler"),
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        **_ENCODERS[spec.family],
    }
    switches = (
        {"force_zeros_for_empty_prompt": True}
        if spec.family == "sdxl"
        else {"requires_safety_checker": False}
    )
    return {
        "_class_name": PIPELINES[spec.family].__name__,
        **switches,
        **{k: list(v) for k, v in sorted(parts.items())},
    }


def _replace(folder: Path, part: Path) -> None:
    old = folder.with_name(f".{folder.name}.old")
    if old.exists():
        shutil.rmtree(old)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    if old.exists():
        shutil.rmtree(old)
