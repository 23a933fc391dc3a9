"""The consistency maths as pure functions on tensors.

Symbols are those of Luo et al., "Latent Consistency Models" (arXiv 2310.04378, "LCM") and "LCM-LoRA"
(2311.05556). Per-image coefficients have shape (N,) and are spread over (N, C, H, W) by `spread`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import Tensor

SIGMA_DATA = 0.5
TIMESTEP_SCALING = 10.0


@dataclass(frozen=True)
class NoiseSchedule:
    """How a network was trained: `alphas_cumprod` (T,), and what it says of z_t, both in diffusers' names."""

    alphas_cumprod: Tensor
    prediction_type: str

    @classmethod
    def of(cls, scheduler: Any, device: torch.device) -> NoiseSchedule:
        """Return that of a diffusers scheduler."""
        return cls(scheduler.alphas_cumprod.to(device), scheduler.config.prediction_type)

    def signal_and_noise(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha(t) and sigma(t) of t (N,), ready to multiply `like` (N, ...); t = -1 stands for clean
        data: (1, 0)."""
        clean = torch.ones_like(self.alphas_cumprod[0])
        product = torch.where(t < 0, clean, self.alphas_cumprod[t.clamp(min=0)])
        return spread(product.sqrt(), like), spread((1.0 - product).sqrt(), like)

    def mix(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Return z_t = alpha(t) x_0 + sigma(t) noise; of estimates of both, the DDIM solver's step to t, over
        a skip of any length (LCM, equation 13)."""
        alpha, sigma = self.signal_and_noise(t, noise)
        return alpha * x_0 + sigma * noise

    def estimates(self, output: Tensor, z_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return x_0 and the noise in z_t, from what the network says of it (LCM, appendix "Different
        Parameterizations"). Raises ValueError for an unknown prediction type."""
        alpha, sigma = self.signal_and_noise(t, z_t)
        if self.prediction_type == "epsilon":
            return (z_t - sigma * output) / alpha, output
        if self.prediction_type == "v_prediction":
            return alpha * z_t - sigma * output, alpha * output + sigma * z_t
        if self.prediction_type == "sample":
            return output, (z_t - alpha * output) / sigma
        allowed = "epsilon, v_prediction or sample"
        raise ValueError(f"prediction_type is {self.prediction_type!r}; it must be {allowed}")


def spread(coefficient: Tensor, like: Tensor) -> Tensor:
    """Return a coefficient (N,) as (N, 1, 1, 1), ready to multiply `like`."""
    return coefficient.reshape(-1, *(1,) * (like.ndim - 1)).to(like)


def boundary_scalings(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return c_skip(t) and c_out(t), with c_skip(0) = 1 and c_out(0) = 0, so that f(x, 0) = x (LCM, section
    4.1 and appendix)."""
    scaled = t * TIMESTEP_SCALING
    variance = scaled**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / variance, scaled / variance**0.5


def guided_estimate(conditional: Tensor, unconditional: Tensor, w: Tensor) -> Tensor:
    """Return (1 + w) conditional - w unconditional (LCM, equation 14); diffusers' guidance_scale is 1 + w."""
    return conditional + spread(w, conditional) * (conditional - unconditional)


def guidance_embedding(w: Tensor, width: int) -> Tensor:
    """Return the sines and cosines (N, `width`) of w (N,) that a full LCM's UNet takes as `timestep_cond`
    (LCM, section 4.3; Meng et al., arXiv 2210.03142); those with which diffusers' LCM pipelines generate."""
    embedded: Tensor = get_timestep_embedding(1000 * w, width, downscale_freq_shift=1)
    return embedded


def solver_timesteps(train_timesteps: int, solver_steps: int) -> Tensor:
    """Return the `solver_steps` timesteps between which the teacher's ODE is solved, ascending: k - 1,
    2k - 1, ..., N - 1; those from which `diffusers.LCMScheduler` picks its own when it samples."""
    k = train_timesteps // solver_steps
    return torch.arange(1, solver_steps + 1) * k - 1


def pseudo_huber(a: Tensor, b: Tensor, c: float) -> Tensor:
    """Return the mean of sqrt((a - b)^2 + c^2) - c: quadratic below c, linear above, so outliers weigh
    little."""
    return (((a - b) ** 2 + c**2).sqrt() - c).mean()
