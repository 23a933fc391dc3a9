"""A UNet's linear layers and convolutions in 8 bits (float8_e4m3fn), for half the memory, or for speed.

A weight is stored as w / s with one scale s for each output channel, and a rounding error of at most 1/16
of a
value (Micikevicius et al., arXiv 2209.05433). For memory, layers multiply in the dtype of their inputs. For
speed, linear layers of Hopper's and Ada's GPUs multiply in 8 bits, activations with a scale for each token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
TINY = 1e-12  # instead of the scale of what is all zeros
# What torch._scaled_mm asks of a matrix' sides.
STEP = 16
# Ada's; before it, no GPU multiplies in 8 bits.
LEAST_CAPABILITY = (8, 9)


class Stored:
    """What both kinds of layers share: `weight` in 8 bits, and its scale (out, 1, ...) in fp32."""

    weight: Any
    scale: Tensor

    def store(self, weight: Tensor) -> None:
        """Write `weight` (out, in, ...) of any dtype, into the memory that is there."""
        scale = _scale_of(weight.flatten(1), torch.float64).view_as(self.scale)
        self.scale.copy_(scale)
        self.weight.data.copy_((weight / scale).clamp(-LARGEST, LARGEST))

    def _loaded(self, dtype: torch.dtype) -> Tensor:
        loaded: Tensor = self.weight.to(torch.float32) * self.scale
        return loaded.to(dtype)


class StoredLinear(Stored, nn.Linear):
    """A linear layer that keeps 8 bits, and multiplies in the dtype of its inputs."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._loaded(x.dtype), self.bias)


class StoredConv2d(Stored, nn.Conv2d):
    """A convolution that keeps 8 bits, and multiplies in the dtype of its inputs."""

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self._conv_forward(x, self._loaded(x.dtype), self.bias)
        return made


class Fp8Linear(Stored, nn.Linear):
    """A linear layer that multiplies in 8 bits."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2).contiguous()  # a permuted image of one is not
        scale = _scale_of(rows, torch.float32)
        quantized = (rows / scale).clamp(-LARGEST, LARGEST).to(FP8)
        # bf16, since CUTLASS' kernels for scales by row and column write nothing else.
        product = torch._scaled_mm(
            quantized, self.weight.t(), scale, self.scale.t(), out_dtype=torch.bfloat16
        )
        product = product.to(x.dtype)
        return (product if self.bias is None else product + self.bias).view(*x.shape[:-1], -1)


def to_fp8(unet: Any, *, multiply: bool, device: torch.device | None = None) -> None:
    """Turn the layers of the UNet's blocks into layers of 8 bits, in place; what is neither (embeddings of
    time, the first and the last convolution, norms) is a fiftieth, and keeps its precision.

    With `multiply`, linear layers whose sides allow it multiply in 8 bits, and nothing else changes. Weights
    that become 8 bits go to `device` first, if it is given.
    """
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        for layer in block.modules() if block is not None else ():
            if multiply:
                fits = isinstance(layer, nn.Linear) and not any(side % STEP for side in layer.weight.shape)
                kind: Any = Fp8Linear if fits else None
            else:
                kind = {nn.Linear: StoredLinear, nn.Conv2d: StoredConv2d}.get(type(layer))
            if kind:
                weight = layer.weight.data.to(device)
                layer.__class__ = kind
                layer.weight = nn.Parameter(torch.empty_like(weight, dtype=FP8), requires_grad=False)
                places = (len(weight), *(1,) * (weight.ndim - 1))
                layer.register_buffer("scale", torch.ones(places, device=weight.device), persistent=False)
                layer.store(weight)


def from_fp8(unet: Any, dtype: torch.dtype) -> None:
    """Turn them back into layers of `dtype`, in place, whose weights are to be written anew."""
    plain = {StoredLinear: nn.Linear, Fp8Linear: nn.Linear, StoredConv2d: nn.Conv2d}
    for layer in unet.modules():
        if isinstance(layer, Stored):
            weight: Any = layer._loaded(dtype)
            layer.__class__ = plain[type(layer)]
            del layer.scale
            layer.weight = nn.Parameter(weight, requires_grad=False)


def _scale_of(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale (N, 1) of each of `rows` (N, D), by which its largest value becomes the largest of 8 bits."""
    return rows.abs().amax(1, keepdim=True).to(dtype).clamp(min=TINY) / LARGEST
