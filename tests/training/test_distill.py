"""Distillation on a real, small SDXL UNet: the loss's parts, what is trained, and that it learns."""

import contextlib
import copy
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from tiny import make_unet

from fewstep.models import device
from fewstep.training import distill
from fewstep.training.config import Plan
from fewstep.training.consistency import NoiseSchedule, solver_timesteps
from fewstep.training.distill import (
    Batch,
    FullStudent,
    LoraStudent,
    Roles,
    add_lora,
    consistency_loss,
    consistency_training,
    lora_roles,
    make_full_student,
    predict,
)
from fewstep.training.run import prepare
from fewstep.training.trainer import Schedule, StepRandom, optimise

pytestmark = pytest.mark.numeric


@pytest.fixture
def unet() -> UNet2DConditionModel:
    sdxl = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    return make_unet(**sdxl, projection_class_embeddings_input_dim=8 + 24, use_linear_projection=True)


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(
        latents=torch.randn(4, 4, 8, 8, generator=generator),
        prompt_embeds=torch.randn(4, 5, 12, generator=generator),
        pooled=torch.randn(4, 8, generator=generator),
        time_ids=torch.full((4, 6), 64.0),
    )


NOISE = NoiseSchedule(torch.linspace(0.9995, 0.005, 1000), "v_prediction")
STUDENT = LoraStudent(rank=4, guidance=(2.0, 4.0))
FULL = FullStudent(guidance=(2.0, 4.0), width=8)
T = torch.tensor([19, 259, 499, 999])


@pytest.fixture
def same_draws(monkeypatch) -> None:
    """The same draw at every step: on a network of random weights only that shows learning within seconds."""
    monkeypatch.setattr(distill, "StepRandom", lambda seed, step, share: StepRandom(0, 0, share))


@pytest.fixture
def asked(unet, monkeypatch) -> list[torch.Tensor]:
    """The timesteps of every pass through `unet`."""
    seen: list[torch.Tensor] = []
    forward = unet.forward
    monkeypatch.setattr(unet, "forward", lambda z, t, *a, **k: (seen.append(t), forward(z, t, *a, **k))[1])
    return seen


def loss_of(unet, batch, student=STUDENT, noise=NOISE, seed=0) -> torch.Tensor:
    return consistency_loss(lora_roles(unet), batch, noise, student, StepRandom(seed, 0))


def test_a_fresh_lora_changes_nothing_and_only_it_is_trained(unet, batch):
    before = predict(unet, batch.latents, T, batch)
    add_lora(unet, STUDENT)
    assert torch.equal(predict(unet, batch.latents, T, batch), before)

    loss_of(unet, batch).backward()

    trained = [name for name, parameter in unet.named_parameters() if parameter.grad is not None]
    assert trained and all("lora_" in name for name in trained)
    convolutions = [name for name in trained if "conv1" in name or "samplers" in name]
    assert convolutions, "the published LCM-LoRAs change convolutions too"
    with torch.no_grad():
        next(parameter for name, parameter in unet.named_parameters() if "lora_B" in name).add_(0.1)
    assert not torch.equal(predict(unet, batch.latents, T, batch), before), "after the loss it is on again"


