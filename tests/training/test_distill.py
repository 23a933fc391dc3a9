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


def test_a_network_runs_in_the_callers_autocast_or_else_in_what_is_fast_here(unet, batch, monkeypatch):
    t, seen = torch.full((4,), 499), []
    unet.conv_in.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    for multiplies in (False, True):
        monkeypatch.setattr(device, "_multiplies_bf16", lambda multiplies=multiplies: multiplies)
        assert predict(unet, batch.latents, t, batch).dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.float16):
            predict(unet, batch.latents, t, batch)
    assert seen == [torch.float32, torch.float16, torch.bfloat16, torch.float16]


def test_the_student_learns_and_the_teacher_stays_as_it_is(unet, batch, tmp_path, same_draws):
    teacher = predict(unet, batch.latents, T, batch)
    add_lora(unet, STUDENT)
    before = loss_of(unet, batch).item()

    schedule = Schedule(25, lr=1e-2, warmup=5, ema_decay=0.5)
    loss = consistency_training(lora_roles(unet), lambda step, share: batch, NOISE, STUDENT, seed=5)
    optimise("LCM-LoRA", unet, loss, schedule, tmp_path)

    after = loss_of(unet, batch).item()
    unet.disable_adapters()
    assert torch.equal(predict(unet, batch.latents, T, batch), teacher)
    assert after < 0.7 * before


def test_only_the_students_answer_is_differentiated(batch):
    asked: list[tuple[str, bool]] = []

    def answers(who):
        return lambda z, t, batch, w: (asked.append((who, torch.is_grad_enabled())), torch.zeros_like(z))[1]

    roles = Roles(*map(answers, ("student", "target", "teacher")))
    consistency_loss(roles, batch, NOISE, STUDENT, StepRandom(0, 0))
    assert asked == [("student", True), ("teacher", False), ("teacher", False), ("target", False)]


def test_the_target_is_given_the_teachers_guided_ddim_step(batch):
    """Steps 4 and 5 of Algorithm 1 by hand, for a teacher that predicts x_0."""
    conditional, unconditional = torch.full_like(batch.latents, 2.0), torch.full_like(batch.latents, -1.0)
    seen = []

    def teacher(z, t, shown, w):
        seen.append((z, t, w))
        return conditional if shown.prompt_embeds.any() else unconditional

    def target(z, t, shown, w):
        seen.append((z, t, w))
        return torch.zeros_like(z)

    noise = NoiseSchedule(NOISE.alphas_cumprod, "sample")
    student = LoraStudent(guidance=(2.0, 4.0), skip=5)
    for seed in range(6):  # some go back to clean data
        seen.clear()
        roles = Roles(lambda z, t, shown, w: torch.zeros_like(z), target, teacher)
        consistency_loss(roles, batch, noise, student, StepRandom(seed, 0))
        (z_next, t_next, w), _, (z, t, _) = seen
        assert 2.0 <= w.min() and w.max() <= 4.0
        x_0 = conditional + w.reshape(-1, 1, 1, 1) * (conditional - unconditional)
        alpha, sigma = noise.signal_and_noise(t_next, z_next)
        eps = (z_next - alpha * x_0) / sigma
        alpha, sigma = noise.signal_and_noise(torch.where(t_next >= 100, t_next - 100, -1), z_next)
        torch.testing.assert_close(z, alpha * x_0 + sigma * eps, rtol=1e-4, atol=1e-4)


def test_after_the_loss_the_adapters_are_on_again(unet, batch):
    add_lora(unet, STUDENT)
    loss_of(unet, batch)
    t = torch.full((4,), 499)
    before = predict(unet, batch.latents, t, batch)
    with torch.no_grad():
        next(parameter for name, parameter in unet.named_parameters() if "lora_B" in name).add_(0.1)
    assert not torch.equal(predict(unet, batch.latents, t, batch), before)


def test_the_first_solver_step_ends_at_clean_data(unet, batch, asked):
    """At n = 0 the target is the solver's own estimate, not another pass of the network at a noisy
    timestep."""
    add_lora(unet, STUDENT)
    loss_of(unet, batch, LoraStudent(rank=4, solver_steps=1))
    student, conditional, unconditional, target = asked
    assert student.tolist() == conditional.tolist() == unconditional.tolist() == [999] * 4
    assert target.tolist() == [0] * 4
    assert solver_timesteps(1000, 1).tolist() == [999]


@pytest.mark.parametrize("skip", [1, 5, 50])
def test_one_consistency_step_goes_back_over_skip_solver_steps(unet, batch, asked, skip):
    add_lora(unet, STUDENT)
    for seed in range(5):
        loss_of(unet, batch, LoraStudent(rank=4, skip=skip), seed=seed)
    noisy, target = torch.cat(asked[::4]), torch.cat(asked[3::4])
    assert noisy.unique().numel() > 10
    assert torch.equal(target, (noisy - 20 * skip).clamp(min=0))  # 0 stands for clean data, as above


