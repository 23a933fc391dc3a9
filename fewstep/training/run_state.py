"""What a training run must know to go on: weights, their average, the optimizer's moments, and how far it
came."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.errors import TrainingError

logger = logging.getLogger(__name__)

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's, of each parameter


class RunState:
    """Saves to and resumes from `folder`; the newest `kept` checkpoints stay."""

    def __init__(
        self,
        folder: Path,
        parameters: list[nn.Parameter],
        ema: list[Tensor],
        optimizer: torch.optim.AdamW,
        config: Mapping[str, object],
        *,
        kept: int,
    ) -> None:
        self.folder, self.kept = folder, kept
        self._parameters, self._ema, self._optimizer = parameters, ema, optimizer
        self._config = json.dumps(config, sort_keys=True, default=str)
        self._best: float | None = None

    def told(self) -> str:
        """Which checkpoint there is to go on from."""
        saved = self._saved()
        return f"the last checkpoint is of step {_step_of(saved[-1])}" if saved else "there is no checkpoint"

    def save(self, step: int) -> None:
        """Raises TrainingError when it cannot be written; earlier checkpoints stay."""
        tensors: dict[str, Tensor] = {}
        for i, (parameter, average) in enumerate(zip(self._parameters, self._ema, strict=True)):
            tensors[f"{i}.value"], tensors[f"{i}.ema"] = parameter.detach(), average
            # A parameter that no gradient reached (SDXL never uses its first encoder's last layer) has no
            # state.
            state = self._optimizer.state.get(parameter, {})
            tensors |= {f"{i}.{name}": state[name] for name in MOMENTS if name in state}
        self._write(self.folder / f"step-{step:06}.safetensors", tensors, step)
        for old in self._saved()[: -self.kept]:
            old.unlink()

    def is_best(self, loss: float) -> bool:
        """Whether no validation loss was lower so far; remembered with the next checkpoint."""
        if self._best is not None and not loss < self._best:
            return False
        self._best = loss
        return True

    def resume(self) -> int:
        """Take up the newest checkpoint and return its step; 0 without one.

        Raises TrainingError for one of another configuration.
        """
        saved = self._saved()
        if not saved:
            return 0
        with safe_open(saved[-1], framework="pt") as file, torch.no_grad():
            told = json.loads(file.metadata()["run"])
            if told["config"] != self._config:
                raise TrainingError(
                    f"the checkpoints are of a run with {_differences(told['config'], self._config)}; "
                    "name another folder or remove them"
                )
            names = set(file.keys())
            for i, (parameter, average) in enumerate(zip(self._parameters, self._ema, strict=True)):
                parameter.copy_(file.get_tensor(f"{i}.value"))
                average.copy_(file.get_tensor(f"{i}.ema"))
                if f"{i}.exp_avg" in names:
                    self._optimizer.state[parameter] = {
                        name: file.get_tensor(f"{i}.{name}").to(parameter.device) for name in MOMENTS
                    }
        self._best = told["best"]
        logger.info("%s: resuming at step %d", self.folder.name, told["step"])
        return int(told["step"])

    def _saved(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"))

    def _write(self, path: Path, tensors: Mapping[str, Tensor], step: int) -> None:
        run = json.dumps({"step": step, "best": self._best, "config": self._config})
        part = path.with_suffix(".part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(
                {name: value.contiguous() for name, value in tensors.items()}, part, metadata={"run": run}
            )
            part.replace(path)  # a run killed while saving keeps its last whole checkpoint
        except (OSError, SafetensorError) as error:
            part.unlink(missing_ok=True)
            logger.error("the checkpoint of step %d could not be written", step, exc_info=error)
            raise TrainingError(
                f"the checkpoint of step {step} could not be written, is the disk full? {self.told()}"
            ) from None


def _step_of(path: Path) -> int:
    return int(path.stem.removeprefix("step-"))


def _differences(old: str, new: str) -> str:
    one, other = json.loads(old), json.loads(new)
    return ", ".join(
        f"{name} {one.get(name)} instead of {other.get(name)}"
        for name in sorted({*one, *other})
        if one.get(name) != other.get(name)
    )
