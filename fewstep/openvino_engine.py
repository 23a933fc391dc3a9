"""OpenVINO on a CPU: a second copy of the UNet and of the VAE's decoder, compiled for one size of picture.

Both are converted once, with the LCM-LoRA fused, into `weights/.openvino/NAME/`. They serve what is painted
by the weights as they were converted, at that size; all else runs on torch.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import SettingsError, WeightsError
from fewstep.request import Mix, Request
from fewstep.settings import Settings
from fewstep.text_encoding import Diffusion
from fewstep.weights import MANIFEST

ROOT = Path(__file__).resolve().parents[1]
logger = logging.getLogger(__name__)

FOLDER = ".openvino"  # beside the models, whose own folders hold what their manifests list
_STAMP = "stamp.json"
_HINTS = {torch.bfloat16: "bf16", torch.float32: "f32"}


class OpenVinoEngine:
    """`unet` and `decode` for requests that it `serves`; pictures of a batch go through one by one, which on
    a CPU takes no longer, and gives each the same pixels in any batch."""

    def __init__(self, diffusion: Diffusion, place: Path, dtype: torch.dtype, size: tuple[int, int]) -> None:
        """Compile what `converted` put into `place`, for pictures of `size`, width and height in px."""
        import openvino  # optional, and takes a moment

        self.size = size
        width, height = size
        core = openvino.Core()
        config = {"INFERENCE_PRECISION_HINT": _HINTS[dtype], "PERFORMANCE_HINT": "LATENCY"}
        self._infer: dict[str, Callable[[list[Tensor]], Tensor]] = {}
        for name, given in _examples(diffusion, height // 8, width // 8).items():
            model = core.read_model(place / f"{name}.xml")
            model.reshape(dict(zip(model.inputs, [list(one.shape) for one in given], strict=True)))
            request = core.compile_model(model, "CPU", config).create_infer_request()
            self._infer[name] = partial(_run, request)
        logger.info("OpenVINO %s paints pictures of %dx%d px", openvino.__version__, width, height)

    def serves(self, request: Request) -> bool:
        """Whether it was compiled for what `request` asks."""
        return (
            (request.width, request.height) == self.size
            and request.chunks == 1
            and request.weights_key == Mix().key
        )

    def unet(self, latents: Tensor, timestep: Tensor, condition: dict[str, Any]) -> Tensor:
        """What `UNet2DConditionModel` gives for (N, C, H / 8, W / 8)."""
        columns = [latents, timestep.expand(len(latents)), *_conditions(condition)]
        return torch.cat(
            [self._infer["unet"]([column[i : i + 1] for column in columns]) for i in range(len(latents))]
        )

    def decode(self, latents: Tensor) -> Tensor:
        """What the VAE gives for (N, C, H / 8, W / 8): (N, 3, H, W)."""
        return torch.cat([self._infer["vae"]([one]) for one in torch.split(latents, 1)])


def _run(request: Any, tensors: list[Tensor]) -> Tensor:
    # In fp32 on the outside, since numpy has no bf16.
    found = request.infer([tensor.to(torch.float32).contiguous().numpy() for tensor in tensors])
    return torch.from_numpy(next(iter(found.values())).copy())


class _UNet(nn.Module):
    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, latents: Tensor, timestep: Tensor, states: Tensor, *rest: Tensor) -> Tensor:
        given: dict[str, Any] = {}
        others = list(rest)
        if self.unet.config.addition_embed_type == "text_time":
            given["added_cond_kwargs"] = {"text_embeds": others.pop(0), "time_ids": others.pop(0)}
        if self.unet.config.time_cond_proj_dim:
            given["timestep_cond"] = others.pop(0)
        output: Tensor = self.unet(latents, timestep, states, return_dict=False, **given)[0]
        return output


class _Decoder(nn.Module):
    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        pixels: Tensor = self.vae.decode(latents, return_dict=False)[0]
        return pixels


def _conditions(condition: dict[str, Any]) -> list[Tensor]:
    """In the order in which `_UNet` takes them."""
    added = condition.get("added_cond_kwargs", {})
    named = [condition["encoder_hidden_states"], added.get("text_embeds"), added.get("time_ids")]
    return [one for one in (*named, condition.get("timestep_cond")) if one is not None]


def _examples(diffusion: Diffusion, rows: int, columns: int) -> dict[str, tuple[Tensor, ...]]:
    """One input of each kind for each network."""
    tokens = diffusion.tokenizer.model_max_length
    config = diffusion.unet.config
    latents = torch.zeros(1, config.in_channels, rows, columns)
    given = [latents, torch.ones(1), torch.zeros(1, tokens, config.cross_attention_dim)]
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        given += [torch.zeros(1, pooled), torch.ones(1, 6)]
    if config.time_cond_proj_dim:
        given.append(torch.zeros(1, config.time_cond_proj_dim))
    return {"unet": tuple(given), "vae": (latents,)}


def converted(folder: Path, settings: Settings, device: torch.device, dtype: torch.dtype) -> Path:
    """Where the networks of the model in `folder` are, as OpenVINO reads them; converted now if need be.

    Raises SettingsError without OpenVINO, on a GPU and for a dtype that it does not calculate in,
    WeightsError when they cannot be converted.
    """
    if device.type != "cpu":
        raise SettingsError("FEWSTEP_ENGINE is openvino, which is for CPUs; set FEWSTEP_DEVICE to cpu")
    if dtype not in _HINTS:
        raise SettingsError("FEWSTEP_ENGINE is openvino, which takes bf16 or fp32; set FEWSTEP_DTYPE to one")
    if importlib.util.find_spec("openvino") is None:
        raise SettingsError("FEWSTEP_ENGINE is openvino, which is not installed; run: pip install openvino")
    place = folder.parent / FOLDER / folder.name / _HINTS[dtype]
    stamp = _stamp_of(folder)
    if not _is_stamped(place, stamp):
        logger.info("converting %s for OpenVINO, once", folder.name)
        # In a process of its own: what a conversion takes of memory, it does not give back.
        arguments = (settings.model, str(settings.weights_root), str(place), _HINTS[dtype])
        command = [sys.executable, "-P", "-W", "ignore", "-m", __name__, *arguments]
        done = subprocess.run(command, cwd=ROOT, check=False)
        if done.returncode or not _is_stamped(place, stamp):
            raise WeightsError(f"{folder.name} could not be converted for OpenVINO; the reason is in the log")
    return place


def _is_stamped(place: Path, stamp: dict[str, str]) -> bool:
    try:
        return bool(json.loads((place / _STAMP).read_text()) == stamp)
    except (OSError, ValueError):
        return False


def _stamp_of(folder: Path) -> dict[str, str]:
    manifest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    return {"manifest": manifest, "openvino": version("openvino"), "diffusers": version("diffusers")}


def convert(diffusion: Diffusion, folder: Path, place: Path, *, compress: bool) -> None:
    """Write the UNet and the VAE's decoder of `diffusion` to `place`, in 16 bits if `compress`."""
    import openvino

    unfinished = place.with_suffix(".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    examples = _examples(diffusion, 8, 8)
    networks: dict[str, Callable[[], nn.Module]] = {
        "unet": lambda: _UNet(_exact(diffusion.unet)),
        "vae": lambda: _Decoder(_exact(diffusion.vae)),
    }
    for name, network in networks.items():
        with torch.no_grad():
            model = openvino.convert_model(network(), example_input=examples[name])
        openvino.save_model(model, unfinished / f"{name}.xml", compress_to_fp16=compress)
        del model
    (unfinished / _STAMP).write_text(json.dumps(_stamp_of(folder)))
    shutil.rmtree(place, ignore_errors=True)
    unfinished.rename(place)


def _exact(module: nn.Module) -> nn.Module:
    """A copy in fp32: what is bf16 in the conversion has NaNs after every GroupNorm, while OpenVINO itself
    takes 16 bits where it can."""
    return copy.deepcopy(module).float()


def main(arguments: Sequence[str]) -> None:
    """Load a model and convert it: MODEL WEIGHTS PLACE HINT."""
    from fewstep.models import get_model
    from fewstep.pipeline import load_pipeline  # which imports this module

    model, weights, place, hint = arguments
    dtype = {"bf16": "bf16", "f32": "fp32"}[hint]
    settings = Settings(model=model, weights_root=Path(weights), dtype=dtype, safety="off", device="cpu")
    pipeline = load_pipeline(get_model(model), settings)
    convert(pipeline.diffusion, Path(weights) / model, Path(place), compress=hint != "f32")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    main(sys.argv[1:])
