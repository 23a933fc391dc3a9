"""What the miniature asks of a CUDA device: python fake_cuda_cases.py FOLDER writes FOLDER/traces.json.

`test_fake_cuda.py` runs it, in a process of its own, and looks at what it has written.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from fake_cuda import FakeCuda, fake_cuda, load_guard
from generating import results_of
from PIL import Image
from small import MINIATURE
from tiny import make_checkers
from torch import Tensor

from fewstep.generation.load import load_pipeline
from fewstep.generation.pipeline import Pipeline
from fewstep.generation.safety import load_safety_checker
from fewstep.lora.merge import NETWORKS, WeightMerger
from fewstep.lora.types import Mix
from fewstep.models.device import to_device, to_host
from fewstep.models.fp8 import to_fp8
from fewstep.models.sources import LCM_LORA
from fewstep.request import Inputs
from fewstep.settings import Settings

SETTINGS = Settings(device="cuda", verify="size")
STYLE = SETTINGS.styles_root / "miniature" / "flat.safetensors"
PHOTO, MASK = Image.new("RGB", (128, 128)), Image.new("L", (128, 128), 255)

# The inputs of each request of a batch; in order, since what was encoded is kept.
CASES: dict[str, list[dict[str, Any]]] = {
    "text": [{"prompt": "a red house"}],
    "prompt kept": [{"prompt": "a red house"}],
    "guidance": [{"prompt": "a blue house", "guidance": 2.0, "negative_prompt": "night"}],
    "weights of words": [{"prompt": "a (red)1.4 (old)0.6 house " + "in the snow at night with hills " * 12}],
    "clip skip": [{"prompt": "a green house", "clip_skip": 1}],
    "image": [{"prompt": "a white house", "image": PHOTO, "prompt_strength": 0.5}],
    "mask": [{"prompt": "a white house", "image": PHOTO, "mask": MASK, "prompt_strength": 0.5}],
    "batch": [{"prompt": f"a house {i}", "num_outputs": i} for i in (1, 2)],
    "style": [{"prompt": "a pink house", "style": "flat", "style_scale": 1.0}],
    "tiny VAE": [{"prompt": "a red house"}],
    "8 bits": [{"prompt": "a red house"}],
    "8 bits, a batch": [{"prompt": f"a house {i}"} for i in range(3)],
}
# Of the UNet's output: what must not be in the loop.
FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "a number that is read": lambda output: output * output.mean().item(),
    "a tensor of the host": lambda output: output + torch.ones(1, 1, 1, 16),
}
# Of a tensor of 4 values on the device: what is waited for,
WAITING: dict[str, Callable[[Tensor], object]] = {
    "item": lambda tensor: tensor.sum().item(),
    "bool": lambda tensor: bool(tensor.any()),
    "float": lambda tensor: float(tensor.sum()),
    "int": lambda tensor: int(tensor.sum()),
    "index": lambda tensor: range(tensor.sum().long()),
    "tolist": lambda tensor: tensor.tolist(),
    "cpu": lambda tensor: tensor.cpu(),
    "copy_": lambda tensor: torch.empty(4).copy_(tensor),
    "copy_ into pages": lambda tensor: torch.empty(4).copy_(tensor, non_blocking=True),
    "nonzero": lambda tensor: tensor.nonzero(),
    "reading by a mask": lambda tensor: tensor[tensor > 0],
    "writing by a mask": lambda tensor: tensor.index_put_((tensor > 0,), tensor),
    "equal": lambda tensor: torch.equal(tensor, tensor),
    "synchronize": lambda tensor: torch.cuda.synchronize(),
    "to_host": lambda tensor: to_host(tensor, tensor),
}
# and what is not, or is listed as a copy to the device.
NOT_WAITING: dict[str, Callable[[Tensor], object]] = {
    "sum": lambda tensor: tensor.sum(),
    "one value by a mask": lambda tensor: tensor.index_put_((tensor > 0,), tensor.sum()),
    "indices": lambda tensor: tensor[torch.arange(2, device="cuda")],
    "into pinned memory": lambda tensor: torch.empty(4, pin_memory=True).copy_(tensor, non_blocking=True),
    "to_device": lambda tensor: to_device(torch.ones(4), tensor.device) + tensor,
    "pages": lambda tensor: torch.ones(4).to(tensor.device, torch.float64) + tensor,
}


def trace(device: FakeCuda, call: Callable[[], Any]) -> dict[str, Any]:
    """What `call` asks of the device, the errors that it raises or logs, and the types of what it returns."""
    device.forget()
    device.phase, results, errors = "before", [], []
    handler = logging.Handler(logging.ERROR)
    handler.emit = lambda record: errors.append(handler.format(record))
    logging.getLogger("fewstep").addHandler(handler)
    try:
        found = call()
        results = [type(result).__name__ for result in found] if isinstance(found, list) else []
    except Exception as raised:
        errors.append(f"{type(raised).__name__}: {raised}")
    logging.getLogger("fewstep").removeHandler(handler)
    return {
        "results": results,
        "errors": errors,
        "waits": [wait._asdict() | {"times": times} for wait, times in device.waits.items()],
        "copies": [copy._asdict() | {"bytes": size} for copy, size in device.copies.items()],
    }


@contextmanager
def phases(pipeline: Pipeline, device: FakeCuda) -> Iterator[None]:
    """Tell the device what runs: what is before the loop, the loop, the decoder, or what is after it."""

    def enter(phase: str) -> Callable[..., None]:
        return lambda *_: setattr(device, "phase", phase)

    decoder = pipeline.decoder.decoder
    hooks = [
        pipeline.diffusion.unet.register_forward_pre_hook(enter("loop")),
        decoder.register_forward_pre_hook(enter("decoder")),
        decoder.register_forward_hook(enter("after")),
    ]
    yield
    for hook in hooks:
        hook.remove()


def generate(pipeline: Pipeline, device: FakeCuda, case: str) -> dict[str, Any]:
    """The trace of a batch, which is encoded and generated."""
    inputs = [Inputs.create(MINIATURE, seed=seed, **given) for seed, given in enumerate(CASES[case])]
    loras = [pipeline.adapters.read(STYLE, "style")] if inputs[0].styles else []
    with phases(pipeline, device):
        return trace(device, lambda: results_of(pipeline, *inputs, loras=loras))


def generate_wrongly(pipeline: Pipeline, device: FakeCuda, fault: str) -> dict[str, Any]:
    """Likewise, with a fault in every evaluation of the UNet."""
    hook = pipeline.diffusion.unet.register_forward_hook(lambda _, __, output: (FAULTS[fault](output[0]),))
    found = generate(pipeline, device, "text")
    hook.remove()
    return found


def merge(pipeline: Pipeline, device: FakeCuda) -> dict[str, Any]:
    """The trace of a change of style, by a merger that keeps nothing on the device; with the bytes of the
    fp16 weights that it changes, and of the matrices of all that is added to these."""
    folder, networks = SETTINGS.weights_root / "miniature", NETWORKS[MINIATURE.family]
    merger = WeightMerger(folder, {name: pipeline.diffusion.components[name] for name in networks})
    merger.lcm_lora = merger.read(folder / LCM_LORA, "lcm")
    style = merger.read(STYLE, "style")
    merger.apply(Mix())
    found = trace(device, lambda: merger.apply(Mix(((style, 0.7),))))
    layers = style.modules
    below = [module for name, module in merger.lcm_lora.modules.items() if name in layers]
    found["matrices"] = sum(module.down.nbytes + module.up.nbytes for module in (*layers.values(), *below))
    weights = (len(module.up) * module.down[0].numel() for module in layers.values())
    found["weights"] = torch.float16.itemsize * sum(weights)
    return found


def main(folder: Path) -> None:
    """Trace everything; `folder` is empty."""
    load_guard(folder)
    make_checkers(folder, flags=False)
    with fake_cuda() as device:
        pipelines = []
        for vae, checker in (("full", "clip"), ("tiny", "vit"), ("full", "clip")):
            pipeline = load_pipeline(MINIATURE, replace(SETTINGS, vae=vae))
            pipeline.checker = load_safety_checker(folder, checker, pipeline.device, pipeline.dtype, fix="")
            pipelines.append(pipeline)
        full, tiny, in_8_bits = pipelines
        to_fp8(in_8_bits.diffusion.unet, multiply=True)
        of_case = {"tiny VAE": tiny, "8 bits": in_8_bits, "8 bits, a batch": in_8_bits}
        found = {
            "cases": {case: generate(of_case.get(case, full), device, case) for case in CASES},
            "faults": {fault: generate_wrongly(full, device, fault) for fault in FAULTS},
            "calls": {
                name: trace(device, lambda call=call: call(torch.ones(4, device="cuda")))
                for name, call in (WAITING | NOT_WAITING).items()
            },
            "merge": merge(full, device),
        }
    (folder / "traces.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
