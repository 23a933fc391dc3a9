"""The floor: what the arithmetic would take if all of it ran at the machine's rate for large matrices."""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode

from fewstep.benchmark.systems import Wish

TOKENS = 77


def flops_of(folder: Path, wish: Wish) -> float:
    """Of all UNet evaluations and the VAE's decoding of `wish`, by the model in `folder`, SDXL's family."""
    side = wish.size // 8
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder / "vae"))
        config = unet.config
        latents = torch.empty(1, config.in_channels, side, side)
        states = torch.empty(1, TOKENS, config.cross_attention_dim)
        pooled = torch.empty(
            1, config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        )
        given = {"text_embeds": pooled, "time_ids": torch.empty(1, 6)}
        with FlopCounterMode(display=False) as generated:
            unet(latents, torch.tensor(1), states, added_cond_kwargs=given)
        with FlopCounterMode(display=False) as decoded:
            vae.decode(latents)
    evaluations = wish.steps * (2 if wish.guidance > 1 else 1)
    return float(wish.batch * (evaluations * generated.get_total_flops() + decoded.get_total_flops()))


def matmul_rate(dtype: torch.dtype, side: int = 4096, repeats: int = 5) -> float:
    """FLOP/s of `side` x `side` matrices, the median of `repeats`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    seconds = []
    for _ in range(1 + repeats):
        started = time.perf_counter()
        float((a @ b)[0, 0])  # waits for a GPU
        seconds.append(time.perf_counter() - started)
    return 2 * side**3 / statistics.median(seconds[1:])
