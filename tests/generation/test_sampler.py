"""The few-step loop against diffusers: its scheduler, step by step, and its pipelines."""

import numpy as np
import pytest
import torch
from diffusers import LatentConsistencyModelPipeline, LCMScheduler
from tiny import as_downloaded, make_folder

from fewstep.generation.load import load_pipeline
from fewstep.generation.sampler import plan
from fewstep.models.save import save_model
from fewstep.models.specs import get_model
from fewstep.settings import Settings

pytestmark = pytest.mark.numeric

SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULES = {
    "epsilon": SDXL | {"prediction_type": "epsilon"},
    "v": SDXL | {"prediction_type": "v_prediction"},
    # With the usual scaling of 10, c_skip is below what fp32 tells apart.
    "epsilon, scaled": SDXL | {"prediction_type": "epsilon", "timestep_scaling": 0.01},
    "v, scaled": SDXL | {"prediction_type": "v_prediction", "timestep_scaling": 0.01},
    "zero-snr": SDXL | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("count", "strength"), [(1, 1.0), (2, 1.0), (4, 1.0), (8, 1.0), (1, 0.02), (3, 0.5)])
def test_a_planned_step_is_that_of_the_scheduler(schedule, count, strength):
    theirs = LCMScheduler(**SCHEDULES[schedule])
    theirs.set_timesteps(count, strength=strength)
    steps = plan(LCMScheduler(**SCHEDULES[schedule]), count, strength)
    assert [step.t for step in steps] == theirs.timesteps.tolist()
    generator = torch.Generator().manual_seed(0)
    image, noise, x = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(3))
    started = steps[0].alpha * image + steps[0].sigma * noise
    assert torch.allclose(started, theirs.add_noise(image, noise, theirs.timesteps[:1]), atol=1e-5)
    for step, t in zip(steps, theirs.timesteps, strict=True):
        output = torch.randn(x.shape, generator=generator)
        fresh = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
        expected, _ = theirs.step(output, t, x, generator=torch.Generator().manual_seed(5), return_dict=False)
        found = step.advance(x, output, fresh)
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())
        x = expected
    assert (steps[-1].next_alpha, steps[-1].next_sigma) == (1, 0)


@pytest.mark.parametrize("guidance", [1.0, 8.0])
def test_a_full_lcm_generates_what_diffusers_pipeline_for_it_generates(tmp_path, guidance):
    """SimianLuo's model, at toy size: guidance is embedded, as w in the LCM paper's section 4.2."""
    spec = get_model("lcm-dreamshaper-v7")
    save_model(spec, as_downloaded(spec, make_folder(spec, tmp_path / "source")), tmp_path)
    pipeline = load_pipeline(
        spec, Settings(model=spec.name, weights_root=tmp_path, dtype="fp32", safety="off")
    )
    diffusion = pipeline.diffusion
    theirs = LatentConsistencyModelPipeline(
        **{**diffusion.components, "scheduler": LCMScheduler.from_config(diffusion.scheduler.config)},
        requires_safety_checker=False,
    )
    theirs.set_progress_bar_config(disable=True)
    size = {"width": 64, "height": 64}
    expected = theirs(
        "a red house",
        num_inference_steps=4,
        original_inference_steps=50,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(3),
        **size,
    ).images[0]
    [found] = pipeline.images(["a red house"], [3], guidance=guidance, aspect_ratio="custom", **size)
    assert np.abs(np.subtract(found, expected, dtype=int)).max() <= 1
