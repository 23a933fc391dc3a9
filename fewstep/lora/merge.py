"""The LCM-LoRA and style LoRAs: read one, check that it fits, sum them into the weights, and back, exactly.

    tau' = sum of lambda_i * tau_i + lambda_LCM * tau_LCM        (Luo et al., arXiv 2311.05556, section 3)

Each tau is a LoRA, W' = W + scale * alpha / r * B A (Hu et al., arXiv 2106.09685). W is always taken from the
model's verified files and never from what was made of it, so that nothing decays, however often styles
change. The sum is made in float64 and rounded once, to the dtype of the weights, so that it is the same for
every way to write the file. It is written into the buffers that are there: no layer is wrapped or replaced.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors import safe_open
from torch import Tensor, nn

from fewstep.errors import LoraError
from fewstep.lora.types import MAX_BYTES, Lora, LoraModule, Mix

# What a LoRA may change, by the model's family.
NETWORKS = {"sdxl": ("unet", "text_encoder", "text_encoder_2"), "sd": ("unet", "text_encoder")}
# The published ones have 0.4 MB; what a header names is held in memory as Python objects.
MAX_HEADER_BYTES = 4 * 10**6
# Of all that a LoRA adds, compared with the weights that it changes; what is of any use adds a fraction.
MAX_SHARE = 1.0
# A higher rank than a layer is wide says nothing more, and takes memory by its square.
ANY_RANK = 1024

# kohya-ss, PEFT as diffusers saves it, and diffusers before PEFT.
_ENDINGS = {
    **dict.fromkeys((".lora_down.weight", ".lora_A.weight", ".lora.down.weight"), "down"),
    **dict.fromkeys((".lora_up.weight", ".lora_B.weight", ".lora.up.weight"), "up"),
    ".alpha": "alpha",
}
_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",  # of SD, which has one
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    **{f"{network}.": network for network in NETWORKS["sdxl"]},
}
# What PEFT may do to a layer beside adding B A: another sum, which would come out wrong in silence.
_OTHER_SUMS = ("alpha_pattern", "use_dora", "use_rslora")
# The names of the original releases, in which many style LoRAs for SDXL are written.
_LDM = ("lora_unet_input_blocks_", "lora_unet_middle_block_", "lora_unet_output_blocks_")
_FLOATS = {torch.float16, torch.bfloat16, torch.float32}


class WeightMerger:
    """A model's weights as the sum of what its files hold and of LoRAs.

    `folder` is the model's. `apply` belongs to the thread that owns the model; `read` may run on any. What
    the files hold is mapped from them, and goes to the device in their dtype when it is asked for; with
    `keep`, the networks' weights, which must be as they were loaded, and the LCM-LoRA are kept there, so
    that a change of style moves its own LoRA alone.
    """

    def __init__(self, folder: Path, networks: Mapping[str, nn.Module], *, keep: bool = False) -> None:
        self._layers: dict[str, Any] = {}
        self._pristine: dict[str, Tensor] = {}
        for network, module in networks.items():
            self._layers |= layers_by_name(network, module)
            (path,) = (folder / network).glob("*.safetensors")
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    if key.endswith(".weight"):
                        self._pristine[_layer(network, key.removesuffix(".weight"))] = file.get_tensor(key)
        self._keep = keep
        for name, layer in self._layers.items() if keep else ():
            if layer.weight.dtype == self._pristine[name].dtype:  # else the file holds more than the network
                self._pristine[name] = layer.weight.detach().clone()
        self._norms = {name: layer.weight.float().norm().item() for name, layer in self._layers.items()}
        self._unet_config = networks["unet"].config
        self._applied: dict[str, tuple[tuple[str, float], ...] | None] = {}
        self._reading = threading.Lock()
        self._lcm_lora: Lora | None = None

    @property
    def lcm_lora(self) -> Lora | None:
        """What `Mix.lcm_scale` scales; a full LCM has none."""
        return self._lcm_lora

    @lcm_lora.setter
    def lcm_lora(self, lora: Lora) -> None:
        if self._keep:
            kept = {
                name: replace(
                    module,
                    **{
                        part: getattr(module, part).to(self._layers[name].weight.device)
                        for part in ("down", "up")
                    },
                )
                for name, module in lora.modules.items()
            }
            lora = replace(lora, modules=kept)
        self._lcm_lora = lora

    def read(self, path: Path, sha256: str) -> Lora:
        """Return the LoRA in the file `path`, in the layout of kohya (with diffusers' names or LDM's), PEFT,
        or diffusers before PEFT.

        Raises LoraError unless every module of the file fits its layer and is finite. Loaders that skip
        what they do not know merge only 515 of the 788 modules of SDXL's LCM-LoRA and say nothing.
        """
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise LoraError(f"has {size} bytes; at most {MAX_BYTES} are allowed")
        with path.open("rb") as start:
            if int.from_bytes(start.read(8), "little") > MAX_HEADER_BYTES:
                raise LoraError("is not a safetensors file, or has a header of more than 4 MB")
        with self._reading:  # a file may be large, and callers many
            try:
                with safe_open(path, framework="pt") as file:
                    # Copies: the file may be removed or written over while this is in use.
                    tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
                    alphas = _alphas_of_networks(file.metadata() or {})
                return Lora(sha256, self._fitted(_grouped(self._without_ldm_names(tensors)), alphas))
            except (LoraError, FileNotFoundError):
                raise
            except Exception as error:  # it is a stranger's file, and the parsers trust it
                raise LoraError("cannot be read", f" ({type(error).__name__}: {error})") from None

    @torch.no_grad()
    def apply(self, mix: Mix) -> int:
        """Make the weights what `mix` says, and return how many layers were written.

        Only layers that change are. If it fails in the middle, the next call writes what is unfinished.
        """
        terms: list[tuple[Lora, float]] = [(style, scale) for style, scale in mix.styles if scale]
        if self.lcm_lora is not None and mix.lcm_scale:
            terms.insert(0, (self.lcm_lora, mix.lcm_scale))
        written = 0
        for layer in self._applied.keys() | {name for lora, _ in terms for name in lora.modules}:
            of_layer = [(lora, scale) for lora, scale in terms if layer in lora.modules]
            wanted = tuple((lora.sha256, scale) for lora, scale in of_layer)
            if self._applied.get(layer, ()) == wanted:
                continue
            self._applied[layer] = None  # unknown, until all of it is written
            weight = self._layers[layer].weight
            # Over the bus in the file's dtype: in float64 it would be four times as much.
            total = self._pristine[layer].to(weight.device)
            if of_layer:
                total = total.to(torch.float64).flatten(1)
                for lora, scale in of_layer:
                    add_to(total, lora.modules[layer], scale)
            store = getattr(self._layers[layer], "store", weight.copy_)  # of layers that keep 8 bits
            store(total.view_as(weight))
            self._applied[layer] = wanted
            written += 1
        return written

    def forget(self) -> None:
        """Take all weights for unknown, to be written by the next `apply`, since layers are of another kind
        now."""
        self._applied = dict.fromkeys(self._layers)

    def _fitted(self, parts: dict[str, dict[str, Tensor]], alphas: dict[str, float]) -> dict[str, LoraModule]:
        """Return the modules by layer. Raises LoraError unless all fit, are finite and add a fraction."""
        if not parts:
            raise LoraError("has no modules")
        modules, unfit, broken = {}, [], []
        for name, tensors in parts.items():
            layer = self._layers.get(name)
            weight = None if layer is None else layer.weight
            module = _module(tensors, alphas.get(name.partition(".")[0]), weight)
            if module is None:
                unfit.append(name)
            elif not (
                module.down.isfinite().all() and module.up.isfinite().all() and math.isfinite(module.factor)
            ):
                broken.append(name)
            else:
                modules[name] = module
        for what, names in (("do not fit this model", unfit), ("hold values that are not finite", broken)):
            if names:
                count = f"{len(names)} of {len(parts)}"
                raise LoraError(f"has {count} modules that {what}", f", first {names[0]}")
        added = math.hypot(*map(norm, modules.values()))
        there = math.hypot(*(self._norms[name] for name in modules))
        if added > MAX_SHARE * there:
            raise LoraError(f"adds {added / there:.0f} times as much as the weights that it changes hold")
        return modules

    def _without_ldm_names(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Rename LDM's blocks as diffusers names them, by diffusers' own conversion."""
        if not any(key.startswith(_LDM) for key in tensors):
            return tensors
        others = {key: value for key, value in tensors.items() if not key.startswith("lora_unet_")}
        ldm = {key: value for key, value in tensors.items() if key not in others}
        state, alphas = StableDiffusionXLPipeline.lora_state_dict({**ldm}, unet_config=self._unet_config)
        renamed: dict[str, Tensor] = convert_unet_state_dict_to_peft(state)
        for key, alpha in convert_unet_state_dict_to_peft(alphas or {}).items():
            renamed[key.replace(".lora_A.weight", "")] = torch.tensor(alpha)
        if len(renamed) != len(ldm):  # it passes over some kinds of keys, such as DoRA's
            raise LoraError(f"has {len(ldm) - len(renamed)} of {len(ldm)} tensors of an unknown kind")
        return others | renamed


