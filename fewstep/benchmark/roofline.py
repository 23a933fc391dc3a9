"""The roofline: what the arithmetic would take if all of it ran at the machine's rate for large matrices."""

from __future__ import annotations

import statistics
import timeit
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from fewstep.benchmark.systems import Scenario
from fewstep.models.device import DTYPES

TOKENS = 77


def roofline(folder: Path, scenarios: Sequence[Scenario], dtype: str) -> list[dict[str, Any]]:
    """Return a row for each scenario, by the model in `folder`, SDXL's family."""
    rate, rows = matmul_rate(DTYPES[dtype]), []
    for scenario in scenarios:
        seconds = round(flops_of(folder, scenario) / rate, 4)
        # "floor" as the committed tables have it
        rows.append({"system": "floor", **vars(scenario), "dtype": dtype, "seconds": seconds})
    return rows


def flops_of(folder: Path, scenario: Scenario) -> float:
    """Count all UNet evaluations and the VAE's decoding."""
    side = scenario.size // 8
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
        config = unet.config
        latents = torch.empty(1, config.in_channels, side, side)
        states = torch.empty(1, TOKENS, config.cross_attention_dim)
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}
        with FlopCounterMode(display=False) as generated:
            unet(latents, torch.tensor(1), states, added_cond_kwargs=added)
        with FlopCounterMode(display=False) as decoded:
            vae.decode(latents)
    evaluations = scenario.steps * (2 if scenario.guidance > 1 else 1)
    return float(scenario.batch * (evaluations * generated.get_total_flops() + decoded.get_total_flops()))


def matmul_rate(
    dtype: torch.dtype, side: int = 0, repeats: int = 5, device: str | torch.device | None = None
) -> float:
    """Return the FLOP/s of products of `side` x `side` matrices, the median of `repeats`.

    By default it is of a GPU, if there is one, with 8192 a side: of less, a fast one spends the time on
    beginning and ending.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    side, products = side or (8192 if on_gpu else 4096), 10 if on_gpu else 1
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))

    def multiply() -> float:
        for _ in range(products):
            product = a @ b
        return float(product[0, 0])  # which waits for a GPU

    seconds = timeit.repeat(multiply, number=1, repeat=1 + repeats)
    return products * 2 * side**3 / statistics.median(seconds[1:])
