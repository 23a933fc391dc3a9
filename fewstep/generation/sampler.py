"""The few-step loop: multistep latent consistency sampling, with what diffusers' LCMScheduler computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from diffusers import LCMScheduler
from torch import Tensor

from fewstep.errors import Stopped
from fewstep.models.device import to_device

# Latents, timestep and conditions -> the network's prediction.
UNet: TypeAlias = Callable[[Tensor, Tensor, dict[str, Any]], Tensor]


@dataclass(frozen=True, slots=True)
class Step:
    """One step from the timestep `t`, whose numbers are all known before the first.

    With alpha and sigma of the noise schedule at t, and c_skip and c_out of the boundary condition (Song et
    al., arXiv 2303.01469, section 3), a step is x0 = (x - sigma e) / alpha, or alpha x - sigma e of a network
    that predicts v; then x' = alpha' (c_out x0 + c_skip x) + sigma' z, with fresh noise z.
    """

    t: int
    alpha: float
    sigma: float
    c_skip: float
    c_out: float
    next_alpha: float  # 1 and 0 after the last step, of whose result nothing is made noise again
    next_sigma: float
    predicts_v: bool

    def advance(self, x: Tensor, e: Tensor, z: Tensor | None) -> Tensor:
        """x' of latents x, the network's output e and fresh noise z, which the last step does not need."""
        if self.predicts_v:
            of_x, of_e = self.c_out * self.alpha + self.c_skip, -self.c_out * self.sigma
        else:
            of_x, of_e = self.c_out / self.alpha + self.c_skip, -self.c_out * self.sigma / self.alpha
        x = self.next_alpha * of_x * x + self.next_alpha * of_e * e
        if z is not None and self.next_sigma:
            x += self.next_sigma * z
        return x


@dataclass(frozen=True)
class Start:
    """What sampling begins with, (N, C, H / 8, W / 8) each: noise; what is added after each step but the
    last, (steps - 1, N, ...); for images their latents, and the mask, (N, 1, ...), 1 where to repaint."""

    noise: Tensor
    fresh: Tensor
    image: Tensor | None
    mask: Tensor | None


def plan(scheduler: LCMScheduler, count: int, strength: float) -> list[Step]:
    """The steps that `scheduler` takes in `count` of them over the last `strength` of its schedule."""
    scheduler.set_timesteps(count, strength=strength)
    timesteps = scheduler.timesteps.tolist()
    levels = [scheduler.alphas_cumprod[t].item() for t in timesteps] + [1.0]
    scales = [(level**0.5, (1 - level) ** 0.5) for level in levels]
    predicts_v = scheduler.config.prediction_type != "epsilon"
    steps = []
    for t, (alpha, sigma), following in zip(timesteps, scales, scales[1:], strict=False):
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(t)
        steps.append(Step(t, alpha, sigma, c_skip, c_out, *following, predicts_v))
    return steps


def sample(
    unet: UNet,
    steps: Sequence[Step],
    start: Start,
    condition: dict[str, Any],
    *,
    guidance: Tensor | None,
    strength: float,
    stopped: Callable[[], bool],
) -> Tensor:
    """Scaled latents (Luo et al., arXiv 2310.04378, Algorithm 3). Raises Stopped when `stopped` says so.

    From an image, it begins where noise has covered `strength` of it (SDEdit, arXiv 2108.01073); under a
    mask, what is to be kept is put back after every step (arXiv 2201.09865, without resampling). With
    `guidance` (N, 1, 1, 1), conditions are of 2 N, the unconditional first. Between two steps nothing waits
    for the device.
    """
    states = condition["encoder_hidden_states"]
    x = start.noise
    # On SDXL's schedule even the last timestep would leave a trace of the image.
    if start.image is not None and strength < 1:
        x = steps[0].alpha * start.image + steps[0].sigma * start.noise
    timesteps = to_device(torch.tensor([step.t for step in steps]), states.device)
    for i, step in enumerate(steps):
        if stopped():
            raise Stopped("every caller of this batch has left")
        x_in = x.to(states.dtype)
        if guidance is None:
            e = unet(x_in, timesteps[i], condition).float()
        else:
            both = unet(torch.cat([x_in, x_in]), timesteps[i], condition).float()
            unconditional, conditional = both.chunk(2)
            e = unconditional + guidance * (conditional - unconditional)
        x = step.advance(x, e, start.fresh[i] if step.next_sigma else None)
        if start.mask is not None and start.image is not None:
            kept = step.next_alpha * start.image + step.next_sigma * start.noise
            x = start.mask * x + (1 - start.mask) * kept
    return x
