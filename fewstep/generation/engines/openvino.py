"""OpenVINO on a CPU: a second copy of the UNet and of the VAE's decoder, compiled for one size of picture.

They serve what is painted by the weights as they were converted, at that size; all else runs on torch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.generation.engines.openvino_conversion import HINTS, examples
from fewstep.generation.text_encoder import Diffusion
from fewstep.request import Mix, Request
from fewstep.settings import INT8, Settings

logger = logging.getLogger(__name__)

MAX_GROUP = 128  # larger ones were no faster


@cache
def shared_core() -> Any:
    """The process's only `openvino.Core`, which is never let go.

    Each brings a stack of its own for signals, and takes it away at its end: when several end in another
    order than the reverse, the next signal with a handler, such as SIGTERM, is a segmentation fault.
    """
    from openvino import Core  # optional, and takes a moment

    return Core()


class OpenVinoEngine:
    """`unet` and `decode` for requests that it `serves`; pictures of a batch go through one by one, which on
    a CPU takes no longer, and gives each the same pixels in any batch."""

    one_by_one = True

    def __init__(
        self, diffusion: Diffusion, place: Path, settings: Settings, dtype: torch.dtype, size: tuple[int, int]
    ) -> None:
        """Compile what `converted` put into `place`, for pictures of `size`, width and height in px."""
        self.decodes = settings.vae == "full"  # torch is quick at a tiny one
        self.size = size
        width, height = size
        core = shared_core()
        config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": HINTS[dtype], "PERFORMANCE_HINT": "LATENCY"}
        if settings.engine == INT8:
            config["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = _group_of(diffusion.unet.config)
        self._infer: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {}
        for name, given in examples(diffusion, height // 8, width // 8).items():
            if name == "vae" and not self.decodes:
                continue
            model = core.read_model(place / f"{name}.xml")
            model.reshape(dict(zip(model.inputs, [list(one.shape) for one in given], strict=True)))
            request = core.compile_model(model, "CPU", config).create_infer_request()
            self._infer[name] = partial(infer, request)
        logger.info("OpenVINO paints pictures of %dx%d px", width, height)

    def serves(self, request: Request) -> bool:
        """Whether it was compiled for what `request` asks."""
        return (
            (request.width, request.height) == self.size
            and request.chunks == 1
            and request.weights_key == Mix().key
        )

    def unet(self, latents: Tensor, timestep: Tensor, condition: dict[str, Any]) -> Tensor:
        """What `UNet2DConditionModel` gives for (N, C, H / 8, W / 8)."""
        columns = [latents, timestep.expand(len(latents)), *_conditions(condition)]
        return torch.cat(
            [self._infer["unet"]([column[i : i + 1] for column in columns]) for i in range(len(latents))]
        )

    def decode(self, latents: Tensor) -> Tensor:
        """What the VAE gives for (N, C, H / 8, W / 8): (N, 3, H, W)."""
        return torch.cat([self._infer["vae"]([one]) for one in torch.split(latents, 1)])


def _group_of(config: Any) -> int:
    """How many neighbouring activations share a scale when they are quantized, at every evaluation anew: as
    many as divide the width of all linear layers in the transformers, which do nearly all the work."""
    blocks = zip(config.block_out_channels, config.down_block_types, strict=True)
    widths = [channels for channels, kind in blocks if "CrossAttn" in kind]
    return math.gcd(MAX_GROUP, config.cross_attention_dim, *widths)


def infer(request: Any, tensors: Sequence[Tensor]) -> Tensor:
    """The only output of a compiled network."""
    # In fp32 on the outside, since numpy has no bf16.
    found = request.infer([tensor.to(torch.float32).contiguous().numpy() for tensor in tensors])
    return torch.from_numpy(next(iter(found.values())).copy())


def _conditions(condition: dict[str, Any]) -> list[Tensor]:
    """In the order of `examples`."""
    added = condition.get("added_cond_kwargs", {})
    named = [condition["encoder_hidden_states"], added.get("text_embeds"), added.get("time_ids")]
    return [one for one in (*named, condition.get("timestep_cond")) if one is not None]
