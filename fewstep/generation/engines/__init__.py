"""What evaluates the networks: plain torch, torch compiled for some shapes, or OpenVINO."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # the batcher, which starts without torch, lies in this package too
    from torch import Tensor

    from fewstep.request import Request


class Engine(Protocol):
    """A UNet and a VAE's decoder for the requests that it serves; the next call may overwrite a result."""

    one_by_one: bool  # whether the images of a batch go through one after the other

    def serves(self, request: Request) -> bool:
        """Whether it can generate, and is meant to, what `request` asks."""
        ...

    def unet(self, latents: Tensor, timestep: Tensor, condition: dict[str, Any]) -> Tensor:
        """(N, C, H / 8, W / 8) -> what `UNet2DConditionModel` predicts, of the same shape."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """(N, C, H / 8, W / 8) -> pixels (N, 3, H, W) from -1 to 1."""
        ...
