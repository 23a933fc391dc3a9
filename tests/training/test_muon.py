"""Muon: which weights it is for, what it makes of an update, that it learns and resumes exactly."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from fewstep.training.muon import ITERATIONS, Muon, matrices_of, orthogonal
from fewstep.training.trainer import Schedule, StepRandom, optimise


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.SiLU(), nn.Conv2d(32, 24, 3), nn.Flatten(), nn.Linear(24 * 4, 20)
    )


@pytest.mark.parametrize("shape", [(32, 300), (300, 32), (48, 48)])
def test_an_update_keeps_its_directions_and_has_equal_singular_values(shape):
    torch.manual_seed(1)
    # What is seen seldom moves little by itself: directions of very different lengths.
    scales = torch.logspace(0, -2, min(shape))
    left, right = (torch.linalg.qr(torch.randn(side, min(shape)))[0] for side in shape)
    near = orthogonal(left * scales @ right.T)
    aligned = left.T @ near @ right
    assert near.shape == shape
    assert (aligned.diagonal() > 0.6).all() and (aligned.diagonal() < 1.25).all()
    assert (aligned - aligned.diagonal().diag()).abs().max() < 1e-3
    assert torch.allclose(near, orthogonal(5 * left * scales @ right.T), atol=1e-3)  # whatever its size


def test_it_is_the_plain_iteration_on_a_smaller_matrix():
    torch.manual_seed(2)
    matrix = torch.randn(24, 216, dtype=torch.float64)
    plain = matrix / matrix.norm()
    for _ in range(ITERATIONS):
        gram = plain @ plain.T
        plain = 3.4445 * plain + (-4.7750 * gram + 2.0315 * gram @ gram) @ plain
    assert torch.allclose(orthogonal(matrix), plain, atol=1e-6)


def test_it_is_for_matrices_of_features_only():
    module = nn.ModuleDict(
        {
            "words": nn.Embedding(500, 64),
            "pixels": nn.Conv2d(3, 64, 3),
            "deep": nn.Conv2d(64, 96, 3),
            "norm": nn.GroupNorm(8, 96),
            "linear": nn.Linear(96, 64),
            "out": nn.Conv2d(64, 4, 3),
        }
    )
    assert matrices_of(module) == {module["deep"].weight, module["linear"].weight}


def test_what_is_no_matrix_moves_as_by_adamw_and_a_matrix_by_as_much_as_the_rate_says():
    one, other = network(), network()
    matrices = matrices_of(one)
    both = (
        Muon([*one.parameters()], matrices, 1e-3, 0.0),
        torch.optim.AdamW(other.parameters(), 1e-3, weight_decay=0.0, fused=True),
    )
    x = torch.randn(64, 3, 6, 6)
    before = [p.detach().clone() for p in one.parameters()]
    for module, optimizer in zip((one, other), both, strict=True):
        module(x).square().sum().backward()
        optimizer.step()
    for was, mine, adamw in zip(before, one.parameters(), other.parameters(), strict=True):
        if mine in matrices:
            moved = (mine - was).detach().flatten(1)
            # Its root mean square is 0.2 lr for a matrix of full rank, as AdamW's is about.
            assert moved.norm().item() == pytest.approx(0.2e-3 * moved.numel() ** 0.5, rel=0.4)
        else:
            assert torch.equal(mine, adamw)


def test_a_matrix_goes_on_where_it_was_going():
    weight = nn.Parameter(torch.zeros(20, 30))
    optimizer = Muon([weight], {weight}, 1e-2, 0.0)
    torch.manual_seed(3)
    gradient = torch.randn(20, 30)
    for grad in (gradient, torch.zeros(20, 30)):
        before, weight.grad = weight.detach().clone(), grad
        optimizer.step()
        assert F.cosine_similarity((before - weight).flatten(), gradient.flatten(), dim=0) > 0.8


def test_it_learns_and_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path):
    target = network()
    for parameter in target.parameters():
        nn.init.normal_(parameter, std=0.1)
    values: list[float] = []

    class Interrupted(Exception):
        pass

    def train(folder: str, stop_at: int | None = None) -> nn.Module:
        module = network()

        def loss(step: int, share: object) -> torch.Tensor:
            if step == stop_at:
                raise Interrupted
            x = StepRandom(1, step).normal(16, 3, 6, 6)
            value = F.mse_loss(module(x), target(x).detach())
            values.append(value.item())
            return value

        how = Schedule(60, lr=1e-2, batch=16, warmup=5, ema_decay=0.9, checkpoint_every=10, muon=True)
        optimise("test", module, loss, how, tmp_path / folder)
        return module

    whole = train("whole")
    assert sum(values[-5:]) < 0.5 * sum(values[:5])
    with pytest.raises(Interrupted):
        train("broken", stop_at=35)
    assert all(map(torch.equal, train("broken").parameters(), whole.parameters()))
    names = load_file(tmp_path / "whole" / "step-000060.safetensors").keys()
    # One moment for a matrix, two for what is none.
    assert sum(name.endswith(".momentum") for name in names) == len(matrices_of(whole)) == 2
    assert sum(name.endswith(".exp_avg") for name in names) == len([*whole.parameters()]) - 2
