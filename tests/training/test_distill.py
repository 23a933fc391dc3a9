"""Distillation on a real, small SDXL UNet: the loss's parts, what is trained, and that it learns."""

import contextlib
import copy
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from fewstep.training import distill
from fewstep.training.consistency import NoiseSchedule, solver_timesteps
from fewstep.training.distill import (
    Batch,
    FullStudent,
    LoraStudent,
    Roles,
    add_lora,
    consistency_loss,
    consistency_training,
    full_roles,
    lora_roles,
    make_full_student,
    order_for_training,
    predict,
)
from fewstep.training.trainer import Schedule, StepRandom, optimise

pytestmark = pytest.mark.numeric


@pytest.fixture
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        cross_attention_dim=12,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=8 + 24,
    )


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


def loss_of(
    unet: UNet2DConditionModel,
    batch: Batch,
    student: LoraStudent = STUDENT,
    noise: NoiseSchedule = NOISE,
    seed: int = 0,
) -> torch.Tensor:
    return consistency_loss(lora_roles(unet), batch, noise, student, StepRandom(seed, 0))


def test_a_fresh_lora_changes_nothing_and_only_it_is_trained(unet, batch):
    t = torch.tensor([19, 259, 499, 999])
    before = predict(unet, batch.latents, t, batch)
    add_lora(unet, STUDENT)
    assert torch.equal(predict(unet, batch.latents, t, batch), before)

    loss_of(unet, batch).backward()

    trained = [name for name, parameter in unet.named_parameters() if parameter.grad is not None]
    assert trained and all("lora_" in name for name in trained)
    convolutions = [name for name in trained if "conv1" in name or "samplers" in name]
    assert convolutions, "the published LCM-LoRAs change convolutions too"


def test_a_network_runs_in_the_callers_autocast_or_else_in_what_is_fast_here(unet, batch, monkeypatch):
    t, seen = torch.full((4,), 499), []
    unet.conv_in.register_forward_hook(lambda module, given, output: seen.append(output.dtype))
    for multiplies in (False, True):
        monkeypatch.setattr(
            "fewstep.models.device._multiplies_bf16", lambda multiplies=multiplies: multiplies
        )
        assert predict(unet, batch.latents, t, batch).dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.float16):
            predict(unet, batch.latents, t, batch)
    assert seen == [torch.float32, torch.float16, torch.bfloat16, torch.float16]


def test_the_student_learns_and_the_teacher_stays_as_it_is(unet, batch, tmp_path, monkeypatch):
    # The same draw at every step: on a network of random weights only that shows learning within seconds.
    monkeypatch.setattr(distill, "StepRandom", lambda seed, step, share: StepRandom(0, 0, share))
    add_lora(unet, STUDENT)
    t = torch.tensor([19, 259, 499, 999])
    unet.disable_adapters()
    teacher = predict(unet, batch.latents, t, batch)
    unet.enable_adapters()
    before = loss_of(unet, batch).item()

    schedule = Schedule(25, lr=1e-2, warmup=5, ema_decay=0.5)
    loss = consistency_training(lora_roles(unet), lambda step, share: batch, NOISE, STUDENT, seed=5)
    optimise("LCM-LoRA", unet, loss, schedule, tmp_path)

    after = loss_of(unet, batch).item()
    unet.disable_adapters()
    assert torch.equal(predict(unet, batch.latents, t, batch), teacher)
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


def test_the_first_solver_step_ends_at_clean_data(unet, batch, monkeypatch):
    """At n = 0 the target is the solver's own estimate, not another pass of the network at a noisy
    timestep."""
    add_lora(unet, STUDENT)
    seen: list[torch.Tensor] = []
    forward = unet.forward
    monkeypatch.setattr(unet, "forward", lambda z, t, *a, **k: (seen.append(t), forward(z, t, *a, **k))[1])
    loss_of(unet, batch, LoraStudent(rank=4, solver_steps=1))
    student, conditional, unconditional, target = seen
    assert student.tolist() == conditional.tolist() == unconditional.tolist() == [999] * 4
    assert target.tolist() == [0] * 4
    assert solver_timesteps(1000, 1).tolist() == [999]


