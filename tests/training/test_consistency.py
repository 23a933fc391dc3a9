"""The consistency maths against its definitions and against diffusers' own LCM and DDIM schedulers."""

import pytest
import torch
from diffusers import DDIMScheduler, LatentConsistencyModelPipeline, LCMScheduler

from fewstep.training import consistency as cm

pytestmark = pytest.mark.numeric

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def coefficients(t: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    alphas_cumprod = LCMScheduler(**BETAS).alphas_cumprod
    alpha, sigma = cm.NoiseSchedule(alphas_cumprod, "epsilon").signal_and_noise(t, t.float())
    return cm.spread(alpha, like), cm.spread(sigma, like)


def test_boundary_condition_leaves_clean_data_as_it_is():
    assert cm.boundary_scalings(torch.tensor([0.0])) == (1.0, 0.0)


def test_boundary_scalings_are_the_schedulers():
    scheduler = LCMScheduler(**BETAS)
    for t in (19, 259, 999):
        expected = scheduler.get_scalings_for_boundary_condition_discrete(torch.tensor(float(t)))
        scalings = cm.boundary_scalings(torch.tensor(float(t)))
        assert torch.allclose(torch.stack(scalings), torch.stack(expected))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_every_parameterization_gives_back_what_was_mixed(prediction_type):
    x_0, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alpha, sigma = coefficients(torch.tensor([19, 499, 999]), x_0)
    z_t = alpha * x_0 + sigma * noise
    truth = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x_0, "sample": x_0}[prediction_type]

    assert torch.allclose(cm.predicted_original(truth, z_t, alpha, sigma, prediction_type), x_0)
    assert torch.allclose(cm.predicted_noise(truth, z_t, alpha, sigma, prediction_type), noise)


@pytest.mark.parametrize("width", [8, 256])
def test_w_is_embedded_as_diffusers_pipelines_do(width):
    w = torch.tensor([0.0, 0.5, 6.5, 13.0])
    embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    embedded = cm.guidance_embedding(w, width)
    torch.testing.assert_close(embedded, embed(None, w, width), rtol=0, atol=2e-3)  # of angles up to 13,000


@pytest.mark.parametrize("predicted", [cm.predicted_original, cm.predicted_noise])
def test_unknown_parameterization_is_refused(predicted):
    with pytest.raises(ValueError, match="must be epsilon, v_prediction or sample"):
        predicted(*[torch.ones(1)] * 4, "flow")


def test_guided_estimate_is_classifier_free_guidance_at_one_plus_w():
    conditional, unconditional = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    guided = cm.guided_estimate(conditional, unconditional, torch.full((3,), 2.0))
    assert torch.allclose(guided, unconditional + 3.0 * (conditional - unconditional), atol=1e-6)
    assert torch.equal(cm.guided_estimate(conditional, unconditional, torch.zeros(3)), conditional)


def test_each_image_has_its_own_w():
    conditional, unconditional = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    both = cm.guided_estimate(conditional, unconditional, torch.tensor([0.5, 3.0]))
    alone = cm.guided_estimate(conditional[1:], unconditional[1:], torch.tensor([3.0]))
    assert torch.equal(both[1:], alone)


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
    alpha, sigma = coefficients(t[None], z)
    alpha_prev, sigma_prev = coefficients(t[None] - 20, z)
    x_0 = cm.predicted_original(v, z, alpha, sigma, "v_prediction")
    noise = cm.predicted_noise(v, z, alpha, sigma, "v_prediction")
    assert torch.allclose(cm.ddim_step(x_0, noise, alpha_prev, sigma_prev), expected, atol=1e-5)


def test_before_the_first_timestep_lies_clean_data():
    schedule = cm.NoiseSchedule.of(LCMScheduler(**BETAS), torch.device("cpu"))
    alpha, sigma = schedule.signal_and_noise(torch.tensor([-1, 0]), torch.zeros(2))
    assert (alpha[0], sigma[0]) == (1.0, 0.0)
    assert alpha[1] < 1.0 and sigma[1] > 0.0


def test_pseudo_huber_is_quadratic_near_zero_and_linear_far_away():
    zero, c = torch.zeros(1), 1e-3
    assert cm.pseudo_huber(zero, zero, c) == 0.0
    near, far = torch.tensor([1e-5]).double(), torch.tensor([10.0])
    assert torch.isclose(cm.pseudo_huber(near, zero.double(), c), near**2 / (2 * c), rtol=1e-3)
    assert torch.isclose(cm.pseudo_huber(far, zero, c), far - c, rtol=1e-5)