def norm(module: LoraModule) -> float:
    """Return Frobenius' norm of alpha / r * B A; for a small r, by the trace of (B'B)(AA')."""
    down, up = (part.double().flatten(1) for part in (module.down, module.up))
    if len(down) > min(len(up), down.shape[1]):
        return abs(module.factor) * float((up @ down).norm())
    square = ((up.T @ up) * (down @ down.T)).sum().item()
    return abs(module.factor) * math.sqrt(max(square, 0.0))


def add_to(total: Tensor, module: LoraModule, scale: float) -> None:
    """Add to `total`, a matrix in float64: scale * alpha / r * B A; a kernel's places are inputs here."""
    parts = (part.to(total.device).to(torch.float64) for part in (module.up, module.down))
    up, down = (part.flatten(1) for part in parts)
    total.addmm_(up, down, alpha=scale * module.factor)


def layers_by_name(network: str, module: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return what a LoRA can change of `module`, by the names in `Lora.modules`."""
    parts, kinds = module.named_modules(), (nn.Linear, nn.Conv2d)
    return {_layer(network, path): part for path, part in parts if isinstance(part, kinds)}


def _layer(network: str, path: str) -> str:
    """Return a layer's one name that all ways to write files lead to: kohya's."""
    # transformers 5 has dropped "text_model" from the names of the first encoder's layers; files have it.
    return f"{network}.{path.replace('.', '_').removeprefix('text_model_')}"


def _grouped(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each layer: "down", "up" and "alpha" if it has one."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        # A key of any other kind is a layer of its own, that fits nowhere.
        layer, kind = next(
            ((key.removesuffix(end), kind) for end, kind in _ENDINGS.items() if key.endswith(end)), ("", "?")
        )
        if layer:
            prefix = next((prefix for prefix in _PREFIXES if key.startswith(prefix)), "")
            layer = _layer(_PREFIXES.get(prefix, "unet"), layer.removeprefix(prefix))
        if kind in parts.setdefault(layer or key, {}):
            raise LoraError("has a layer twice, under two names", f", {layer}")
        parts[layer or key][kind] = tensor
    return parts


def _alphas_of_networks(metadata: Mapping[str, str]) -> dict[str, float]:
    """Return each network's alpha, which PEFT writes once, into the file's header; none means the rank."""
    written = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    if not isinstance(written, dict):
        raise ValueError("its header is not PEFT's")
    alphas: dict[str, float] = {}
    for key, value in written.items():
        network, _, option = key.rpartition(".")
        if option in _OTHER_SUMS and value:
            raise LoraError("is not a plain LoRA but a DoRA, rsLoRA or one of many alphas")
        if option == "lora_alpha" and value is not None:
            alphas[network or "unet"] = float(value)
    return alphas


def _module(parts: Mapping[str, Any], alpha: float | None, weight: Tensor | None) -> LoraModule | None:
    """Return the module, or None if it has no layer, is not whole, or B A has not the layer's shape."""
    down, up = parts.get("down"), parts.get("up")
    if weight is None or down is None or up is None or down.ndim < 2 or up.ndim < 2:
        return None
    rank, inputs, outputs = len(down), weight.flatten(1).shape[1], len(weight)
    if down.flatten(1).shape[1] != inputs or up.flatten(1).shape != (outputs, rank):
        return None
    if not 0 < rank <= max(inputs, outputs, ANY_RANK) or not {down.dtype, up.dtype} <= _FLOATS:
        return None
    if "alpha" in parts:
        if parts["alpha"].numel() != 1:
            return None
        alpha = parts["alpha"].item()
    return LoraModule(down, up, 1.0 if alpha is None else alpha / rank)
