"""What a training run must know to go on: weights, their average, the optimiser's moments, and how far it
came; in files of tensors that are either whole or not there."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.errors import TrainingError

logger = logging.getLogger(__name__)

MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum")  # AdamW's, and Muon's, of each parameter


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


@dataclass
class Checkpoints:
    """Saves a run to `folder` and resumes it from there; the newest `kept` checkpoints stay.

    `config` is JSON; a run of another one is not resumed. `best` is the lowest validation loss so far.
    """

    folder: Path
    parameters: list[nn.Parameter]
    ema: list[Tensor]
    optimizer: torch.optim.AdamW
    config: str
    kept: int
    scaler: torch.amp.GradScaler | None
    best: float | None = None

    def latest(self) -> str:
        """Return a clause that says which checkpoint there is to go on from."""
        steps = [int(path.stem.removeprefix("step-")) for path in self._saved()]
        return f"the last checkpoint is of step {steps[-1]}" if steps else "there is no checkpoint"

    def save(self, step: int) -> None:
        """Write the checkpoint of `step`. Raises TrainingError when that fails; earlier checkpoints stay."""
        tensors: dict[str, Tensor] = {}
        for i, (parameter, average) in enumerate(zip(self.parameters, self.ema, strict=True)):
            tensors[f"{i}.value"], tensors[f"{i}.ema"] = parameter.detach(), average
            # What no gradient reached (SDXL never uses its first encoder's last layer) has no state.
            state = self.optimizer.state.get(parameter, {})
            tensors |= {f"{i}.{name}": state[name] for name in MOMENTS if name in state}
        scaler = self.scaler.state_dict() if self.scaler else None
        run = json.dumps({"step": step, "best": self.best, "config": self.config, "scaler": scaler})
        try:
            write_tensors(self.folder / f"step-{step:06}.safetensors", tensors, {"run": run})
        except TrainingError as error:
            raise TrainingError(f"{error.sentence} {self.latest()}") from None
        for old in self._saved()[: -self.kept]:
            old.unlink()

    def resume(self) -> int:
        """Take up the newest sound checkpoint and return its step; 0 without one.

        Raises TrainingError for one of another configuration.
        """
        for path in reversed(self._saved()):
            try:
                return self._load(path)
            except SafetensorError:  # a machine that lost its power while it wrote
                logger.warning("%s is damaged; the one before it is taken", path.name)
        return 0

    def _load(self, path: Path) -> int:
        with safe_open(path, framework="pt") as file, torch.no_grad():
            run = json.loads(file.metadata()["run"])
            if run["config"] != self.config:
                old, new = json.loads(run["config"]), json.loads(self.config)
                both = [(name, old.get(name), new.get(name)) for name in sorted({*old, *new})]
                changed = ", ".join(f"{name} {a} instead of {b}" for name, a, b in both if a != b)
                hint = "name another folder or remove them"
                raise TrainingError(f"the checkpoints are of a run with {changed}; {hint}")
            names = set(file.keys())
            for i, (parameter, average) in enumerate(zip(self.parameters, self.ema, strict=True)):
                parameter.copy_(file.get_tensor(f"{i}.value"))
                average.copy_(file.get_tensor(f"{i}.ema"))
                found = [name for name in MOMENTS if f"{i}.{name}" in names]
                if found:
                    state = {name: file.get_tensor(f"{i}.{name}").to(parameter.device) for name in found}
                    for name in (name for name in found if name != "step"):
                        # In the parameter's own order of memory: the fused AdamW reads both side by side.
                        state[name] = torch.empty_like(parameter).copy_(state[name])
                    self.optimizer.state[parameter] = state
        self.best = run["best"]
        if self.scaler and run["scaler"]:
            self.scaler.load_state_dict(run["scaler"])
        logger.info("%s: resuming at step %d", self.folder.name, run["step"])
        return int(run["step"])

    def _saved(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"))
