"""The training loop: resuming is exact, the EMA is what is left, a finished run is not run again."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fewstep.training.loop import Schedule, optimise, step_generator


class Interrupted(Exception):
    pass


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 1))


def train(network: nn.Module, checkpoint: Path, steps: int = 30, stop_at: int | None = None) -> list[int]:
    """Fit a function of random points; returns the steps that were run."""
    seen: list[int] = []

    def loss(step: int) -> torch.Tensor:
        if step == stop_at:
            raise Interrupted
        seen.append(step)
        x = torch.randn(16, 4, generator=step_generator(1, step))
        return (network(x)[:, 0] - x.sum(1)).square().mean()

    schedule = Schedule(steps, lr=1e-2, warmup=5, ema_decay=0.9, checkpoint_every_s=0.0)
    optimise("test", network, loss, schedule, checkpoint)
    return seen


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path):
    whole, broken, resumed = module(), module(), module()
    train(whole, tmp_path / "whole.safetensors")
    with pytest.raises(Interrupted):
        train(broken, tmp_path / "broken.safetensors", stop_at=17)

    steps = train(resumed, tmp_path / "broken.safetensors")

    assert steps == list(range(17, 30))
    for expected, value in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, value)


def test_a_finished_run_is_not_run_again(tmp_path):
    first, second = module(), module()
    train(first, tmp_path / "c.safetensors")
    assert train(second, tmp_path / "c.safetensors") == []
    for expected, value in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(expected, value)


def test_what_is_left_is_the_average_not_the_last_step(tmp_path):
    network = module()
    train(network, tmp_path / "c.safetensors")
    saved = load_file(tmp_path / "c.safetensors")
    for i, parameter in enumerate(network.parameters()):
        assert torch.equal(parameter, saved[f"{i}.ema"])
        assert not torch.equal(parameter, saved[f"{i}.value"])


def test_a_frozen_or_unused_parameter_keeps_its_value(tmp_path):
    network = nn.ModuleDict({"used": module(), "frozen": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    network["frozen"].requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}

    def loss(step: int) -> torch.Tensor:
        return network["used"](torch.ones(1, 4)).square().mean()

    for _ in range(2):  # the second time from the checkpoint
        optimise("test", network, loss, Schedule(3, lr=1e-2), tmp_path / "c.safetensors")

    after = network.state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"used"}


def test_the_learning_rate_warms_up_and_falls_to_zero():
    schedule = Schedule(1000, lr=1.0, warmup=100)
    rates = [schedule.lr_at(step) for step in range(1000)]
    assert rates[0] == 0.01 and max(rates) == 1.0 and rates[300] == 1.0
    assert 0.0 < rates[-1] < 0.01
