"""The UNet and the VAE's decoder as OpenVINO reads them, in `weights/.openvino/NAME/`.

    python -m fewstep.generation.engines.openvino_conversion MODEL WEIGHTS ENGINE HINT

converts with the LCM-LoRA fused; `converted` runs it when it is needed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from signal import SIGKILL
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fewstep.errors import SettingsError, WeightsError
from fewstep.models.load import Diffusion, load_merged
from fewstep.models.manifest import (
    MANIFEST,
    Origin,
    check_folder,
    check_hashes,
    check_sizes,
    read_manifest,
    write_manifest,
)
from fewstep.models.specs import get_model
from fewstep.settings import INT8, Settings

ROOT = Path(__file__).resolve().parents[3]
logger = logging.getLogger(__name__)

STDERR = 2  # for all that libraries say: our own standard output belongs to results
PACKAGE = "openvino==2026.4.1"
FOLDER = ".openvino"  # beside the models, whose own folders hold what their manifests list
HINTS = {torch.bfloat16: "bf16", torch.float32: "f32"}


def converted(folder: Path, settings: Settings, device: torch.device, dtype: torch.dtype) -> Path:
    """Where the networks of the model in `folder` are, as OpenVINO reads them; converted now if need be.

    Raises SettingsError without OpenVINO, on a GPU, for a dtype that it does not calculate in and for a size
    that the UNet cannot halve evenly; WeightsError when they cannot be converted.
    """
    engine = settings.engine
    if device.type != "cpu":
        raise SettingsError(f"FEWSTEP_ENGINE is {engine}, which is for CPUs; set FEWSTEP_DEVICE to cpu")
    if dtype not in HINTS:
        raise SettingsError(f"FEWSTEP_ENGINE is {engine}, which takes bf16 or fp32; set FEWSTEP_DTYPE to one")
    if importlib.util.find_spec("openvino") is None:
        raise SettingsError(f"FEWSTEP_ENGINE is {engine}, without openvino; run: pip install {PACKAGE}")
    # A level of the UNet that halves an odd number is doubled again by other operations than were traced.
    levels = len(json.loads((folder / "unet" / "config.json").read_text())["block_out_channels"])
    step = 8 * 2 ** (levels - 1)
    if settings.openvino_size and any(side % step for side in settings.openvino_size):
        width, height = settings.openvino_size
        raise SettingsError(
            f"FEWSTEP_OPENVINO_SIZE is {width}x{height}; OpenVINO takes multiples of {step} of {folder.name}"
        )
    place = _place(folder, engine, HINTS[dtype])
    if _is_sound(place, folder, settings.verify):
        return place
    # The hub's client takes a moment, and nothing is converted at most starts.
    from fewstep.models.hub import locked

    place.parent.mkdir(parents=True, exist_ok=True)
    with locked(place.parent):
        if _is_sound(place, folder, settings.verify):  # another server was quicker
            return place
        logger.info("converting %s for OpenVINO, once", folder.name)
        # In a process of its own: what a conversion takes of memory, it does not give back.
        arguments = (folder.name, str(settings.weights_root), engine, HINTS[dtype])
        command = [sys.executable, "-P", "-W", "ignore", "-m", __name__, *arguments]
        environ = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environ, check=False, stdout=STDERR)
        if done.returncode or not _is_sound(place, folder, settings.verify):
            # It is killed when the kernel wants memory back, which leaves nothing in a log.
            killed = done.returncode == -SIGKILL
            why = "it was killed, as for lack of memory" if killed else "the reason is in the log"
            raise WeightsError(f"{folder.name} could not be converted for OpenVINO; {why}")
    return place


def _place(folder: Path, engine: str, hint: str) -> Path:
    return folder.parent / FOLDER / folder.name / (f"{hint}-int8" if engine == INT8 else hint)


def _is_sound(place: Path, folder: Path, verify: str) -> bool:
    """Whether the conversion in `place` is whole and of what is in `folder`."""
    if not (place / MANIFEST).exists():
        return False
    try:
        manifest = read_manifest(place, fix="")
        check_sizes(place, manifest, fix="")
        if verify == "sha256":
            check_hashes(place, manifest, fix="")
    except WeightsError as error:
        logger.warning("what was converted for OpenVINO is damaged: %s", error.sentence.partition(";")[0])
        return False
    return manifest.extra == _made_of(folder)


def _made_of(folder: Path) -> dict[str, str]:
    """What a conversion was made of and by; this file too, since another may convert otherwise."""
    made_of = {"manifest": folder / MANIFEST, "conversion": Path(__file__)}
    hashes = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in made_of.items()}
    return hashes | {package: version(package) for package in ("openvino", "diffusers")}


class _UNet(nn.Module):
    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, latents: Tensor, timestep: Tensor, states: Tensor, *rest: Tensor) -> Tensor:
        conditions: dict[str, Any] = {}
        others = list(rest)
        if self.unet.config.addition_embed_type == "text_time":
            conditions["added_cond_kwargs"] = {"text_embeds": others.pop(0), "time_ids": others.pop(0)}
        if self.unet.config.time_cond_proj_dim:
            conditions["timestep_cond"] = others.pop(0)
        output: Tensor = self.unet(latents, timestep, states, return_dict=False, **conditions)[0]
        return output


class Decoder(nn.Module):
    """Latents, scaled back -> pixels, of an `AutoencoderKL`."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        pixels: Tensor = self.vae.decode(latents, return_dict=False)[0]
        return pixels


