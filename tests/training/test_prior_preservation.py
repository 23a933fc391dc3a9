"""What a model rehearses while it learns, on real, small networks."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from tiny import make_diffusers_folder, make_unet

from fewstep.cli.train import prior_prompts
from fewstep.models.specs import get_model
from fewstep.settings import Settings
from fewstep.training import distill, prior_preservation
from fewstep.training.consistency import NoiseSchedule
from fewstep.training.distill import (
    Batch,
    FullStudent,
    LoraStudent,
    add_lora,
    consistency_training,
    lora_roles,
    make_full_student,
    predict,
    predict_without_lora,
)
from fewstep.training.networks import load_base
from fewstep.training.prior_preservation import generate_prior_images, in_turns, prior_loss, varied_prompts
from fewstep.training.trainer import WHOLE, Loss, Schedule, Shard, StepRandom, optimise

NOISE = NoiseSchedule(torch.linspace(0.9995, 0.005, 1000), "v_prediction")
STUDENT = LoraStudent(rank=4, guidance=(0.0, 0.0), skip=5)


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return make_unet()


def batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(4, 4, 8, 8, generator=generator)
    return Batch(latents, torch.randn(4, 5, 12, generator=generator))


LEARNT, KNOWN = batch(1), batch(2)


def keeping(unet: UNet2DConditionModel, shown: Batch = KNOWN, guidance=(0.0, 0.0)):
    return prior_loss(unet, lambda step, share: shown, NOISE, guidance, seed=3)


@torch.no_grad()
def change_lora(unet: UNet2DConditionModel) -> None:
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.1)


@pytest.mark.numeric
def test_what_is_kept_is_the_answer_without_the_lora_which_is_differentiated_alone(unet):
    shown = (KNOWN.latents, torch.full((4,), 500), KNOWN)
    expected = predict(unet, *shown)
    add_lora(unet, STUDENT)
    assert keeping(unet)(0, WHOLE).item() == 0.0, "a fresh one keeps everything"
    change_lora(unet)
    assert torch.equal(predict_without_lora(unet, *shown), expected)
    assert not torch.equal(predict(unet, *shown), expected)
    loss = keeping(unet)(0, WHOLE)
    loss.backward()
    assert loss.item() > 0
    touched = [name for name, one in unet.named_parameters() if one.grad is not None and one.grad.any()]
    assert touched and all("lora_" in name for name in touched)


def test_a_full_lcm_keeps_what_it_says_at_every_w(unet, monkeypatch):
    lcm = make_full_student(unet, FullStudent(width=8))
    add_lora(lcm, STUDENT)
    heard = []

    def listening(own):
        return lambda *arguments: (heard.append(arguments[-1]), own(*arguments))[1]

    for name in ("predict", "predict_without_lora"):
        monkeypatch.setattr(prior_preservation, name, listening(getattr(prior_preservation, name)))
    keeping(lcm, guidance=(9.0, 9.5))(0, WHOLE)
    frozen, trained = heard
    assert torch.equal(frozen, trained) and frozen.unique().numel() == 4
    assert 9.0 <= frozen.min() and frozen.max() <= 9.5


@pytest.mark.numeric
def test_shares_of_a_step_add_up_to_the_whole(unet):
    add_lora(unet, STUDENT)
    with torch.no_grad():
        next(one for name, one in unet.named_parameters() if "lora_B" in name).normal_()

    def part(step: int, share: Shard) -> Batch:
        return Batch(share.of(KNOWN.latents), share.of(KNOWN.prompt_embeds))

    loss = prior_loss(unet, part, NOISE, (0.0, 0.0), seed=3)
    parts = [loss(5, Shard(i, 2)).item() for i in range(2)]
    assert sum(parts) / 2 == pytest.approx(loss(5, WHOLE).item(), rel=0.02)  # bf16
    assert parts[0] != parts[1]


def test_steps_take_turns():
    def telling(name):
        return lambda step, share: (name, step, share)

    both = in_turns(telling("learnt"), telling("kept"))
    steps = [("learnt", 0), ("kept", 0), ("learnt", 1), ("kept", 1)]
    assert [both(step, WHOLE)[:2] for step in range(4)] == steps
    assert both(3, Shard(1, 2))[2] == Shard(1, 2)


@pytest.mark.numeric
def test_with_rehearsal_a_network_drifts_less_and_learns_all_the_same(unet, tmp_path, monkeypatch):
    # The same draws at every step: on random weights only that shows learning within seconds.
    for module in (prior_preservation, distill):
        monkeypatch.setattr(module, "StepRandom", lambda seed, step, share: StepRandom(0, 0, share))

    def fresh() -> tuple[UNet2DConditionModel, Loss]:
        torch.manual_seed(1)
        network = UNet2DConditionModel.from_config(unet.config)
        network.load_state_dict(unet.state_dict())
        add_lora(network, STUDENT)
        roles = lora_roles(network, teacher=False)
        return network, consistency_training(roles, lambda step, share: LEARNT, NOISE, STUDENT, seed=5)

    def trained(rehearse: bool) -> tuple[float, float]:
        network, learnt = fresh()
        loss = in_turns(learnt, keeping(network)) if rehearse else learnt
        schedule = Schedule(60 if rehearse else 30, lr=1e-2, warmup=5, ema_decay=0.5)
        optimise("test", network, loss, schedule, tmp_path / str(rehearse))
        return learnt(0, WHOLE).item(), keeping(network)(0, WHOLE).item()

    (learnt, drift), (learnt_without, drift_without) = trained(True), trained(False)
    before = fresh()[1](0, WHOLE).item()
    assert learnt < 0.8 * before and learnt_without < 0.8 * before
    assert drift < 0.3 * drift_without


@pytest.mark.parametrize("model", ["miniature", "sdxl"])
@pytest.mark.parametrize("count", [1, 200, 3_000])
def test_prompts_are_many_and_always_the_same(model, count):
    prompts = prior_prompts(model)(count)
    assert prompts == prior_prompts(model)(count) and len(prompts) == count
    assert len(set(prompts)) > 0.9 * min(count, 2_000)
    assert (prior_prompts(model) is varied_prompts) == (model == "sdxl")
    if model == "miniature":
        assert not any("flamingo" in one or "pyramid" in one for one in prompts)


def test_images_to_rehearse_are_generated_once(tmp_path, monkeypatch):
    teacher = make_diffusers_folder(get_model("sd15"), tmp_path / "teacher")
    diffusion = load_base(str(teacher), Settings(), torch.device("cpu"))
    folder, prompts = tmp_path / "own", ["a tree", "a house"]
    generate_prior_images(folder, prompts, diffusion)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == prompts
    first, second = (Path(folder, row["file_name"]) for row in rows)
    assert first.read_bytes() != second.read_bytes()
    with Image.open(first) as image:
        assert image.size[0] == image.size[1]

    monkeypatch.setattr(prior_preservation, "generate_images", None)
    generate_prior_images(folder, prompts, diffusion)
    with pytest.raises(TypeError, match="not callable"):  # generated again
        generate_prior_images(folder, ["a tree", "a castle"], diffusion)
