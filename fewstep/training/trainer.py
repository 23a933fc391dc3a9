"""One training loop on accelerate: AdamW, warm-up then a linear fall to zero, EMA, checkpoints that resume
exactly.

A step's random numbers come from its own number (`StepRandom`), so a run that was interrupted goes on with
the very batches it would have seen, and several processes see what one would. Checkpoints are safetensors:
nothing is ever unpickled.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from tqdm import tqdm

from fewstep.errors import TrainingError
from fewstep.training.checkpoint import Checkpoints
from fewstep.training.muon import Muon, matrices_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """How one stage is optimised."""

    steps: int
    lr: float
    batch: int = 1  # images a step; processes and accumulation take equal shares of them
    accumulate: int = 1  # parts of a process's share that go through the network one after the other
    warmup: int = 50
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    flat: float = 0.4  # share of the steps at the full rate
    muon: bool = False  # for the weights that are matrices, instead of AdamW
    checkpoint_every: int = 100  # steps
    checkpoints_kept: int = 2

    def lr_at(self, step: int) -> float:
        """Return the learning rate: warm-up to `lr`, `flat` for a share of the steps, then linear to zero."""
        fall = max(1.0, self.steps * (1 - self.flat))
        return self.lr * min((step + 1) / self.warmup, 1.0, (self.steps - step) / fall)


Rows = TypeVar("Rows", Tensor, list[Any])


@dataclass(frozen=True)
class Shard:
    """Part `index` of `count` equal parts of a step's batch."""

    index: int = 0
    count: int = 1

    def of(self, rows: Rows) -> Rows:
        """Return this part of `rows`, which are as many as the step's whole batch."""
        size = len(rows) // self.count
        return rows[self.index * size : (self.index + 1) * size]


WHOLE = Shard()


class StepRandom:
    """The random numbers of one share of one step, on the CPU whatever the device.

    All shares together draw the same numbers, however many they are.
    """

    def __init__(self, seed: int, step: int, share: Shard = WHOLE) -> None:
        self._generator, self._share = step_generator(seed, step), share

    def normal(self, *shape: int) -> Tensor:
        """Return noise of `shape`, whose first dimension is this share's images."""
        first, *rest = shape
        return self._share.of(torch.randn(first * self._share.count, *rest, generator=self._generator))

    def uniform(self, count: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Return (count,) in [low, high)."""
        drawn = torch.rand(count * self._share.count, generator=self._generator)
        return self._share.of(drawn) * (high - low) + low

    def below(self, high: int, count: int) -> Tensor:
        """Return (count,) whole numbers in [0, high)."""
        return self._share.of(torch.randint(high, (count * self._share.count,), generator=self._generator))

    def stratified(self, count: int) -> Tensor:
        """Return (count,) in [0, 1), one in each of as many equal parts as the whole batch has images."""
        total = count * self._share.count
        drawn = (torch.arange(total) + torch.rand(total, generator=self._generator)) / total
        return self._share.of(drawn.clamp(max=1.0 - 2.0**-24))  # the last may be rounded up


def step_generator(seed: int, step: int) -> torch.Generator:
    """Return the generator of one step, on the CPU whatever the device; a resumed run draws the same."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


@dataclass(frozen=True)
class Validation:
    """What happens every `every` steps and at the end: `evaluate(step)` finds the averaged weights in the
    module, or in `average`, and returns a validation loss; when that is the lowest so far,
    `save_best(step)` may save them."""

    every: int
    evaluate: Callable[[int], float]
    save_best: Callable[[int], None]


Loss: TypeAlias = Callable[[int, Shard], Tensor]


class _StepLoss(nn.Module):
    """The loss as the module whose forward pass accelerate wraps: its hooks then see every call of `module`,
    whatever part the loss gives it."""

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, step: int, share: Shard) -> Tensor:
        return self.loss(step, share)


