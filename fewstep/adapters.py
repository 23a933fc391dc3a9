"""LCM-LoRA arithmetic: read an adapter, check that it fits and is finite, add it to the weights for good.

LoRA is W' = W + scale * alpha / r * B A (Hu et al., arXiv 2106.09685). The sum is made in float64 and rounded
once, to the dtype of W, so that it is the same on every device and for every way to write the file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fewstep.errors import WeightsError

# kohya-ss, PEFT as diffusers saves it, and diffusers before PEFT.
_ENDINGS = {
    "down": (".lora_down.weight", ".lora_A.weight", ".lora.down.weight"),
    "up": (".lora_up.weight", ".lora_B.weight", ".lora.up.weight"),
    "alpha": (".alpha",),
}
# What PEFT may do to a layer beside adding B A: another sum, which would come out wrong in silence.
_OTHER_SUMS = ("alpha_pattern", "use_dora", "use_rslora")


@dataclass(frozen=True)
class LoraModule:
    """What an adapter adds to one layer: A (r, in, ...), B (out, r, ...) and alpha / r."""

    down: Tensor
    up: Tensor
    factor: float

    def is_finite(self) -> bool:
        """Whether no value is NaN or infinite."""
        return math.isfinite(self.factor) and bool(self.down.isfinite().all() and self.up.isfinite().all())

    def add_to(self, weight: Tensor, scale: float) -> None:
        """W += scale * alpha / r * B A; both are matrices here, a kernel's places being further inputs."""
        up, down = (part.to(weight.device, torch.float64).flatten(1) for part in (self.up, self.down))
        total = torch.addmm(weight.double().flatten(1), up, down, alpha=scale * self.factor)
        weight.copy_(total.view_as(weight))


@torch.no_grad()
def fuse_lcm_lora(unet: nn.Module, path: Path, remedy: str, scale: float = 1.0) -> int:
    """Add the LCM-LoRA in `path` to the weights of `unet`; no adapter is left behind.

    Returns how many modules were changed: each of the file's. Loaders that skip convolutions merge only 515
    of the 788 modules of SDXL's LCM-LoRA and say nothing. Raises WeightsError, before anything is changed, if
    a module of the file does not fit its layer or holds a value that is not finite.
    """
    shown = f"weights/{path.parent.name}/{path.name}"
    try:
        parts, alpha = _read(path)
    except (SafetensorError, ValueError) as error:  # ValueError: a header that is no JSON
        raise WeightsError(f"{shown} cannot be read ({error}); run: {remedy}") from None
    weights = _weights_by_name(unet)
    found = {name: _module(part, alpha, weights.get(name)) for name, part in parts.items()}
    modules = {name: module for name, module in found.items() if module is not None}
    for what, names in {
        "do not fit this model": [name for name, module in found.items() if module is None],
        "hold values that are not finite": [name for name, one in modules.items() if not one.is_finite()],
    }.items():
        if names:
            raise WeightsError(
                f"{shown}: {len(names)} of its {len(found)} modules {what}, first {names[0]}; run: {remedy}"
            )
    if not modules:
        raise WeightsError(f"{shown} has no modules; run: {remedy}")
    for name, module in modules.items():
        module.add_to(weights[name], scale)
    return len(modules)


def _weights_by_name(unet: nn.Module) -> dict[str, Tensor]:
    """What a LoRA can change, by the one name that all ways to write the file lead to: kohya's."""
    layers = ((path, part) for path, part in unet.named_modules() if isinstance(part, nn.Linear | nn.Conv2d))
    return {path.replace(".", "_"): layer.weight for path, layer in layers}


def _read(path: Path) -> tuple[dict[str, dict[str, Tensor]], float | None]:
    """The tensors of each module, "down", "up" and "alpha" if it has one, and the alpha of all others."""
    parts: dict[str, dict[str, Tensor]] = {}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():
            name, kind = _split(key)
            parts.setdefault(name, {})[kind] = file.get_tensor(key)
        return parts, _alpha_of_all(file.metadata() or {})


def _split(key: str) -> tuple[str, str]:
    """A key's module and what it holds of it; a key of any other kind is a module of its own, that fits
    nowhere."""
    kinds = ((kind, ending) for kind, endings in _ENDINGS.items() for ending in endings)
    kind, ending = next(((kind, ending) for kind, ending in kinds if key.endswith(ending)), ("?", ""))
    module = key.removesuffix(ending).removeprefix("lora_unet_").removeprefix("unet.")
    return (module.replace(".", "_") if ending else key), kind


def _alpha_of_all(metadata: Mapping[str, str]) -> float | None:
    """The alpha that PEFT writes once, into the file's header; None, if there is none, means the rank."""
    written = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    if not isinstance(written, dict):
        raise ValueError("its header is not PEFT's")
    config = {key.removeprefix("unet."): value for key, value in written.items()}
    if any(config.get(kind) for kind in _OTHER_SUMS):
        raise ValueError("not a plain LoRA")
    alpha = config.get("lora_alpha")
    return None if alpha is None else float(alpha)


def _module(parts: Mapping[str, Tensor], alpha: float | None, weight: Tensor | None) -> LoraModule | None:
    """None if the module has no layer, is not whole, or B A has not the layer's shape."""
    down, up = parts.get("down"), parts.get("up")
    if weight is None or down is None or up is None or down.ndim < 2 or up.ndim < 2:
        return None
    rank = len(down)
    inputs, outputs = weight.flatten(1).shape[1], len(weight)
    if not rank or down.flatten(1).shape[1] != inputs or up.flatten(1).shape != (outputs, rank):
        return None
    if "alpha" in parts:
        if parts["alpha"].numel() != 1:
            return None
        alpha = parts["alpha"].item()
    return LoraModule(down, up, 1.0 if alpha is None else alpha / rank)