def test_inverse_sigma_weighs_an_image_by_its_noise(unet, batch):
    add_lora(unet, STUDENT)
    half = NoiseSchedule(torch.full((1000,), 0.75), "v_prediction")  # sigma 0.5 at every timestep
    plain = loss_of(unet, batch, LoraStudent(rank=4, huber_c=0.05), half)
    weighted = loss_of(unet, batch, LoraStudent(rank=4, huber_c=0.1, inverse_sigma=True), half)
    assert torch.isclose(weighted, 2 * plain, rtol=1e-4)


def test_no_prompt_is_sdxls_zeroed_embedding(batch):
    empty = batch.without_prompt()
    assert not empty.prompt_embeds.any() and not empty.pooled.any()
    assert torch.equal(empty.time_ids, batch.time_ids)


def test_no_prompt_is_the_encoded_empty_one_where_there_is_one(batch):
    plain = Batch(batch.latents, batch.prompt_embeds, empty=(torch.ones(5, 12),))
    assert torch.equal(plain.without_prompt().prompt_embeds, torch.ones(4, 5, 12))
    assert plain.without_prompt().pooled is None
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


def test_a_fresh_full_student_is_its_teacher_whatever_w_is(unet, batch):
    student = make_full_student(unet, FULL)
    expected = predict(unet, batch.latents, T, batch)
    for w in (torch.zeros(4), torch.full((4,), 9.0)):
        assert torch.equal(predict(student, batch.latents, T, batch, w), expected)


def test_a_teacher_that_is_told_w_itself_is_refused(unet):
    with pytest.raises(ValueError, match="a full LCM already"):
        make_full_student(make_full_student(unet, FULL), FULL)


def distil_full(unet, batch, schedule, folder):
    student, target, loss_of = prepare(unet.requires_grad_(False), Plan("full", FULL, schedule), NOISE)
    loss = loss_of(lambda step, share: batch, 7)
    optimise("LCM", student, loss, schedule, folder, target)
    return target


def test_a_full_student_learns_w_and_its_teacher_stays(unet, batch, tmp_path, same_draws, monkeypatch):
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    losses: list[float] = []
    loss = distill.consistency_loss
    monkeypatch.setattr(
        distill, "consistency_loss", lambda *a: (found := loss(*a), losses.append(found.item()))[0]
    )
    schedule = Schedule(40, lr=3e-3, warmup=5, ema_decay=0.5)
    lcm = distil_full(unet, batch, schedule, tmp_path)

    assert losses[-1] < 0.7 * losses[0]
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    little, much = (predict(lcm, batch.latents, T, batch, torch.full((4,), w)) for w in (2.0, 4.0))
    assert not torch.allclose(little, much, atol=1e-3)
    again = distil_full(unet, batch, schedule, tmp_path)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in lcm.state_dict().items())


def test_a_full_students_target_is_its_average_and_not_itself(unet, batch, tmp_path, monkeypatch):
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    loss = distill.consistency_loss

    def watched(roles, *rest):
        weights = [roles.student.args[0], roles.target.args[0]]
        seen.append(tuple(next(one.parameters()).detach().clone() for one in weights))
        return loss(roles, *rest)

    monkeypatch.setattr(distill, "consistency_loss", watched)
    distil_full(unet, batch, Schedule(4, lr=1e-2, warmup=1, ema_decay=0.5), tmp_path)
    target = seen[0][1]
    for step, (own, average) in enumerate(seen):
        if step:
            decay = min(0.5, step / (step + 9))
            target = target.lerp(own, 1 - decay)
        torch.testing.assert_close(average, target)
    assert not torch.equal(*seen[-1])


def test_without_a_teacher_the_target_is_given_the_same_image_with_the_same_noise(batch):
    seen = []

    def answer(z, t, batch, w):
        seen.append((z, t))
        return torch.zeros_like(z)

    consistency_loss(Roles(answer, answer), batch, NOISE, LoraStudent(skip=5), StepRandom(3, 0))

    (noisy, t_next), (less, t) = seen
    alpha, sigma = NOISE.signal_and_noise(t_next, noisy)
    noise = (noisy - alpha * batch.latents) / sigma
    alpha, sigma = NOISE.signal_and_noise(t, noisy)
    later = t > 0  # 0 stands for clean data
    assert later.any() and torch.equal(t, (t_next - 100).clamp(min=0))
    torch.testing.assert_close(less[later], (alpha * batch.latents + sigma * noise)[later])


def test_fine_tuning_trains_the_lora_alone_and_lowers_its_loss(unet, batch, tmp_path, same_draws):
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    add_lora(unet, STUDENT)
    roles = lora_roles(unet, teacher=False)
    first = consistency_loss(roles, batch, NOISE, STUDENT, StepRandom(0, 0)).item()
    loss = consistency_training(roles, lambda step, share: batch, NOISE, STUDENT, seed=11)
    optimise("fine-tuning", unet, loss, Schedule(25, lr=1e-2, warmup=5, ema_decay=0.5), tmp_path)
    assert consistency_loss(roles, batch, NOISE, STUDENT, StepRandom(0, 0)).item() < 0.7 * first
    unet.unload_lora()
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
