"""The training loop: resuming is exact, however many share the work; what goes wrong loses nothing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from fewstep.errors import TrainingError
from fewstep.training.trainer import Schedule, Shard, StepRandom, Validation, optimise

ROOT = Path(__file__).resolve().parents[2]


class Interrupted(Exception):
    pass


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 1))


def schedule(steps: int = 30, **more) -> Schedule:
    return Schedule(steps, lr=1e-2, warmup=5, ema_decay=0.9, **{"checkpoint_every": 1, "batch": 16, **more})


def losses(network: nn.Module, stop_at: int | None = None, broken_at: int | None = None):
    """Fits a function of random points; also the steps that were run."""
    seen: list[int] = []

    def loss(step: int, share: Shard) -> torch.Tensor:
        if step == stop_at:
            raise Interrupted
        seen.append(step)
        x = StepRandom(1, step, share).normal(16 // share.count, 4)
        value = (network(x)[:, 0] - x.sum(1)).square().mean()
        return value * float("nan") if step == broken_at else value

    return loss, seen


def train(network: nn.Module, folder: Path, how: Schedule | None = None, **more) -> list[int]:
    loss, seen = losses(network, more.pop("stop_at", None), more.pop("broken_at", None))
    optimise("test", network, loss, how or schedule(), folder, **more)
    return seen


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, one.parameters(), other.parameters()))


def resumed_to_the_same(checkpoints: Path, folder: Path, **more) -> list[int]:
    """Return the steps of a run that goes on from `checkpoints` and ends where a whole one does."""
    resumed, whole = module(), module()
    steps = train(resumed, checkpoints, schedule(**more))
    train(whole, folder / "whole")
    assert same(whole, resumed)
    return steps


@pytest.mark.parametrize("stop", [1, 10, 29])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path, stop):
    with pytest.raises(Interrupted):
        train(module(), tmp_path / "broken", stop_at=stop)
    assert resumed_to_the_same(tmp_path / "broken", tmp_path) == list(range(stop, 30))
    names = [sorted(path.name for path in (tmp_path / run).iterdir()) for run in ("whole", "broken")]
    assert names[0] == names[1] == ["step-000029.safetensors", "step-000030.safetensors"]
    one, other = (load_file(tmp_path / run / names[0][1]) for run in ("whole", "broken"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_finished_run_leaves_its_average_and_is_not_run_again(tmp_path):
    network, again = module(), module()
    train(network, tmp_path)
    saved = load_file(tmp_path / "step-000030.safetensors")
    for i, parameter in enumerate(network.parameters()):
        assert torch.equal(parameter, saved[f"{i}.ema"])
        assert not torch.equal(parameter, saved[f"{i}.value"])
    assert train(again, tmp_path) == []
    assert same(network, again)


def test_a_frozen_or_unused_parameter_keeps_its_value(tmp_path):
    network = nn.ModuleDict({"used": module(), "frozen": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    network["frozen"].requires_grad_(False)
    before = {name: value.clone() for name, value in network.state_dict().items()}

    def loss(step: int, share: Shard) -> torch.Tensor:
        return network["used"](torch.ones(1, 4)).square().mean()

    for _ in range(2):  # the second time from the checkpoint
        optimise("test", network, loss, Schedule(3, lr=1e-2), tmp_path)

    after = network.state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"used"}


def test_the_learning_rate_warms_up_and_falls_to_zero():
    how = Schedule(1000, lr=1.0, warmup=100)
    rates = [how.lr_at(step) for step in range(1000)]
    assert rates[0] == 0.01 and max(rates) == 1.0 and rates[300] == 1.0
    assert 0.0 < rates[-1] < 0.01


@pytest.mark.parametrize("count", [2, 3, 12])
def test_all_shares_together_draw_what_one_draws(count):
    def drawn(share: Shard) -> list[torch.Tensor]:
        draws, own = StepRandom(3, 7, share), 12 // share.count
        return [draws.below(50, own), draws.normal(own, 4, 2, 2), draws.uniform(own), draws.stratified(own)]

    whole = drawn(Shard())
    parts = zip(*(drawn(Shard(i, count)) for i in range(count)), strict=True)
    assert all(torch.equal(one, torch.cat(part)) for one, part in zip(whole, parts, strict=True))
    assert whole[3].mul(12).long().tolist() == list(range(12))  # one in each stratum
    assert not torch.equal(whole[1], StepRandom(3, 8).normal(12, 4, 2, 2))


def test_no_draw_is_rounded_up_to_one(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda count, generator: torch.full((count,), 1 - 2**-24))
    assert StepRandom(3, 7).stratified(16).max() < 1


@pytest.mark.numeric
def test_accumulated_parts_are_the_whole_batch(tmp_path):
    whole, parts = module(), module()
    unclipped = {"max_grad_norm": 1e9}  # AdamW alone would not notice gradients of another size
    train(whole, tmp_path / "whole", schedule(**unclipped))
    assert len(train(parts, tmp_path / "parts", schedule(accumulate=4, **unclipped))) == 120
    one, other = (load_file(tmp_path / run / "step-000030.safetensors") for run in ("whole", "parts"))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)


def test_a_batch_that_cannot_be_shared_evenly_is_refused(tmp_path):
    with pytest.raises(TrainingError, match="a batch of 16 cannot be shared evenly by 3"):
        train(module(), tmp_path, schedule(accumulate=3))


def test_checkpoints_of_another_run_are_refused(tmp_path):
    train(module(), tmp_path, schedule(3), config={"rank": 4, "lr": 1})
    with pytest.raises(TrainingError, match="a run with rank 4 instead of 8; name another folder"):
        train(module(), tmp_path, schedule(3), config={"rank": 8, "lr": 1})


def test_a_loss_that_is_no_number_stops_the_run_at_its_last_good_checkpoint(tmp_path):
    network, good = module(), module()
    with pytest.raises(TrainingError, match="the loss of step 18 is not a number; the last checkpoint is of"):
        train(network, tmp_path, schedule(checkpoint_every=5), broken_at=17)
    assert all(value.isfinite().all() for value in network.state_dict().values())
    assert train(good, tmp_path, schedule(checkpoint_every=5)) == list(range(15, 30))
    with pytest.raises(TrainingError, match="of step 1 is not a number; there is no checkpoint"):
        train(module(), tmp_path / "other", broken_at=0)


def test_the_best_average_is_kept_once_and_a_validation_changes_nothing(tmp_path):
    plain, watched = module(), module()
    train(plain, tmp_path / "plain")
    figures, kept, seen = iter([3.0, 1.0, 2.0, 1.0, 0.5, 0.9]), [], []

    def evaluate(step: int) -> float:
        seen.append([value.clone() for value in watched.parameters()])
        return next(figures)

    train(watched, tmp_path / "watched", validation=Validation(5, evaluate, kept.append))
    assert kept == [5, 10, 25] and len(seen) == 6
    assert same(plain, watched)
    assert all(torch.equal(a, b) for a, b in zip(seen[-1], watched.parameters(), strict=True))  # the average


def test_what_was_best_is_known_after_resuming(tmp_path):
    kept: list[int] = []
    with pytest.raises(Interrupted):
        train(module(), tmp_path, validation=Validation(5, lambda step: 1.0 / step, kept.append), stop_at=22)
    train(module(), tmp_path, validation=Validation(5, lambda step: 0.1, kept.append))
    assert kept == [5, 10, 15, 20]


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, caplog):
    with pytest.raises(Interrupted):
        train(module(), tmp_path / "run", stop_at=20)
    newest = tmp_path / "run" / "step-000020.safetensors"
    newest.write_bytes(newest.read_bytes()[:1000])
    assert resumed_to_the_same(tmp_path / "run", tmp_path) == list(range(19, 30))
    assert "step-000020.safetensors is damaged" in caplog.text


RUN = """
import resource, sys, time
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
import torch
from accelerate import Accelerator
torch.set_num_threads(1)
import test_trainer as t
accelerator = Accelerator(device_placement=False)
print(accelerator.num_processes, flush=True)
network = t.module()
loss, _ = t.losses(network)
def watched(step, share):
    {before}
    return loss(step, share)