def test_a_network_runs_in_the_callers_autocast_or_else_in_what_is_fast_here(unet, batch, monkeypatch):
    t, seen = torch.full((4,), 499), []
    unet.conv_in.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    for multiplies in (False, True):
        monkeypatch.setattr(device, "_multiplies_bf16", lambda multiplies=multiplies: multiplies)
        assert predict(unet, batch.latents, t, batch).dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.float16):
            predict(unet, batch.latents, t, batch)
    assert seen == [torch.float32, torch.float16, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("teacher", [True, False])
def test_the_student_learns_and_the_teacher_stays_as_it_is(unet, batch, tmp_path, same_draws, teacher):
    frozen = {name: value.clone() for name, value in unet.state_dict().items()}
    add_lora(unet, STUDENT)
    roles = lora_roles(unet, teacher)
    before = consistency_loss(roles, batch, NOISE, STUDENT, StepRandom(0, 0)).item()

    schedule = Schedule(25, lr=1e-2, warmup=5, ema_decay=0.5)
    loss = consistency_training(roles, lambda step, share: batch, NOISE, STUDENT, seed=5)
    optimise("LCM-LoRA", unet, loss, schedule, tmp_path)

    assert consistency_loss(roles, batch, NOISE, STUDENT, StepRandom(0, 0)).item() < 0.7 * before
    unet.unload_lora()
    assert all(torch.equal(value, frozen[name]) for name, value in unet.state_dict().items())


def test_only_the_students_answer_is_differentiated(batch):
    asked: list[tuple[str, bool]] = []

    def answers(who):
        return lambda z, t, batch, w: (asked.append((who, torch.is_grad_enabled())), torch.zeros_like(z))[1]

    roles = Roles(*map(answers, ("student", "target", "teacher")))
    consistency_loss(roles, batch, NOISE, STUDENT, StepRandom(0, 0))
    assert asked == [("student", True), ("teacher", False), ("teacher", False), ("target", False)]


@pytest.mark.parametrize("taught", [True, False])
def test_the_target_is_given_the_ddim_step_of_the_teachers_guided_estimate_or_of_the_image(batch, taught):
    """Steps 4 and 5 of Algorithm 1 by hand, for networks that predict x_0."""
    conditional, unconditional = torch.full_like(batch.latents, 2.0), torch.full_like(batch.latents, -1.0)
    seen = []

    def answer(z, t, shown, w):
        seen.append((z, t, w))
        return torch.zeros_like(z)

    def teacher(z, t, shown, w):
        return conditional if shown.prompt_embeds.any() else unconditional

    noise = NoiseSchedule(NOISE.alphas_cumprod, "sample")
    student = LoraStudent(guidance=(2.0, 4.0), skip=5)
    for seed in range(6):  # some go back to clean data
        seen.clear()
        roles = Roles(answer, answer, teacher if taught else None)
        consistency_loss(roles, batch, noise, student, StepRandom(seed, 0))
        (z_next, t_next, w), (z, t, _) = seen
        assert 2.0 <= w.min() and w.max() <= 4.0
        assert torch.equal(t, (t_next - 100).clamp(min=0))
        guided = conditional + w.reshape(-1, 1, 1, 1) * (conditional - unconditional)
        x_0 = guided if taught else batch.latents
        alpha, sigma = noise.signal_and_noise(t_next, z_next)
        eps = (z_next - alpha * x_0) / sigma
        alpha, sigma = noise.signal_and_noise(torch.where(t_next >= 100, t_next - 100, -1), z_next)
        torch.testing.assert_close(z, alpha * x_0 + sigma * eps, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("skip", "solver_steps"), [(1, 50), (5, 50), (50, 50), (1, 1)])
def test_one_consistency_step_goes_back_over_skip_solver_steps(unet, batch, asked, skip, solver_steps):
    """At most to clean data: there, the target is the solver's own estimate, not another pass of the network
    at a noisy timestep."""
    add_lora(unet, STUDENT)
    student = LoraStudent(rank=4, skip=skip, solver_steps=solver_steps)
    for seed in range(5):
        loss_of(unet, batch, student, seed=seed)
    noisy, conditional, unconditional, target = (torch.cat(asked[i::4]) for i in range(4))
    assert noisy.unique().numel() > solver_steps // 5
    assert torch.equal(noisy, conditional) and torch.equal(noisy, unconditional)
    assert set(noisy.tolist()) <= set(solver_timesteps(1000, solver_steps).tolist())
    back = (noisy - 1000 // solver_steps * skip).clamp(min=0)
    assert torch.equal(target, back)  # 0 stands for clean data, as above


def test_inverse_sigma_weighs_an_image_by_its_noise(unet, batch):
    add_lora(unet, STUDENT)
    half = NoiseSchedule(torch.full((1000,), 0.75), "v_prediction")  # sigma 0.5 at every timestep
    plain = loss_of(unet, batch, LoraStudent(rank=4, huber_c=0.05), half)
    weighted = loss_of(unet, batch, LoraStudent(rank=4, huber_c=0.1, inverse_sigma=True), half)
    assert torch.isclose(weighted, 2 * plain, rtol=1e-4)


def test_no_prompt_is_sdxls_zeroed_embedding_or_the_encoded_empty_one(batch):
    empty = batch.without_prompt()
    assert not empty.prompt_embeds.any() and not empty.pooled.any()
    assert torch.equal(empty.time_ids, batch.time_ids)
    plain = Batch(batch.latents, batch.prompt_embeds, empty=(torch.ones(5, 12),)).without_prompt()
    assert torch.equal(plain.prompt_embeds, torch.ones(4, 5, 12)) and plain.pooled is None
    both = replace(batch, empty=(torch.ones(5, 12), torch.full((8,), 2.0))).without_prompt()
    assert torch.equal(both.prompt_embeds, torch.ones(4, 5, 12))
    assert torch.equal(both.pooled, torch.full((4, 8), 2.0))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_network_of_convolutions_resumes_exactly(batch, unet, tmp_path, method):
    """In the memory order that training gives it, which the optimizer's moments share."""

    seen = []

    def run(folder, stop=None):
        seen.clear()
        torch.manual_seed(0)
        how = Schedule(20, lr=1e-3, warmup=5, checkpoint_every=10)
        plan = Plan(method, STUDENT if method == "lora" else FULL, how)
        student, average, loss_of = prepare(copy.deepcopy(unet).requires_grad_(False), plan, NOISE)
        minimised = loss_of(lambda step, share: batch, 5)

        def loss(step, share):
            if step == stop:
                raise KeyboardInterrupt
            seen.append(step)
            return minimised(step, share)

        with contextlib.suppress(KeyboardInterrupt):
            optimise("test", student, loss, how, tmp_path / folder, average)
        return load_file(sorted((tmp_path / folder).iterdir())[-1])

    whole = run("whole")
    assert len(run("broken", stop=12)) == len(whole)
    resumed = run("broken")
    assert seen == list(range(10, 20))
    assert any(value.ndim == 4 and value.shape[2:] == (3, 3) for value in whole.values())
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_a_fresh_full_student_is_its_teacher_whatever_w_is_and_teaches_no_other(unet, batch):
    student = make_full_student(unet, FULL)
    expected = predict(unet, batch.latents, T, batch)
    for w in (torch.zeros(4), torch.full((4,), 9.0)):
        assert torch.equal(predict(student, batch.latents, T, batch, w), expected)
    with pytest.raises(ValueError, match="a full LCM already"):
        make_full_student(student, FULL)


def test_a_full_student_learns_w_from_its_average_and_its_teacher_stays(
    unet, batch, tmp_path, same_draws, monkeypatch
):
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    losses, weights = [], []
    loss = distill.consistency_loss

    def watched(roles, *rest):
        networks = (roles.student.args[0], roles.target.args[0])
        weights.append([next(one.parameters()).detach().clone() for one in networks])
        losses.append(loss(roles, *rest))
        return losses[-1]

    monkeypatch.setattr(distill, "consistency_loss", watched)
    schedule = Schedule(40, lr=3e-3, warmup=5, ema_decay=0.5)

    def distilled():
        student, target, loss_of = prepare(unet.requires_grad_(False), Plan("full", FULL, schedule), NOISE)
        minimised = loss_of(lambda step, share: batch, 7)
        optimise("LCM", student, minimised, schedule, tmp_path, target)
        return target

    lcm = distilled()
    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    little, much = (predict(lcm, batch.latents, T, batch, torch.full((4,), w)) for w in (2.0, 4.0))
    assert not torch.allclose(little, much, atol=1e-3)
    expected = weights[0][1]
    for step, (own, average) in enumerate(weights):
        expected = expected.lerp(own, 1 - min(0.5, step / (step + 9))) if step else expected
        torch.testing.assert_close(average, expected)
    assert not torch.equal(*weights[-1])
    again = distilled()  # from the checkpoint
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in lcm.state_dict().items())
