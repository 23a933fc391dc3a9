"""From an image: how far it goes, what a mask keeps, and that it is what diffusers' own steps make."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler
from generating import MATES, wish
from generating import pixels_of as generate
from PIL import Image, ImageFilter
from small import drawn

from fewstep.generation import tensors
from fewstep.generation.pipeline import Pipeline
from fewstep.generation.tensors import encode_image, mask_of_latents
from fewstep.miniature.world.drawing import draw
from fewstep.miniature.world.scenes import say, unseen_scenes


@pytest.fixture
def pipeline(miniature) -> Pipeline:
    return miniature


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """An image of the world that the miniature did not generate."""
    return drawn()


STRENGTHS = (0.05, 0.3, 0.8, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, pytest.param(2, marks=pytest.mark.numeric), 4, 8])
def test_the_distance_from_an_image_grows_with_strength(pipeline, steps):
    scenes = unseen_scenes(12, seed=3)
    far = []
    for strength in STRENGTHS:
        distances = []
        for i, (shown, wished) in enumerate(zip(scenes[:6], scenes[6:], strict=True)):
            image = draw(shown, i, 128, 128)
            text = say(wished, random.Random(i), complete=True).text
            [found] = generate(pipeline, wish(text, i, image=image, prompt_strength=strength, steps=steps))
            distances.append(np.abs(found - np.asarray(image)).mean())
        far.append(np.mean(distances))
    assert far == sorted(far) and far[0] < 15 and far[-1] > 3 * far[0], far


@pytest.mark.numeric
def test_full_strength_forgets_the_image(pipeline, photo):
    """The miniature's schedule ends in pure noise, so that nothing of the image is left."""
    [one] = generate(pipeline, wish(image=photo, prompt_strength=1.0))
    other = photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT).point(lambda value: 255 - value)
    [two] = generate(pipeline, wish(image=other, prompt_strength=1.0))
    assert np.abs(one - two).mean() < 1


@pytest.mark.numeric
def test_under_a_mask_only_white_is_repainted(pipeline, photo):
    original, mask = np.asarray(photo).astype(int), Image.new("L", photo.size, 0)
    mask.paste(255, (64, 0, 128, 128))
    for strength in (0.5, 1.0):
        prompt = "a blue rocket in the desert at night"
        [found] = generate(pipeline, wish(prompt, image=photo, mask=mask, prompt_strength=strength))
        assert np.array_equal(found[:, :56], original[:, :56]), "all but a seam is the caller's own"
        assert np.abs(found[:, 64:] - original[:, 64:]).mean() > 15
    black = wish(image=photo, mask=Image.new("L", photo.size, 0), prompt_strength=1.0)
    [unchanged] = generate(pipeline, black)
    assert np.array_equal(unchanged, original)


@pytest.mark.numeric
def test_what_is_repainted_sees_what_is_kept(pipeline, photo, monkeypatch):
    """The latents under the mask's black are the image's own, to within what encoding loses."""
    mask, decoded = Image.new("L", photo.size, 0), []
    mask.paste(255, (64, 0, 128, 128))
    decode = tensors.decode_latents
    monkeypatch.setattr(tensors, "decode_latents", lambda *given: decoded.append(given[2]) or decode(*given))
    generate(pipeline, wish(image=photo, mask=mask, prompt_strength=1.0))
    [latents] = decoded
    generator = torch.Generator().manual_seed(7)
    expected = encode_image(pipeline.diffusion.vae, photo, generator)
    assert torch.equal(latents[..., :8], expected[..., :8])
    assert not torch.allclose(latents[..., 8:], expected[..., 8:], atol=0.1)


def test_a_thin_stroke_of_a_mask_counts():
    mask = Image.new("L", (64, 64), 0)
    mask.putpixel((20, 33), 255)
    mask.putpixel((60, 60), 127)
    latents = mask_of_latents(mask)
    assert latents.shape == (1, 1, 8, 8) and latents.sum() == 1 and latents[0, 0, 4, 2] == 1


@pytest.mark.parametrize("slot", [0, 2])
@pytest.mark.numeric
def test_images_of_a_batch_are_each_callers_own(pipeline, photo, slot):
    mates = [wish(MATES[i], 100 + i, image=photo.rotate(90 * (i + 1)), prompt_strength=0.6) for i in range(3)]
    request = wish(image=photo, prompt_strength=0.6)
    expected = generate(pipeline, request, *mates[1:])[0]
    mates[slot] = request
    assert np.array_equal(generate(pipeline, *mates)[slot], expected)
    [alone] = generate(pipeline, request)
    assert np.abs(alone - expected).max() <= 1


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("steps", "strength"), [(1, 0.3), (4, 0.5), (4, 0.8), (8, 1.0)])
@pytest.mark.numeric
def test_from_an_image_it_generates_what_diffusers_generates(pipeline, photo, steps, strength, masked):
    """For SDXL there is no pipeline of LCMs. Here is the loop of SD's LatentConsistencyModelImg2ImgPipeline,
    step by step, and of StableDiffusionXLInpaintPipeline with what a UNet of 4 channels does there."""
    mask = Image.new("L", photo.size, 0)
    mask.paste(255, (64, 0, 128, 128))
    request = wish(image=photo, prompt_strength=strength, steps=steps, mask=mask if masked else None)
    [found] = generate(pipeline, request)
    diffusion = pipeline.diffusion
    generator = torch.Generator().manual_seed(request.seed)
    scheduler = LCMScheduler.from_config(diffusion.scheduler.config)
    scheduler.set_timesteps(request.real_steps, original_inference_steps=50, strength=strength)
    with torch.inference_mode():
        pixels = diffusion.image_processor.preprocess(request.image)
        factor = diffusion.vae.config.scaling_factor
        shown = diffusion.vae.encode(pixels).latent_dist.sample(generator) * factor
        noise = torch.randn(shown.shape, generator=generator)
        latents = scheduler.add_noise(shown, noise, scheduler.timesteps[:1]) if strength < 1 else noise
        states, _, pooled, _ = diffusion.encode_prompt(request.prompt, do_classifier_free_guidance=False)
        size = torch.tensor([[128, 128, 0, 0, 128, 128]])
        for i, t in enumerate(scheduler.timesteps):
            condition = {"text_embeds": pooled, "time_ids": size}
            output = diffusion.unet(latents, t, states, added_cond_kwargs=condition).sample
            latents, _ = scheduler.step(output, t, latents, generator=generator, return_dict=False)
            if masked:
                after = scheduler.timesteps[i + 1 : i + 2]
                kept = scheduler.add_noise(shown, noise, after) if len(after) else shown
                latents[..., :8] = kept[..., :8]
        image = diffusion.vae.decode(latents / factor).sample
    [expected] = diffusion.image_processor.postprocess(image)
    seam = slice(72 if masked else 0, None)  # left of which a mask gives back the image's own pixels
    assert np.abs(found - np.asarray(expected).astype(int))[:, seam].max() <= 1


def test_what_is_kept_under_a_mask_is_pillows_composite_to_the_last_bit():
    rng = np.random.default_rng(0)
    size = (48, 72)
    image, other = (Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)) for _ in range(2))
    mask = Image.fromarray(rng.integers(0, 256, size, np.uint8), "L")
    seam = mask.filter(ImageFilter.GaussianBlur(tensors.SEAM_PX))
    assert len(np.unique(seam)) > 20  # of all shares
    found = tensors.keep_unmasked(
        torch.from_numpy(np.array(other))[None], replace(wish(), image=image, mask=mask)
    )
    assert np.array_equal(found[0], Image.composite(other, image, seam))
