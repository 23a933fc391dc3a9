"""Muon (K. Jordan et al., 2024, kellerjordan.github.io/posts/muon) beside AdamW.

A weight matrix moves along its momentum with all singular values made equal, so that what is seen seldom is
learnt as fast as what is seen often: 80 steps took the miniature's base as far as 180 of AdamW, each a fifth
longer. torch's own and other libraries' iterate in bf16, which many CPUs do not multiply, and torch's takes
no convolutions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic, which grows small singular values fastest
ITERATIONS = 5
MOMENTUM = 0.95
NARROW = 16  # channels; what has no more, as a first or a last layer, is no matrix of features


def matrices_of(module: nn.Module) -> set[nn.Parameter]:
    """Return the weights of `module` that Muon is for: of linear layers and convolutions, not of embeddings
    and not of layers that read or write pixels or latents."""
    embeddings = {layer.weight for layer in module.modules() if isinstance(layer, nn.Embedding)}
    weights = (p for p in module.parameters() if p.ndim >= 2 and min(p.shape[:2]) > NARROW)
    return {weight for weight in weights if weight not in embeddings}


def orthogonal(matrix: Tensor) -> Tensor:
    """Return `matrix` (M, N) with its singular values brought close to 1, by Newton-Schulz iterations.

    They run on the smaller of its Gram matrices, which commutes with their polynomials, so that only the
    first and the last product are of the matrix's own size.
    """
    a, b, c = COEFFICIENTS
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    gram = wide @ wide.T
    one = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor = one
    for _ in range(ITERATIONS):
        polynomial = a * one + b * gram + c * gram @ gram
        factor = polynomial @ factor
        gram = polynomial @ gram @ polynomial
    near: Tensor = factor @ wide
    return near if matrix.shape[0] <= matrix.shape[1] else near.T


class Muon(torch.optim.AdamW):
    """Muon for `matrices`, convolutions taken as (out, in x kernel), and AdamW for other `parameters`.

    One learning rate serves both: an update of a matrix is scaled to the size of AdamW's (arXiv 2502.16982).
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], matrices: set[nn.Parameter], lr: float, weight_decay: float
    ) -> None:
        super().__init__(parameters, lr=lr, weight_decay=weight_decay, fused=True)
        self._matrices = [parameter for parameter in parameters if parameter in matrices]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        [group] = self.param_groups
        for weight in self._matrices:
            if weight.grad is None:
                continue
            state = self.state[weight]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(weight)
            momentum = state["momentum"]
            momentum.lerp_(weight.grad, 1 - MOMENTUM)
            ahead = weight.grad.lerp(momentum, MOMENTUM)  # Nesterov's
            update = orthogonal(ahead.flatten(1)).reshape(weight.shape)
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(update, alpha=-0.2 * group["lr"] * math.sqrt(max(ahead.flatten(1).shape)))
            weight.grad = None  # nothing is left to do for AdamW
        return super().step(closure)  # type: ignore[no-any-return]
