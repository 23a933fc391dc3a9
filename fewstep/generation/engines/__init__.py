"""What evaluates the networks: plain torch, torch compiled and recorded for some shapes, or OpenVINO."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fewstep.request import Request


class Engine:
    """Plain torch: a UNet and a decoder, an `AutoencoderKL` or an `AutoencoderTiny`, for every request.

    Of other engines, the next call may overwrite a result.
    """

    one_by_one = False  # whether the images of a batch go through one after the other

    def __init__(self, unet: Any, decoder: Any) -> None:
        self._unet, self._decoder = unet, decoder

    def serves(self, request: Request) -> bool:
        """Whether it can generate, and is meant to, what `request` asks."""
        return True

    def begin(self) -> None:
        """Learn that what follows belongs to another batch."""

    def unet(self, latents: Tensor, timestep: Tensor, condition: dict[str, Any]) -> Tensor:
        """(N, C, H / 8, W / 8) -> what `UNet2DConditionModel` predicts, of the same shape."""
        output: Tensor = self._unet(latents, timestep, **condition, return_dict=False)[0]
        return output

    def decode(self, latents: Tensor) -> Tensor:
        """(N, C, H / 8, W / 8) -> pixels (N, 3, H, W) from -1 to 1."""
        pixels: Tensor = self._decoder.decode(latents.to(self._decoder.dtype)).sample
        return pixels

    def improve(self) -> bool:
        """Do a part of what makes it faster, for some seconds; whether more of it is left."""
        return False

    def release(self) -> bool:
        """Give back what memory is held for speed alone; whether there was any."""
        return False