how = t.schedule(30, checkpoint_every=5, **{more})
t.optimise("test", network, watched, how, Path(sys.argv[1]), accelerator=accelerator)
accelerator.end_training()
"""


def script(folder: Path, before: str = "pass", **more: int) -> Path:
    """A run that does what `before` says before every step."""
    path = folder / "run.py"
    path.write_text(RUN.format(root=str(ROOT), tests=str(Path(__file__).parent), before=before, more=more))
    return path


def test_a_full_disk_stops_the_run_and_leaves_the_earlier_checkpoint(tmp_path):
    """A file may have no more than 100 bytes from the 13th step on."""
    full = "if step == 12: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))"
    checkpoints = tmp_path / "checkpoints"
    command = [sys.executable, script(tmp_path, full), checkpoints]
    done = subprocess.run(command, capture_output=True, text=True)
    told = "step-000015.safetensors could not be written; is the disk full? the last checkpoint is of step 10"
    assert done.returncode == 1 and told in done.stderr, done.stderr[-2000:]
    left = sorted(path.name for path in checkpoints.iterdir())
    assert left == ["step-000005.safetensors", "step-000010.safetensors"]
    assert resumed_to_the_same(checkpoints, tmp_path, checkpoint_every=5) == list(range(10, 30))


def test_kill_9_loses_at_most_one_interval_between_checkpoints(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    command = [sys.executable, script(tmp_path, "time.sleep(0.05)"), checkpoints]
    run = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while not (checkpoints / "step-000015.safetensors").exists():
        assert run.poll() is None
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert resumed_to_the_same(checkpoints, tmp_path, checkpoint_every=5)[0] in (15, 20)


def test_two_processes_train_what_one_does(tmp_path):
    """DDP on the CPU by gloo; the sums differ in their order alone. (`accelerate launch` starts one process
    only where it has no GPU, whatever --num_processes says.)"""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    folder, environ = tmp_path / "two", os.environ | {"ACCELERATE_USE_CPU": "true"}
    command = [*launch, script(tmp_path, accumulate=2, max_grad_norm=10**9), folder]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(done.stdout.replace("22", "2 2").split()) == ["2", "2"], "both knew of each other"
    train(module(), tmp_path / "one", schedule(checkpoint_every=5, max_grad_norm=1e9))

    one, two = (load_file(tmp_path / run / "step-000030.safetensors") for run in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-6)
    with safe_open(folder / "step-000030.safetensors", framework="pt") as file:
        assert '"step": 30' in file.metadata()["run"]
