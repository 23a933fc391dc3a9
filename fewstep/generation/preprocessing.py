"""Images as a vision model takes them, made where they are: on a GPU, without a wait for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# What transformers' processors take where the file has no word of it.
DEFAULTS = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
MODES = {2: "bilinear", 3: "bicubic"}  # of Pillow's numbers


@dataclass(frozen=True)
class Preprocessing:
    """What an image processor of transformers does on the CPU by Pillow, to within 2 of 255 in a value.

    Only what bicubic's negative weights bring out of their range may differ by more: Pillow 13 goes over tall
    images in another order.
    """

    size: tuple[int, int] | int | None  # height and width; or the shorter edge; None: as the image comes
    mode: str
    crop: tuple[int, int] | None  # height and width, of the middle
    scale: float
    mean: Tensor  # (3, 1, 1), as is `std`
    std: Tensor

    @classmethod
    def read(
        cls, file: Path, device: torch.device, *, default_to_square: bool = True, do_center_crop: bool = False
    ) -> Preprocessing:
        """By the numbers in `file`, a processor's; the two defaults, which an old file may lean on, are those
        of its class: whether a bare number is both edges or the shorter, and whether it crops.

        Raises OSError, ValueError, LookupError or TypeError for what is no such file.
        """
        given = dict(json.loads(file.read_text()))
        config: dict[str, Any] = DEFAULTS | {"do_center_crop": do_center_crop} | given
        normalize = config["do_normalize"]
        return cls(
            size=_size(config["size"], square=default_to_square) if config["do_resize"] else None,
            mode=MODES[config["resample"]] if config["do_resize"] else "",
            crop=_height_and_width(config["crop_size"]) if config["do_center_crop"] else None,
            scale=float(config["rescale_factor"]) if config["do_rescale"] else 1.0,
            mean=_of_channels(config["image_mean"] if normalize else (0, 0, 0), device),
            std=_of_channels(config["image_std"] if normalize else (1, 1, 1), device),
        )

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 RGB (N, H, W, 3) -> fp32 (N, 3, height, width)."""
        pixels = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        if self.size is not None:
            pixels = self._resize(pixels, self.size)
        if self.crop is not None:
            pixels = _crop(pixels, *self.crop)
        return (pixels * self.scale - self.mean) / self.std

    def _resize(self, pixels: Tensor, size: tuple[int, int] | int) -> Tensor:
        old = (pixels.shape[2], pixels.shape[3])
        height, width = size if isinstance(size, tuple) else (size * edge // min(old) for edge in old)
        # Each of the two passes ends in bytes; width comes first, as when the checkers were trained.
        for target in ((old[0], width), (height, width)):
            exact = F.interpolate(pixels, target, mode=self.mode, antialias=True)
            pixels = exact.add_(0.5).floor_().clamp_(0, 255)
        return pixels


def _size(given: Any, *, square: bool) -> tuple[int, int] | int:
    """Height and width, or the shorter edge, from any of the ways in which processors have written it."""
    if isinstance(given, int) and not square:
        return given
    if isinstance(given, dict) and "shortest_edge" in given:
        [edge] = given.values()  # beside a limit for the longer one, it would be another size
        return int(edge)
    return _height_and_width(given)


def _height_and_width(given: Any) -> tuple[int, int]:
    return (given, given) if isinstance(given, int) else (int(given["height"]), int(given["width"]))


def _of_channels(values: Sequence[float], device: torch.device) -> Tensor:
    red, green, blue = values
    return torch.tensor([[[red]], [[green]], [[blue]]], dtype=torch.float32, device=device)


def _crop(pixels: Tensor, height: int, width: int) -> Tensor:
    """The middle of it, with black around where it is smaller."""
    top, left = (pixels.shape[2] - height) // 2, (pixels.shape[3] - width) // 2
    bottom, right = pixels.shape[2] - height - top, pixels.shape[3] - width - left
    return F.pad(pixels, (-left, -right, -top, -bottom))
