"""Figures of the machine and of single parts: its rates, what follows the decoder, memory's orders, and the
kernels of attention."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from unittest.mock import Mock, patch

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.benchmark.gpu import Run
from fewstep.benchmark.gpu_systems import Extent, Own
from fewstep.benchmark.measure import describe_machine, nvidia_smi
from fewstep.benchmark.roofline import matmul_rate
from fewstep.generation.pipeline import Pipeline
from fewstep.images.codec import encode_image
from fewstep.models.device import fast_dtype, name_of

LIBRARIES = (
    *("torch", "triton", "diffusers", "transformers", "tokenizers", "accelerate", "peft", "safetensors"),
    *("numpy", "pillow"),
)
TOKENS = 77
BACKENDS = (
    *(SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION),
    SDPBackend.MATH,
)
COPY_BYTES = {"cuda": 2 * 10**9, "cpu": 10**8}


def machine(run: Run, extent: Extent) -> None:
    """What it is, with which libraries, and its two rates: of large products, and of copies in its memory."""
    facts = describe_machine() | {"driver": nvidia_smi("driver_version"), "python": platform.python_version()}
    facts |= {"gpu_memory_gb": nvidia_smi("memory.total"), "power_limit_w": nvidia_smi("power.limit")}
    facts |= {"cuda": torch.version.cuda or "", "cudnn": torch.backends.cudnn.version() or ""}  # type: ignore[no-untyped-call]
    run.row("machine", note=json.dumps(facts | {"versions": {name: _version(name) for name in LIBRARIES}}))
    dtype = fast_dtype(run.device)
    with run.attempt("product of large matrices"):
        rate = matmul_rate(dtype, extent.matrix, device=run.device) / 1e12
        what = f"product of matrices of {extent.matrix} a side"
        run.row(what, dtype=name_of(dtype), value=round(rate, 2), unit="TFLOP/s")
    with run.attempt("copy"):
        size = COPY_BYTES[run.device.type]
        source = torch.randn(size // 4, device=run.device)
        target = torch.empty_like(source)
        figures = run.milliseconds(lambda: target.copy_(source))
        moved = round(2 * size / figures["ms"] / 1e9, 3)
        run.row("copy, bytes read and written", **figures, value=moved, unit="TB/s")


def after(run: Run, own: Own, extent: Extent) -> None:
    """All of an image but the networks: from a cached prompt by noise, the steps' arithmetic and pixels that
    are there already to an image of the host; and from that to files."""
    pipeline, scenario = own.pipeline, extent.of()
    inputs = (scenario, ["a lighthouse in a storm"], [1])
    kept: dict[str, Tensor] = {}

    def keep(name: str, call: Callable[..., Tensor], /, *arguments: Any) -> Tensor:
        kept[name] = call(*arguments).clone()  # since the next call may overwrite it
        return kept[name]

    with ExitStack() as stack:
        engine = pipeline.engine
        for name in ("unet", "decode"):
            stack.enter_context(patch.object(engine, name, partial(keep, name, getattr(engine, name))))
        [image] = own.system.generate(*inputs)
    with ExitStack() as stack:
        for name, made in kept.items():
            stack.enter_context(patch.object(engine, name, Mock(return_value=made)))
        shape = {"batch": 1, "size": extent.size, "steps": extent.steps}
        run.time("all but the networks", partial(own.system.generate, *inputs), **shape)
    for kind in ("webp", "jpg", "png"):
        encode = partial(encode_image, image, kind, 90)
        kilobytes = round(len(encode()) / 1e3, 1)
        run.time(f"to {kind}", encode, often=0.5, size=extent.size, value=kilobytes, unit="kB")


def layouts(run: Run, pipeline: Pipeline, extent: Extent) -> None:
    """One evaluation of the UNet and one decoding, uncompiled, in each order of memory; then decoding by what
    cuDNN finds to be fastest. Leaves the networks in the last order."""
    unet: Any = pipeline.diffusion.unet
    decoder: Any = pipeline.decoder
    latents, condition = _inputs(unet, extent.size)
    timestep = torch.tensor(999, device=run.device)
    shape = {"batch": 1, "size": extent.size}

    def decode() -> None:
        decoder.decode(latents, return_dict=False)

    def evaluate() -> None:
        unet(latents, timestep, **condition, return_dict=False)

    orders = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    with torch.inference_mode():
        for name, order in orders.items():
            for part, network, call in (("UNet", unet, evaluate), ("VAE", decoder, decode)):
                network.to(memory_format=order)
                run.time(f"{part}, {name}", call, **shape)
        with _cudnn_benchmark():
            run.time("VAE, channels_last, cudnn.benchmark", decode, **shape)


def _inputs(unet: Any, side: int) -> tuple[Tensor, dict[str, Any]]:
    """Random latents and conditions of one image of `side` px, of SDXL's family."""
    config: Any = unet.config
    like: dict[str, Any] = {"device": unet.device, "dtype": unet.dtype}
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    added = {"text_embeds": torch.randn(1, pooled, **like), "time_ids": torch.ones(1, 6, **like)}
    states = torch.randn(1, TOKENS, config.cross_attention_dim, **like)
    latents = torch.randn(1, config.in_channels, side // 8, side // 8, **like)
    return latents, {"encoder_hidden_states": states, "added_cond_kwargs": added}


@contextmanager
def _cudnn_benchmark() -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def attention(run: Run, extent: Extent) -> None:
    """Each of torch's kernels for the attention of SDXL's UNet, which has so many of each, and of the VAE, in
    which the one head is too wide for most; for that, two products with a softmax between as well."""
    wide, deep, latents = ((extent.size // factor) ** 2 for factor in (16, 32, 8))
    shapes = {
        "10 of": (10, wide, 64, wide),
        "60 of": (20, deep, 64, deep),
        "60 to the prompt, of": (20, deep, 64, TOKENS),
        "the VAE's": (1, latents, 512, latents),
    }
    like: dict[str, Any] = {"device": run.device, "dtype": fast_dtype(run.device)}
    for name, (heads, length, width, keys) in shapes.items():
        query = torch.randn(1, heads, length, width, **like)
        key, value = (torch.randn(1, heads, keys, width, **like) for _ in range(2))
        ways: dict[str, Callable[[], object]] = {
            backend.name.removesuffix("_ATTENTION").lower(): partial(_attend, backend, query, key, value)
            for backend in BACKENDS
        }
        if heads == 1:
            ways["products and softmax"] = partial(_attend_plainly, query[0], key[0], value[0])
        for way, call in ways.items():
            what = f"{name} {heads} x {length} x {width} on {keys} keys, {way}"
            run.time(what, call, often=2)


def _attend(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value)


def _attend_plainly(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = torch.bmm(query, key.transpose(1, 2)) * query.shape[-1] ** -0.5
    return torch.bmm(torch.softmax(scores, -1), value)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