def optimise(
    name: str,
    module: nn.Module,
    loss: Loss,
    schedule: Schedule,
    checkpoints: Path,
    average: nn.Module | None = None,
    accelerator: Accelerator | None = None,
    config: Mapping[str, object] | None = None,
    validation: Validation | None = None,
) -> None:
    """Train the parameters of `module` that require a gradient; leave their EMA in it.

    `loss(step, share)` returns a scalar, the mean over its share of the step's batch. An interrupted run
    resumes from the folder `checkpoints`, if it was started with the same `config`; a finished one returns
    at once. `average`, a frozen copy of a `module` that is trained whole, holds the EMA of every step.

    Raises TrainingError when the loss is no number, for a batch that cannot be shared evenly, for
    checkpoints of another `config` and for a full disk; what was saved until then stays.
    """
    accelerator = accelerator or Accelerator(device_placement=False)
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise TrainingError("weights that are shared out (FSDP, DeepSpeed) cannot be trained; configure DDP")
    check_shares(schedule, accelerator)
    parameters = [p for p in module.parameters() if p.requires_grad]
    matrices = matrices_of(module) if schedule.muon else set()
    optimizer = Muon(parameters, matrices, schedule.lr, schedule.weight_decay)
    ema = [p.detach() for p in average.parameters()] if average else [p.detach().clone() for p in parameters]
    run, kept = json.dumps(config or {}, sort_keys=True, default=str), schedule.checkpoints_kept
    saved = Checkpoints(checkpoints, parameters, ema, optimizer, run, kept, accelerator.scaler)
    start = saved.resume()
    check_same(start, "checkpoints; name a folder that all of them share", accelerator)
    processes = "1 process" if accelerator.num_processes == 1 else f"{accelerator.num_processes} processes"
    logger.info("%s: %d steps of %d on %s", name, schedule.steps, schedule.batch, processes)
    step_loss, prepared = accelerator.prepare(_StepLoss(module, loss), optimizer)
    main, steps = accelerator.is_main_process, range(start, schedule.steps)
    progress = tqdm(steps, name, schedule.steps, initial=start, mininterval=5.0, disable=not main)
    began, running = time.monotonic(), None
    for step in progress:
        value = _step(accelerator, step_loss, prepared, saved, schedule, step)
        # A short memory at first: the EMA of a young model must not hold its random start.
        decay = min(schedule.ema_decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(ema, [p.detach() for p in parameters], 1.0 - decay)

        running = value if running is None else 0.9 * running + 0.1 * value
        rate = (step + 1 - start) * schedule.batch / (time.monotonic() - began)
        progress.set_postfix({"loss": f"{running:.4f}", "images/s": f"{rate:.1f}"}, refresh=False)
        figures = {"loss": value, "lr": schedule.lr_at(step), "images_per_s": rate}
        last = step + 1 == schedule.steps
        if validation and main and (last or (step + 1) % validation.every == 0):
            with nullcontext() if average else _averaged(parameters, ema):
                found = figures["validation_loss"] = validation.evaluate(step + 1)
                if saved.best is None or found < saved.best:
                    saved.best = found
                    validation.save_best(step + 1)
        accelerator.log(figures, step=step + 1)
        if main and (last or (step + 1) % schedule.checkpoint_every == 0):
            saved.save(step + 1)
    accelerator.wait_for_everyone()
    _copy(parameters, ema)


def check_shares(schedule: Schedule, accelerator: Accelerator) -> None:
    """Raises TrainingError for a batch that cannot be shared evenly."""
    parts = accelerator.num_processes * schedule.accumulate
    if schedule.batch % parts and parts > 1:
        hint = "choose a multiple of that"
        raise TrainingError(f"a batch of {schedule.batch} cannot be shared evenly by {parts}; {hint}")


def check_same(number: int, what: str, accelerator: Accelerator) -> None:
    """Raises TrainingError, which says what is different, where a process has another `number`."""
    own = torch.tensor([number], device=accelerator.device)
    if (accelerator.gather(own) != own).any():
        raise TrainingError(f"the processes see different {what}")


def _step(
    accelerator: Accelerator,
    step_loss: nn.Module,
    optimizer: torch.optim.Optimizer,
    saved: Checkpoints,
    schedule: Schedule,
    step: int,
) -> float:
    """Do one step with the gradients of all its parts, and return the mean loss over all processes. Raises
    TrainingError and leaves the parameters where the loss is no number."""
    for group in optimizer.param_groups:
        group["lr"] = schedule.lr_at(step)
    total, parts = torch.zeros((), device=accelerator.device), schedule.accumulate
    for part in range(parts):
        waits = part + 1 < parts  # the processes exchange gradients once a step
        share = Shard(accelerator.process_index * parts + part, accelerator.num_processes * parts)
        with accelerator.no_sync(step_loss) if waits else nullcontext():
            value = step_loss(step, share) / parts
            accelerator.backward(value)
        total += value.detach()
    mean: Tensor = accelerator.reduce(total, "mean")
    norm = accelerator.clip_grad_norm_(saved.parameters, schedule.max_grad_norm)
    # fp16 leaves out a step whose gradients overflow, and lowers its scale.
    if not mean.isfinite() or not (accelerator.scaler or norm.isfinite()):
        hint = f"{saved.latest()}, a lower learning rate may help"
        raise TrainingError(f"the loss of step {step + 1} is not a number; {hint}")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return mean.item()


@contextmanager
def _averaged(parameters: list[nn.Parameter], ema: list[Tensor]) -> Iterator[None]:
    """Within it, the average is in the place of the parameters."""
    own = [parameter.detach().clone() for parameter in parameters]
    _copy(parameters, ema)
    try:
        yield
    finally:
        _copy(parameters, own)


@torch.no_grad()
def _copy(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    torch._foreach_copy_(list(parameters), list(values))
