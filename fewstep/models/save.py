"""Make `weights/<name>/` from downloaded files: a diffusers folder in fp16, its LCM-LoRA, and a manifest.

One file at a time, so that no more than the largest is in memory; and in a folder beside the final one, which
takes its place only when everything is written: an interrupted save never looks finished.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import LCMScheduler
from safetensors import safe_open
from safetensors.torch import save_file

from fewstep.errors import WeightsError
from fewstep.models.hub import Download, link_or_copy, locked
from fewstep.models.load import PIPELINES
from fewstep.models.manifest import Origin, write_manifest
from fewstep.models.single_file import check_checkpoint, save_component
from fewstep.models.sources import LCM_LORA
from fewstep.models.specs import ModelSpec

# safetensors writes files that only their owner may read; what is linked keeps the mode that it has.
READABLE = 0o644
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


def save_model(
    spec: ModelSpec, files: Sequence[Download], weights_root: Path, checkpoint: Path | None = None
) -> Path:
    """Write the folder of `spec` from `files`, its networks from `checkpoint` if there is one, and return it.

    `checkpoint` is a single safetensors file as CivitAI's and the original SDXL's are. Raises WeightsError.
    """
    weights_root.mkdir(parents=True, exist_ok=True)
    folder, part = weights_root / spec.name, weights_root / f".{spec.name}.part"
    with locked(weights_root):
        _put_back(folder)
        if part.exists():
            shutil.rmtree(part)
        part.mkdir()
        origins = {}
        for one in files:
            _save_file(one, part / one.file.place)
            origins[one.file.place] = Origin(one.repo.name, one.repo.revision, one.repo.licence)
        (part / "model_index.json").write_text(json.dumps(_model_index(spec), indent=2) + "\n")
        extra = {}
        if checkpoint is not None:
            origins |= _save_checkpoint(spec, checkpoint, part)
            # Else a damaged file would be mended with the networks of the base.
            name = shlex.quote(checkpoint.name)
            extra["remedy"] = f"scripts/save-weights {spec.name} --from-single-file {name}"
        own = Origin("fewstep", "", spec.licence)
        write_manifest(part, model=spec.name, origin=own, origins=origins, extra=extra)
        _replace(folder, part)
    return folder


def _save_checkpoint(spec: ModelSpec, checkpoint: Path, part: Path) -> dict[str, Origin]:
    """Write its networks into `part`; the origin of each file, by its place there."""
    check_checkpoint(spec, checkpoint, part / "unet")
    with checkpoint.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    origin = Origin(checkpoint.name, f"sha256 {sha256}", "its maker's")
    origins = {}
    for component in spec.in_checkpoint:
        save_component(spec, checkpoint, component, part)
        for path in (part / component).iterdir():
            path.chmod(READABLE)
            origins[f"{component}/{path.name}"] = origin
    return origins


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
    target.chmod(READABLE)


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
    old = _aside(folder)
    if old.exists():
        shutil.rmtree(old)
    if folder.exists():
        folder.rename(old)
    part.rename(folder)
    if old.exists():
        shutil.rmtree(old)


def _put_back(folder: Path) -> None:
    """What was there before, when a save was killed between the two renames of `_replace`."""
    if _aside(folder).exists() and not folder.exists():
        _aside(folder).rename(folder)


def _aside(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.old")
