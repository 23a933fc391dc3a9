"""A CUDA device that computes nothing, for machines without one: its tensors are fake, the host's are real.

    load_guard(folder)
    with fake_cuda() as device:
        ...
    device.waits, device.copies

An operator on tensors of both raises, as CUDA's would. Where Python would wait for the device, and what would
be copied to it, is counted. A process of its own is the place for it, since the guard stays.
"""

import ctypes
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock, patch

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fewstep

PACKAGE = Path(fewstep.__file__).parent
COPYING = str(PACKAGE / "models" / "device.py")  # whose callers are of interest
MEMORY = (75 * 10**9, 80 * 10**9)  # bytes, free and in all
# A torch that was built for CPUs alone has nothing that switches CUDA devices, as even fakes ask for.
GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
C10_REGISTER_GUARD_IMPL(CUDA, c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>)
"""

aten = torch.ops.aten
PINNING = (aten.is_pinned.default, aten.pin_memory.default, aten._pin_memory.default)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)


def load_guard(folder: Path) -> None:
    """Let this process have tensors on CUDA that torch cannot use; g++ compiles what it takes in `folder`."""
    source, library, installed = folder / "guard.cpp", folder / "guard.so", Path(torch.__file__).parent
    source.write_text(GUARD)
    options = ["-std=c++20", "-shared", "-fPIC", f"-I{installed}/include", f"-L{installed}/lib", "-lc10"]
    subprocess.run(["g++", source, "-o", library, *options], check=True)
    ctypes.CDLL(str(library))


class Wait(NamedTuple):
    """Where Python waits until the device has done all that it was given."""

    phase: str
    what: str
    place: str


class Copy(NamedTuple):
    """From the host to the device. Unless pinned and not blocking, it is a wait, too."""

    phase: str
    place: str
    dtype: str  # in which it goes over the bus, since the host converts it first
    pinned: bool
    blocking: bool


class FakeCuda(TorchDispatchMode):
    """Takes every operator: on the host's tensors it is run, and else `FakeTensorMode`, below, fakes it."""

    def __init__(self) -> None:
        super().__init__()
        self.forget()

    def forget(self) -> None:
        """Count anew."""
        self.phase = ""  # set by whoever knows it
        self.waits: Counter[Wait] = Counter()
        self.copies: Counter[Copy] = Counter()  # bytes

    def waited(self, what: str) -> None:
        """Count a wait."""
        self.waits[Wait(self.phase, what, _place())] += 1

    def copied(self, source: Tensor, dtype: torch.dtype, blocking: bool) -> None:
        """Count a copy to the device."""
        copy = Copy(self.phase, _place(), str(dtype), hasattr(source, "pinned"), blocking)
        self.copies[copy] += source.numel() * dtype.itemsize

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in PINNING or kwargs.get("pin_memory"):
            return _pin(func, args, kwargs)
        if not any(map(_is_on_cuda, tree_leaves((args, kwargs)))):
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func.namespace == "aten":
            with self:  # inference mode leaves operators whole that are made of others
                if (made := func.decompose(*args, **kwargs)) is not NotImplemented:
                    return made
        if func is aten._local_scalar_dense.default:
            self.waited("a number is read")
            return 0 if args[0].dtype == torch.bool else 1  # norms are divided by
        if func in (aten._to_copy.default, aten.copy_.default):
            return self._copy(func, args, kwargs)
        if func in INDEXING:
            args = (args[0], self._used(args[1], args[2:]), *args[2:])
        elif {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
            self.waited(func.overloadpacket.__name__)  # and, since there is no value, raise
        return func(*args, **kwargs)

    def _copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What comes to the host is all true, or all zeros."""
        into = args[0] if func is aten.copy_.default else None
        source = args[0] if into is None else args[1]
        blocking = not (kwargs.get("non_blocking") or args[2:] == (True,))
        if source.device.type == "cpu":
            copy = func(*args, **kwargs)
            self.copied(source, copy.dtype, blocking)
            if into is None:
                copy.known = source
            return copy
        device = kwargs.get("device") if into is None else into.device
        if device is None or device.type == "cuda":
            return func(*args, **kwargs)
        if blocking or not hasattr(into, "pinned"):
            self.waited("a copy to the host")
        with unset_fake_temporarily():
            if into is None:
                into = torch.empty(source.shape, dtype=kwargs.get("dtype") or source.dtype)
            return into.fill_(into.dtype == torch.bool)

    def _used(self, indices: Any, values: Any) -> list[Tensor | None]:
        """Indices as the device uses them: the host's are copied, and what is true in a mask is counted."""
        used: list[Tensor | None] = []
        for index in indices:
            if index is not None and index.device.type == "cpu":
                self.copied(index, index.dtype, blocking=True)
                index = index.to("cuda")
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                used.append(index)
                continue
            if not values or values[0].numel() > 1:  # one value is written by the mask itself
                self.waited("a mask is an index")
            used += [index.new_zeros(index.numel(), dtype=torch.long) for _ in index.shape]
        return used


@contextmanager
def fake_cuda() -> Iterator[FakeCuda]:
    """Within it, tensors can be on the device, and fewstep and diffusers load models to it."""
    device = FakeCuda()
    from_pretrained, tolist = DiffusionPipeline.from_pretrained.__func__, FakeTensor.tolist

    def load(kind: Any, *args: Any, device_map: str, **options: Any) -> Any:
        """Read the files to the host, and let torch move what they hold."""
        pipeline = from_pretrained(kind, *args, **options)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.to(device_map)
        return pipeline

    def known_list(tensor: FakeTensor) -> Any:
        """What was sent as it is, for compel, which looks for words among the tokens on the device."""
        if not hasattr(tensor, "known"):
            return tolist(tensor)
        device.waited("a list is read")
        return tensor.known.tolist()

    stream = Mock(synchronize=lambda: device.waited("synchronize"))
    event = Mock(synchronize=stream.synchronize, elapsed_time=lambda other: 0.0)
    patches = (
        # The device is taken as one that can be used.
        patch("fewstep.models.device._cuda_problem", lambda: ""),
        # What asks the driver, which is not there, and not torch's operators.
        patch("torch.cuda.current_stream", lambda device=None: stream),
        patch("torch.cuda.synchronize", lambda device=None: stream.synchronize()),
        patch("torch.cuda.Event", lambda **options: event),
        patch("torch.cuda.mem_get_info", lambda device=None: MEMORY),
        # Which would have the files' readers allocate memory on the device.
        patch.object(DiffusionPipeline, "from_pretrained", classmethod(load)),
        patch.object(FakeTensor, "tolist", known_list),
    )
    with ExitStack() as stack:
        for each in (*patches, FakeTensorMode(allow_non_fake_inputs=True)):
            stack.enter_context(each)
        yield stack.enter_context(device)


def _is_on_cuda(leaf: object) -> bool:
    return isinstance(leaf, FakeTensor) or (isinstance(leaf, torch.device) and leaf.type == "cuda")


def _pin(func: Any, args: Any, kwargs: Any) -> Any:
    """Pinned memory, which there is none of without a device: the host's, with a note."""
    if func is aten.is_pinned.default:
        return hasattr(args[0], "pinned")
    with unset_fake_temporarily():
        pinned = args[0].clone() if func in PINNING else func(*args, **{**kwargs, "pin_memory": False})
    pinned.pinned = True
    return pinned


def _place() -> str:
    """FILE:LINE of fewstep that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(str(PACKAGE)) and file != COPYING:
            return f"{Path(file).relative_to(PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"
