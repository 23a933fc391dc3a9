"""torch.compile, block by block while nobody waits, under CUDA graphs on a GPU.

At the start the networks run as torch runs them, recorded as CUDA graphs where there is a GPU, so that the
server is ready at once. `improve` then compiles one kind of block for one shape of batch at a time; what
callers ask for meanwhile runs as it is, so that no request ever starts a compiler. Weights stay where they
are: styles are compiled code too. Blocks and not whole networks, since SDXL's UNet has 70 transformers of
two kinds, and is traced for a minute as a whole.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from fewstep.generation.engines import Engine
from fewstep.generation.engines.graphs import Record, Recorded
from fewstep.models.device import is_device_error
from fewstep.settings import Shape

logger = logging.getLogger(__name__)

FOLDER = ".compiled"  # beside the models: what a compiler has made is kept, and can be shipped in an image
# Where nearly all of the networks' time goes; what lies between is a few convolutions and norms.
BLOCKS = (BasicTransformerBlock, ResnetBlock2D, AutoencoderTinyBlock)
# Compiled versions of one block's code: as many as there are widths, times shapes.
MAX_VERSIONS = 1024


def why_nothing_compiles(device: torch.device) -> str:
    """What is missing to compile for `device`, as a sentence's end; empty if nothing is."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    named, usual = ("CC", ("gcc", "clang")) if device.type == "cuda" else ("CXX", ("g++", "clang++"))
    compilers = [os.environ[named]] if os.environ.get(named) else usual
    if not any(map(shutil.which, compilers)):
        return f"there is no compiler ({' or '.join(compilers)}); install one, or name it in {named}"
    return ""


