"""Make `weights/<name>/` from downloaded files: a diffusers folder in fp16, its LCM-LoRA, and a manifest.

One file at a time, so that no more than the largest is in memory; and in a folder beside the final one, which
takes its place only when everything is written: an interrupted save never looks finished.
"""

from __future__ import annotations

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
from fewstep.models.manifest import Origin, sha256_of, write_manifest
from fewstep.models.single_file import check_checkpoint, save_component
from fewstep.models.sources import LCM_LORA
from fewstep.models.specs import ModelSpec

# safetensors writes files that only their owner may read; what is linked keeps the mode that it has.
READABLE = 0o644


def save_model(
    spec: ModelSpec, files: Sequence[Download], weights_root: Path, checkpoint: Path | None = None
) -> Path:
    """Write the folder of `spec` from `files`, its networks from `checkpoint` if there is one, and return it.

    `checkpoint` is a single safetensors file as CivitAI's and the original SDXL's are. Raises WeightsError.
    """
    weights_root.mkdir(parents=True, exist_ok=True)
    folder, part = weights_root / spec.name, weights_root / f".{spec.name}.part"
    old = weights_root / f".{spec.name}.old"
    with locked(weights_root):
        if old.exists() and not folder.exists():  # a save was killed between the two renames below
            old.rename(folder)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        origins = {}
        for download in files:
            _save_file(download, part / download.file.place)
            repo = download.repo
            origins[download.file.place] = Origin(repo.name, repo.revision, repo.licence)
        (part / "model_index.json").write_text(json.dumps(_model_index(spec), indent=2) + "\n")
        extra = {}
        if checkpoint is not None:
            origins |= _save_checkpoint(spec, checkpoint, part)
            # Else a damaged file would be mended with the networks of the base.
            command = f"scripts/save-weights {spec.name} --from-single-file"
            extra["remedy"] = f"{command} {shlex.quote(checkpoint.name)}"
        own = Origin("fewstep", "", spec.licence)
        write_manifest(part, model=spec.name, origin=own, origins=origins, extra=extra)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        part.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    return folder


def _save_checkpoint(spec: ModelSpec, checkpoint: Path, part: Path) -> dict[str, Origin]:
    """Write its networks into `part`; return the origin of each file, by its place there."""
    check_checkpoint(spec, checkpoint, part / "unet")
    origin = Origin(checkpoint.name, f"sha256 {sha256_of(checkpoint)}", "its maker's")
    origins = {}
    for component in spec.in_checkpoint:
        save_component(spec, checkpoint, component, part)
        for path in (part / component).iterdir():
            path.chmod(READABLE)
            origins[f"{component}/{path.name}"] = origin
    return origins


def _save_file(download: Download, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source, place = download.path, download.file.place
    if place == "scheduler/scheduler_config.json":
        LCMScheduler.from_config(json.loads(source.read_bytes())).save_config(target.parent)
    elif place == "vae/config.json":
        config = json.loads(source.read_bytes()) | {"force_upcast": False}
        target.write_text(json.dumps(config, indent=2) + "\n")
    elif place == LCM_LORA:
        link_or_copy(source, target)
    elif place.endswith(".safetensors"):
        _save_in_fp16(source, target)
    else:
        shutil.copyfile(source, target)  # not a link: people edit these in place


def _save_in_fp16(source: Path, target: Path) -> None:
    """Take a file in fp16 as it is; of any other, convert one tensor after the other."""
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
            if not tensors[name].isfinite().all():
                shown = f"{target.parent.name}/{source.name}"
                raise WeightsError(f"{shown} does not fit in fp16, first in {name}")
    save_file(tensors, target, metadata={"format": "pt"})
    target.chmod(READABLE)


def _model_index(spec: ModelSpec) -> dict[str, Any]:
    """Return what diffusers reads first: the class of the pipeline and of each of its parts."""
    parts = {
        "scheduler": ["diffusers", "LCMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
    }
    switch = {"requires_safety_checker": False}
    if spec.family == "sdxl":
        parts["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
        parts["tokenizer_2"] = parts["tokenizer"]
        switch = {"force_zeros_for_empty_prompt": True}
    return {"_class_name": PIPELINES[spec.family].__name__, **switch, **dict(sorted(parts.items()))}
