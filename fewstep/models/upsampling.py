"""A VAE's upsampling in fewer multiplications, and the same images.

Doubling by nearest neighbours and then a 3x3 convolution looks at every pixel more than once: of the nine
taps of an output pixel only four see different inputs. Summing the taps that see the same one leaves a 2x2
convolution for each of the four places within a doubled pixel, 4/9 of the work (the sub-pixel convolution
of arXiv 1609.07009).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional as F


class FoldedUpsample(nn.Module):
    """(N, C, H, W) -> (N, C', 2 H, 2 W), as `upsample` does, whose weights it takes over."""

    def __init__(self, upsample: Upsample2D) -> None:
        super().__init__()
        conv: Any = upsample.conv
        with torch.no_grad():
            taps = conv.weight.float()  # (C', C, 3, 3)
            for axis in (2, 3):
                first, second, third = taps.unbind(axis)
                # Output pixel 2 i sees input pixels i - 1, i, i and pixel 2 i + 1 sees i, i, i + 1; the
                # latter comes first, since the whole is cropped by one.
                odd = torch.stack([first + second, third], axis)
                even = torch.stack([first, second + third], axis)
                taps = torch.stack([odd, even], 1).flatten(0, 1)
            self.weight = nn.Parameter(taps.to(conv.weight.dtype), requires_grad=False)
            self.bias = nn.Parameter(conv.bias.repeat_interleave(4), requires_grad=False)

    def forward(self, hidden_states: Tensor, output_size: object = None) -> Tensor:
        if output_size is not None:
            raise ValueError("a folded upsampling doubles, and gives no other size")
        doubled = F.pixel_shuffle(F.conv2d(hidden_states, self.weight, self.bias, padding=1), 2)
        return doubled[..., 1:-1, 1:-1]


def fold_upsamplers(module: nn.Module) -> None:
    """Put a `FoldedUpsample` in the place of every upsampling in `module` that it can stand for."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, Upsample2D) and _is_foldable(child):
                setattr(parent, name, FoldedUpsample(child))


def _is_foldable(upsample: Upsample2D) -> bool:
    conv = getattr(upsample, "conv", None)
    return (
        isinstance(conv, nn.Conv2d)
        and upsample.interpolate
        and upsample.norm is None
        and (conv.kernel_size, conv.padding, conv.stride) == ((3, 3), (1, 1), (1, 1))
        and conv.bias is not None
    )