class _GroupNorm(nn.Module):
    """torch's for (1, C, ...), from means and variances of single channels.

    OpenVINO normalizes a group only in the order of torch's memory, between convolutions that run in
    channels_last: for a decoder, reordering back and forth is a twelfth of its time.
    """

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        channels, rest = x.shape[1], (1,) * (x.dim() - 2)
        places = tuple(range(2, x.dim()))
        grouped = (1, self.norm.num_groups, channels // self.norm.num_groups, *rest)
        means = x.mean(places, keepdim=True)
        variances = (x - means).square().mean(places, keepdim=True).view(grouped)
        means = means.view(grouped)
        mean = means.mean(2, keepdim=True)
        variance = (variances + (means - mean).square()).mean(2, keepdim=True)
        scale = self.norm.weight.view(grouped) * (variance + self.norm.eps).rsqrt()
        shift = self.norm.bias.view(grouped) - mean * scale
        return x * scale.view(1, channels, *rest) + shift.view(1, channels, *rest)


def examples(diffusion: Diffusion, rows: int, columns: int) -> dict[str, tuple[Tensor, ...]]:
    """One input of each kind for each network, of one image."""
    tokens = diffusion.tokenizer.model_max_length
    config = diffusion.unet.config
    latents = torch.zeros(1, config.in_channels, rows, columns)
    unet = [latents, torch.ones(1), torch.zeros(1, tokens, config.cross_attention_dim)]
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        unet += [torch.zeros(1, pooled), torch.ones(1, 6)]
    if config.time_cond_proj_dim:
        unet.append(torch.zeros(1, config.time_cond_proj_dim))
    return {"unet": tuple(unet), "vae": (latents,)}


def _replace_group_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.GroupNorm):
            setattr(module, name, _GroupNorm(child))
        else:
            _replace_group_norms(child)


def write(network: nn.Module, inputs: tuple[Tensor, ...], path: Path, hint: str) -> None:
    """Convert `network`, which is in fp32, to `path` and a .bin beside it; to 16 bits unless for f32."""
    import openvino  # optional, and takes a moment

    with torch.no_grad():
        model = openvino.convert_model(network, example_input=inputs)
    openvino.save_model(model, path, compress_to_fp16=hint != "f32")


def _compress(plain: Path, path: Path, hint: str) -> None:
    """Move a network from `plain` to `path`, with the weights of linear layers in 8 bits: symmetric, a scale
    for each output channel."""
    import openvino
    from openvino import opset13

    model = openvino.Core().read_model(plain)  # back from disk, where it takes no memory
    for node in model.get_ops():
        if node.get_type_name() != "MatMul":
            continue
        weights = node.input_value(1).get_node()
        if weights.get_type_name() == "Convert":  # from 16 bits
            weights = weights.input_value(0).get_node()
        if weights.get_type_name() != "Constant":  # attention's, of two activations
            continue
        values = weights.get_data().astype(np.float32)  # (out, in)
        scales = np.maximum(np.abs(values).max(1, keepdims=True), np.finfo(np.float32).tiny) / 127
        in_8_bits = opset13.convert(opset13.constant(np.rint(values / scales).astype(np.int8)), np.float32)
        node.input(1).replace_source_output(opset13.multiply(in_8_bits, opset13.constant(scales)).output(0))
    openvino.save_model(model, path, compress_to_fp16=hint != "f32")
    del model, weights
    for suffix in (".xml", ".bin"):
        plain.with_suffix(suffix).unlink()


def main(arguments: Sequence[str]) -> None:
    """Load a model and convert its UNet and its decoder, one after the other, since SDXL's together need more
    memory than many a machine has: MODEL WEIGHTS ENGINE HINT."""
    model, weights, engine, hint = arguments
    spec, settings = get_model(model), Settings(model=model, weights_root=Path(weights))
    folder = settings.weights_root / model
    manifest = check_folder(folder, fix=spec.fix)
    [dtype] = [dtype for dtype, known in HINTS.items() if known == hint]
    diffusion = load_merged(spec, settings, manifest, torch.device("cpu"), dtype)[0]
    inputs = examples(diffusion, 8, 8)
    unet, decoder = _UNet(diffusion.unet), Decoder(diffusion.vae)
    del diffusion  # with the text encoders
    place = _place(folder, engine, hint)
    unfinished = place.with_suffix(".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    # In fp32, since what is bf16 in the conversion has NaNs after every GroupNorm; OpenVINO itself takes 16
    # bits where it can.
    if engine == INT8:
        write(unet.float(), inputs["unet"], unfinished / "plain.xml", hint)
        _compress(unfinished / "plain.xml", unfinished / "unet.xml", hint)
    else:
        write(unet.float(), inputs["unet"], unfinished / "unet.xml", hint)
    del unet
    _replace_group_norms(decoder.float())
    write(decoder, inputs["vae"], unfinished / "vae.xml", hint)
    write_manifest(unfinished, model=place.name, origin=Origin("fewstep", "", ""), extra=_made_of(folder))
    shutil.rmtree(place, ignore_errors=True)
    unfinished.rename(place)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    main(sys.argv[1:])