@pytest.mark.parametrize("skip", [1, 5, 50])
def test_one_consistency_step_goes_back_over_skip_solver_steps(unet, batch, monkeypatch, skip):
    add_lora(unet, STUDENT)
    seen: list[torch.Tensor] = []
    forward = unet.forward
    monkeypatch.setattr(unet, "forward", lambda z, t, *a, **k: (seen.append(t), forward(z, t, *a, **k))[1])
    for seed in range(5):
        loss_of(unet, batch, LoraStudent(rank=4, skip=skip), seed=seed)
    noisy, target = torch.cat(seen[::4]), torch.cat(seen[3::4])
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


def test_without_a_huber_constant_errors_are_squared(batch):
    a, b = batch.latents, batch.latents.flip(0)
    assert torch.equal(LoraStudent(huber_c=None).distance(a, b), torch.nn.functional.mse_loss(a, b))


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
        student = copy.deepcopy(unet)
        if method == "lora":
            torch.manual_seed(0)
            add_lora(student, STUDENT)
            order_for_training(student)
            roles, average = lora_roles(student), None
        else:
            teacher, student = student, make_full_student(student, FULL)
            average = copy.deepcopy(student).requires_grad_(False)
            roles = full_roles(student, average, teacher)
            for network in (student, average):
                order_for_training(network)
        minimised = consistency_training(roles, lambda step, share: batch, NOISE, STUDENT, seed=5)

        def loss(step, share):
            if step == stop:
                raise KeyboardInterrupt
            seen.append(step)
            return minimised(step, share)

        how = Schedule(20, lr=1e-3, warmup=5, checkpoint_every=10)
        with contextlib.suppress(KeyboardInterrupt):
            optimise("test", student, loss, how, tmp_path / folder, average)
        return load_file(sorted((tmp_path / folder).iterdir())[-1])

    whole = run("whole")
    assert len(run("broken", stop=12)) == len(whole)
    resumed = run("broken")
    assert seen == list(range(10, 20))
    assert any(value.ndim == 4 and value.shape[2:] == (3, 3) for value in whole.values())
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


FULL = FullStudent(guidance=(2.0, 4.0), width=8)
T = torch.tensor([19, 259, 499, 999])


def test_a_fresh_full_student_is_its_teacher_whatever_w_is(unet, batch):
    student = make_full_student(unet, FULL)
    expected = predict(unet, batch.latents, T, batch)
    for w in (torch.zeros(4), torch.full((4,), 9.0)):
        assert torch.equal(predict(student, batch.latents, T, batch, w), expected)


def test_a_teacher_that_is_told_w_itself_is_refused(unet):
    with pytest.raises(ValueError, match="a full LCM already"):
        make_full_student(make_full_student(unet, FULL), FULL)


def distil_full(unet, batch, schedule, folder):
    student = make_full_student(unet, FULL)
    target = copy.deepcopy(student).requires_grad_(False)
    roles = full_roles(student, target, unet)
    loss = consistency_training(roles, lambda step, share: batch, NOISE, FULL, seed=7)
    optimise("LCM", student, loss, schedule, folder, target)
    return target


def test_a_full_student_learns_what_w_means_and_its_teacher_stays(unet, batch, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "StepRandom", lambda seed, step, share: StepRandom(0, 0, share))
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
    schedule = Schedule(4, lr=1e-2, warmup=1, ema_decay=0.5)
    distil_full(unet, batch, schedule, tmp_path)
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


def test_fine_tuning_trains_the_lora_alone_and_lowers_its_loss(unet, batch, tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "StepRandom", lambda seed, step, share: StepRandom(0, 0, share))
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    add_lora(unet, STUDENT)
    roles = lora_roles(unet, teacher=False)
    first = consistency_loss(roles, batch, NOISE, STUDENT, StepRandom(0, 0)).item()
    loss = consistency_training(roles, lambda step, share: batch, NOISE, STUDENT, seed=11)
    optimise("fine-tuning", unet, loss, Schedule(25, lr=1e-2, warmup=5, ema_decay=0.5), tmp_path)
    assert consistency_loss(roles, batch, NOISE, STUDENT, StepRandom(0, 0)).item() < 0.7 * first
    unet.unload_lora()
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
