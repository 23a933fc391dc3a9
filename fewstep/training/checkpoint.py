"""What a training run must know to go on: weights, their average, the optimiser's moments, and how far it
came; in files of tensors that are either whole or not there."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.errors import TrainingError

logger = logging.getLogger(__name__)

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's, of each parameter


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors` as safetensors, beside `path` at first, so that whoever is killed or out of disk
    meanwhile leaves what was there. Raises TrainingError when they cannot be written."""
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(whole, part, metadata=dict(metadata))
        with part.open("rb+") as file:  # its bytes before its name
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, SafetensorError) as error:
        logger.error("%s could not be written", path.name, exc_info=error)
        raise TrainingError(f"{path.name} could not be written; is the disk full?") from None
    finally:
        part.unlink(missing_ok=True)


class Checkpoints:
    """Saves a run to `folder` and resumes it from there; the newest `kept` checkpoints stay."""

    def __init__(
        self,
        folder: Path,
        parameters: list[nn.Parameter],
        ema: list[Tensor],
        optimizer: torch.optim.AdamW,
        config: Mapping[str, object],
        *,
        kept: int,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:
        self.folder, self.kept, self._scaler = folder, kept, scaler
        self._parameters, self._ema, self._optimizer = parameters, ema, optimizer
        self._config = json.dumps(config, sort_keys=True, default=str)
        self._best: float | None = None

    def latest(self) -> str:
        """Return a clause that says which checkpoint there is to go on from."""
        saved = self._saved()
        if not saved:
            return "there is no checkpoint"
        return f"the last checkpoint is of step {int(saved[-1].stem.removeprefix('step-'))}"

    def save(self, step: int) -> None:
        """Write the checkpoint of `step`. Raises TrainingError when that fails; earlier checkpoints stay."""
        tensors: dict[str, Tensor] = {}
        for i, (parameter, average) in enumerate(zip(self._parameters, self._ema, strict=True)):
            tensors[f"{i}.value"], tensors[f"{i}.ema"] = parameter.detach(), average
            # A parameter that no gradient reached (SDXL never uses its first encoder's last layer) has no
            # state.
            state = self._optimizer.state.get(parameter, {})
            tensors |= {f"{i}.{name}": state[name] for name in MOMENTS if name in state}
        scaler = self._scaler.state_dict() if self._scaler else None
        run = json.dumps({"step": step, "best": self._best, "config": self._config, "scaler": scaler})
        try:
            write_tensors(self.folder / f"step-{step:06}.safetensors", tensors, {"run": run})
        except TrainingError as error:
            raise TrainingError(f"{error.sentence} {self.latest()}") from None
        for old in self._saved()[: -self.kept]:
            old.unlink()

    def is_best(self, loss: float) -> bool:
        """Return whether no validation loss was lower so far; remembered with the next checkpoint."""
        if self._best is not None and not loss < self._best:
            return False
        self._best = loss
        return True

    def resume(self) -> int:
        """Take up the newest sound checkpoint and return its step; 0 without one.

        Raises TrainingError for one of another configuration.
        """
        for path in reversed(self._saved()):
            try:
                step = self._load(path)
            except SafetensorError:  # a machine that lost its power while it wrote
                logger.warning("%s is damaged; the one before it is taken", path.name)
                continue
            logger.info("%s: resuming at step %d", self.folder.name, step)
            return step
        return 0

    def _load(self, path: Path) -> int:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            run = json.loads(file.metadata()["run"])
            if run["config"] != self._config:
                raise TrainingError(
                    f"the checkpoints are of a run with {_differences(run['config'], self._config)}; "
                    "name another folder or remove them"
                )
            names = set(file.keys())
            for i, (parameter, average) in enumerate(zip(self._parameters, self._ema, strict=True)):
                parameter.copy_(file.get_tensor(f"{i}.value"))
                average.copy_(file.get_tensor(f"{i}.ema"))
                if f"{i}.exp_avg" in names:
                    state = {name: file.get_tensor(f"{i}.{name}").to(parameter.device) for name in MOMENTS}
                    for name in ("exp_avg", "exp_avg_sq"):
                        # In the parameter's own order of memory: the fused AdamW reads both side by side.
                        state[name] = torch.empty_like(parameter).copy_(state[name])
                    self._optimizer.state[parameter] = state
        self._best = run["best"]
        if self._scaler and run["scaler"]:
            self._scaler.load_state_dict(run["scaler"])
        return int(run["step"])

    def _saved(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"))


def _differences(old: str, new: str) -> str:
    before, after = json.loads(old), json.loads(new)
    return ", ".join(
        f"{name} {before.get(name)} instead of {after.get(name)}"
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    )