def keep_compiled(cache: Path) -> None:
    """Let torch keep what it compiles in `cache`, unless the environment names another folder or it cannot be
    written, as in a container whose weights are read-only; then it is torch's own temporary folder."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        writable = os.access(cache, os.W_OK)
    except OSError:
        writable = False
    if writable:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    else:
        logger.warning("weights/%s cannot be written: what is compiled is not kept", FOLDER)


class _Blocks:
    """The blocks of a network that one compiled code fits: of one class, with weights of the same shapes."""

    def __init__(self, modules: Sequence[nn.Module], how: dict[str, Any]) -> None:
        self._modules = modules
        self._how = how
        self._compiling = False

    @contextmanager
    def compiling(self) -> Iterator[None]:
        """Within it, calls of these blocks, and of no others, are compiled for the shapes that they bring."""
        for module in self._modules:
            if "forward" not in vars(module):
                module.forward = self._compiled(module.forward)
        self._compiling = True
        versions = {"recompile_limit": MAX_VERSIONS, "accumulated_recompile_limit": MAX_VERSIONS}
        try:
            with torch._dynamo.config.patch(versions):
                yield
        finally:
            self._compiling = False

    def leave(self) -> None:
        """Let them run as they are."""
        for module in self._modules:
            vars(module).pop("forward", None)

    def _compiled(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        compiled = torch.compile(forward, dynamic=False, fullgraph=True, **self._how)

        def call(*arguments: Any, **named: Any) -> Any:
            compiler: Any = torch.compiler
            with compiler.set_stance("default" if self._compiling else "eager_on_recompile"):
                return compiled(*arguments, **named)

        return call


class CompiledEngine(Engine):
    """The model's own networks, for batches of 1, 2, 4, 8 and so on: others are padded to these.

    It serves everything: what is not compiled is not slower here than elsewhere. `recorder` makes what makes
    CUDA graphs; without it there are none.
    """

    def __init__(
        self,
        unet: Any,
        decoder: Any,
        recorder: Callable[[], Record] | None = None,
        backend: str = "inductor",
    ) -> None:
        super().__init__(unet, decoder)
        self._recorder, record = recorder, recorder and recorder()
        names = ("text_embeds", "time_ids")

        def evaluate(latents: Tensor, timestep: Tensor, states: Tensor, *others: Tensor | None) -> Tensor:
            *added, cond = others
            output: Tensor = unet(
                latents,
                timestep,
                states,
                timestep_cond=cond,
                added_cond_kwargs=None if added[0] is None else dict(zip(names, added, strict=True)),
                return_dict=False,
            )[0]
            return output

        self._recorded_unet = Recorded(evaluate, record)
        self._recorded_decoder = Recorded(
            lambda latents: decoder.decode(latents, return_dict=False)[0], record
        )
        self._regions = [
            _Blocks(alike, {"backend": backend}) for alike in (*_alike(unet), *_alike(decoder.decoder))
        ]
        self._left: list[tuple[Shape, _Blocks | None]] = []
        self._generate: Callable[[Shape], object] = lambda shape: None
        self._as_it_is = False  # no recording is looked for, nor made
        self._anew = False  # what was recorded is dropped

    def prepare(self, shapes: Sequence[Shape], generate: Callable[[Shape], object]) -> None:
        """Have `generate` make batches of each of `shapes` by this engine, recorded as they are; compiling
        for them is left to `improve`, the first of them first."""
        self._generate = generate
        for shape in shapes:
            self._record(shape)
        reason = why_nothing_compiles(self._unet.device)
        if reason:
            logger.warning("nothing is compiled, which is slower: %s", reason)
            return
        self._left = list(product(shapes, (*self._regions, None)))

    def improve(self) -> bool:
        """Compile one kind of block for one shape, or record what was compiled for it; seconds each.

        Return whether something is left to do. What cannot be compiled stays as it is, with a line in the
        log.
        """
        if not self._left:
            return False
        shape, region = self._left.pop(0)
        started = time.perf_counter()
        try:
            if region is None:
                self._record(shape)
                logger.info("%s is compiled; its recording took %.1f s", shape, time.perf_counter() - started)
            else:
                self._as_it_is = True
                with region.compiling():
                    self._generate(shape)
        except Exception as error:
            if is_device_error(error):
                raise
            logger.warning("a kind of block is not compiled, and runs as it is", exc_info=error)
            if region:
                region.leave()
                self._left = [(shape, other) for shape, other in self._left if other is not region]
        finally:
            self._as_it_is = False
        return bool(self._left)

    def unet(self, latents: Tensor, timestep: Tensor, condition: dict[str, Any]) -> Tensor:
        count, added = len(latents), condition.get("added_cond_kwargs", {})
        given = [condition["encoder_hidden_states"], added.get("text_embeds"), added.get("time_ids")]
        rows = (padded(each) for each in (*given, condition.get("timestep_cond")))
        output: Tensor = self._call(self._recorded_unet, padded(latents), timestep, *rows)
        return output[:count]

    def decode(self, latents: Tensor) -> Tensor:
        pixels: Tensor = self._call(self._recorded_decoder, latents.to(self._decoder.dtype))
        return pixels

    def begin(self) -> None:
        for recorded in (self._recorded_unet, self._recorded_decoder):
            recorded.turn += 1

    def release(self) -> bool:
        both = (self._recorded_unet, self._recorded_decoder)
        released = any([recorded.forget() for recorded in both])
        if released and self._recorder:
            record = self._recorder()
            for recorded in both:
                recorded.record = record
        return released

    def _record(self, shape: Shape) -> None:
        """Have it generated as it is, and recorded."""
        self._anew = True
        try:
            self._generate(shape)
        finally:
            self._anew = False
        self._generate(shape)

    def _call(self, recorded: Recorded, *inputs: Tensor | None) -> Any:
        return recorded.function(*inputs) if self._as_it_is else recorded(*inputs, anew=self._anew)


def padded(rows: Tensor | None) -> Tensor | None:
    """`rows` (N, ...) with the last one repeated up to a power of two."""
    if rows is None or (missing := (1 << (len(rows) - 1).bit_length()) - len(rows)) == 0:
        return rows
    return torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])])


def _alike(network: nn.Module) -> list[list[nn.Module]]:
    """The blocks of a network, by what one compiled code fits."""
    alike: dict[Any, list[nn.Module]] = defaultdict(list)
    for module in network.modules():
        if isinstance(module, BLOCKS):
            shapes = tuple((name, value.shape) for name, value in module.named_parameters())
            alike[type(module), shapes].append(module)
    return list(alike.values())
