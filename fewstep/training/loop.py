"""One training loop: AdamW, warm-up then a linear fall to zero, EMA, and checkpoints that resume exactly.

A step's random numbers come from its own number (`step_generator`), so a run that was interrupted goes on
with the very batches it would have seen. Checkpoints are safetensors: nothing is ever unpickled.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Schedule:
    """How one stage is optimised."""

    steps: int
    lr: float
    warmup: int = 50
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    checkpoint_every_s: float = 120.0

    def lr_at(self, step: int) -> float:
        """Warm-up to `lr`, flat for the first 40 %, then linear to zero."""
        fall = max(1.0, self.steps * 0.6)
        return self.lr * min((step + 1) / self.warmup, 1.0, (self.steps - step) / fall)


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step, on the CPU whatever the device: a resumed run draws the same ones."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


def optimise(
    name: str,
    module: nn.Module,
    loss: Callable[[int], Tensor],
    schedule: Schedule,
    checkpoint: Path,
    average: nn.Module | None = None,
) -> None:
    """Train the parameters of `module` that require a gradient; leave their EMA in it.

    `loss(step)` returns a scalar. An interrupted run resumes from `checkpoint`; a finished one returns at
    once. `average`, a frozen copy of a `module` that is trained whole, holds the EMA of every step.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=schedule.lr, weight_decay=schedule.weight_decay, fused=True)
    ema = [p.detach() for p in average.parameters()] if average else [p.detach().clone() for p in parameters]
    start = _resume(checkpoint, parameters, ema, optimizer)
    saved_at = time.monotonic()
    progress = tqdm(range(start, schedule.steps), name, schedule.steps, initial=start, mininterval=5.0)
    running: float | None = None
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr_at(step)
        value = loss(step)
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, schedule.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # A short memory at first: the EMA of a young model must not hold its random start.
        decay = min(schedule.ema_decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(ema, [p.detach() for p in parameters], 1.0 - decay)
        if step % 10 == 0:
            now = float(value.detach())
            running = now if running is None else 0.9 * running + 0.1 * now
            progress.set_postfix(loss=f"{running:.4f}", refresh=False)
        if time.monotonic() - saved_at > schedule.checkpoint_every_s:
            _save(checkpoint, step + 1, parameters, ema, optimizer)
            saved_at = time.monotonic()
    if start < schedule.steps:
        _save(checkpoint, schedule.steps, parameters, ema, optimizer)
    with torch.no_grad():
        for parameter, mean in zip(parameters, ema, strict=True):
            parameter.copy_(mean)


def _save(
    path: Path, step: int, parameters: list[nn.Parameter], ema: list[Tensor], optimizer: torch.optim.AdamW
) -> None:
    tensors: dict[str, Tensor] = {}
    for i, (parameter, average) in enumerate(zip(parameters, ema, strict=True)):
        tensors[f"{i}.value"], tensors[f"{i}.ema"] = parameter.detach(), average
        # A parameter that no gradient reached (SDXL never uses its first encoder's last layer) has no state.
        state = optimizer.state.get(parameter, {})
        tensors |= {f"{i}.{name}": state[name] for name in ("exp_avg", "exp_avg_sq") if name in state}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file({k: v.contiguous() for k, v in tensors.items()}, part, metadata={"step": str(step)})
    part.replace(path)  # a run killed while saving keeps its last whole checkpoint


def _resume(
    path: Path, parameters: list[nn.Parameter], ema: list[Tensor], optimizer: torch.optim.AdamW
) -> int:
    if not path.exists():
        return 0
    with safe_open(path, framework="pt") as file, torch.no_grad():
        step = int(file.metadata()["step"])
        for i, (parameter, average) in enumerate(zip(parameters, ema, strict=True)):
            parameter.copy_(file.get_tensor(f"{i}.value"))
            average.copy_(file.get_tensor(f"{i}.ema"))
            if f"{i}.exp_avg" not in file.keys():
                continue
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step)).to(parameter.device),
                "exp_avg": file.get_tensor(f"{i}.exp_avg").to(parameter),
                "exp_avg_sq": file.get_tensor(f"{i}.exp_avg_sq").to(parameter),
            }
    logger.info("%s: resuming at step %d", path.name, step)
    return step
