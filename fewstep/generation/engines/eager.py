"""Plain torch: every network as it is, for every request."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fewstep.request import Request


class EagerEngine:
    """Calls a model's UNet and decoder, an `AutoencoderKL` or an `AutoencoderTiny`."""

    one_by_one = False

    def __init__(self, unet: Any, decoder: Any) -> None:
        self._unet, self._decoder = unet, decoder

    def serves(self, request: Request) -> bool:
        """Everything."""
        return True

    def unet(self, latents: Tensor, timestep: Tensor, condition: dict[str, Any]) -> Tensor:
        """What the UNet predicts for (N, C, H / 8, W / 8)."""
        output: Tensor = self._unet(latents, timestep, **condition, return_dict=False)[0]
        return output

    def decode(self, latents: Tensor) -> Tensor:
        """What the decoder makes of (N, C, H / 8, W / 8): (N, 3, H, W)."""
        pixels: Tensor = self._decoder.decode(latents.to(self._decoder.dtype)).sample
        return pixels
