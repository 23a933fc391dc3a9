"""The consistency maths against its definitions and against diffusers' own LCM and DDIM schedulers."""

import pytest
import torch
from diffusers import DDIMScheduler, LatentConsistencyModelPipeline, LCMScheduler

from fewstep.training import consistency as cm

pytestmark = pytest.mark.numeric

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def schedule(prediction_type: str) -> cm.NoiseSchedule:
    scheduler = LCMScheduler(**BETAS, prediction_type=prediction_type)
    return cm.NoiseSchedule.of(scheduler, torch.device("cpu"))


def test_boundary_scalings_are_the_schedulers_and_leave_clean_data_as_it_is():
    assert cm.boundary_scalings(torch.tensor([0.0])) == (1.0, 0.0)
    scheduler = LCMScheduler(**BETAS)
    for t in (19, 259, 999):
        expected = scheduler.get_scalings_for_boundary_condition_discrete(torch.tensor(float(t)))
        scalings = cm.boundary_scalings(torch.tensor(float(t)))
        assert torch.allclose(torch.stack(scalings), torch.stack(expected))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_every_parameterization_gives_back_what_was_mixed(prediction_type):
    x_0, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, of_network = torch.tensor([19, 499, 999]), schedule(prediction_type)
    alpha, sigma = of_network.signal_and_noise(t, x_0)
    z_t = alpha * x_0 + sigma * noise
    assert torch.equal(of_network.mix(x_0, noise, t), z_t)
    truth = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x_0, "sample": x_0}[prediction_type]
    assert all(map(torch.allclose, of_network.estimates(truth, z_t, t), (x_0, noise)))


@pytest.mark.parametrize("width", [8, 256])
def test_w_is_embedded_as_diffusers_pipelines_do(width):
    w = torch.tensor([0.0, 0.5, 6.5, 13.0])
    embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    embedded = cm.guidance_embedding(w, width)
    torch.testing.assert_close(embedded, embed(None, w, width), rtol=0, atol=2e-3)  # of angles up to 13,000


def test_unknown_parameterization_is_refused():
    with pytest.raises(ValueError, match="must be epsilon, v_prediction or sample"):
        cm.NoiseSchedule(torch.ones(1), "flow").estimates(*torch.ones(2, 1), torch.tensor([0]))


def test_guided_estimate_is_classifier_free_guidance_at_one_plus_each_images_own_w():
    conditional, unconditional = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    guided = cm.guided_estimate(conditional, unconditional, torch.tensor([2.0, 0.0, 0.5]))
    for i, scale in enumerate((3.0, 1.0, 1.5)):
        expected = unconditional[i] + scale * (conditional[i] - unconditional[i])
        assert torch.allclose(guided[i], expected, atol=1e-6)
    assert torch.equal(guided[1], conditional[1])


def test_solver_timesteps_are_those_that_the_lcm_scheduler_samples_from():
    scheduler = LCMScheduler(**BETAS, original_inference_steps=50)
    timesteps = cm.solver_timesteps(1000, 50)
    for steps in (1, 2, 4, 8):
        scheduler.set_timesteps(steps)
        assert set(scheduler.timesteps.tolist()) <= set(timesteps.tolist())
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.flip(0).tolist() == timesteps.tolist()


def test_ddim_step_is_the_ddim_schedulers():
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, prediction_type="v_prediction")
    scheduler.set_timesteps(50)
    z, v = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    t = scheduler.timesteps[10]
    expected = scheduler.step(v, t, z).prev_sample
    of_network = schedule("v_prediction")
    back = of_network.mix(*of_network.estimates(v, z, t[None]), t[None] - 20)
    assert torch.allclose(back, expected, atol=1e-5)


def test_before_the_first_timestep_lies_clean_data():
    alpha, sigma = schedule("epsilon").signal_and_noise(torch.tensor([-1, 0]), torch.zeros(2))
    assert (alpha[0], sigma[0]) == (1.0, 0.0)
    assert alpha[1] < 1.0 and sigma[1] > 0.0


def test_pseudo_huber_is_quadratic_near_zero_and_linear_far_away():
    zero, c = torch.zeros(1), 1e-3
    assert cm.pseudo_huber(zero, zero, c) == 0.0
    near, far = torch.tensor([1e-5]).double(), torch.tensor([10.0])
    assert torch.isclose(cm.pseudo_huber(near, zero.double(), c), near**2 / (2 * c), rtol=1e-3)
    assert torch.isclose(cm.pseudo_huber(far, zero, c), far - c, rtol=1e-5)
