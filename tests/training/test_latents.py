"""Encoded images: what a network is told of them, and batches that resume exactly."""

from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small import drawn
from tiny import make_diffusers_folder
from uploads import image, shard

from fewstep.errors import DatasetError
from fewstep.generation.load import load_pipeline
from fewstep.models.specs import get_model
from fewstep.prompts import parse_prompt
from fewstep.settings import Settings
from fewstep.training.data import Captioned, read_shards
from fewstep.training.latents import Batches, Encoder
from fewstep.training.networks import load_base
from fewstep.training.trainer import WHOLE, Shard

MINIATURE = get_model("miniature")


@pytest.fixture(scope="module")
def diffusion():
    return load_base("miniature", Settings(verify="size"), torch.device("cpu"))


def captioned(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.png").write_bytes(content)
    return [Captioned(folder / f"{name}.png", f"a {name} house", f"{name}.png") for name in files]


def test_an_example_is_the_image_at_its_nearest_native_size(diffusion, tmp_path):
    images = captioned(tmp_path, wide=image((600, 300)), square=image((100, 100)))
    encoder = Encoder(diffusion, tmp_path / "encoded")
    wide, square = map(load_file, encoder.encode_all(images))
    assert (wide["latents"].shape, square["latents"].shape) == ((4, 24, 42), (4, 32, 32))
    # 600x300 covers 336x192 at a scale of 0.64, where 24 px are too much on both sides.
    assert wide["time_ids"].tolist() == [300, 600, 0, 24, 192, 336]
    assert square["time_ids"].tolist() == [100, 100, 0, 0, 256, 256]
    assert encoder.captions == ["a wide house", "a square house"]
    assert encoder.no_prompt() is None  # SDXL's is all zeros

    house = drawn("house", side=256)
    house.save(tmp_path / "house.png")
    [example] = map(
        load_file, encoder.encode_all([Captioned(tmp_path / "house.png", "a house", "house.png")])
    )
    vae = diffusion.vae
    with torch.inference_mode():
        back = vae.decode(example["latents"][None].float() / vae.config.scaling_factor).sample[0]
    expected = torch.from_numpy(np.array(house)).permute(2, 0, 1) / 127.5 - 1
    assert (back - expected).abs().mean() < 0.1


@pytest.mark.numeric
def test_what_the_unet_is_told_is_what_a_generator_tells_it(diffusion, tmp_path):
    [wide] = map(load_file, Encoder(diffusion, tmp_path / "e").encode_all(captioned(tmp_path, wide=image())))
    text = load_pipeline(MINIATURE, Settings(dtype="fp32", verify="size")).text
    prompt = text.encode(parse_prompt("prompt", "a wide house"))
    torch.testing.assert_close(wide["prompt_embeds"].float(), prompt.states[0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(wide["pooled"].float(), prompt.pooled[0], rtol=2e-3, atol=2e-3)


def test_encoded_images_are_found_again_by_what_they_depend_on(diffusion, tmp_path, monkeypatch):
    images = captioned(tmp_path, one=image(), other=image(colour="blue"))
    first = Encoder(diffusion, tmp_path / "encoded").encode_all(images)
    with monkeypatch.context() as patched:
        patched.setattr(diffusion.vae, "encode", None)
        assert Encoder(diffusion, tmp_path / "encoded").encode_all(images) == first
    renamed = [Captioned(one.path, "another", one.name) for one in images]
    assert not set(first) & set(Encoder(diffusion, tmp_path / "encoded").encode_all(renamed))
    smaller = Encoder(diffusion, tmp_path / "encoded", 64).encode_all(images)
    assert not set(first) & set(smaller) and load_file(smaller[0])["latents"].shape == (4, 8, 8)
    with torch.no_grad():
        bias = diffusion.vae.encoder.conv_in.bias
        bias.add_(1)
        assert not set(first) & set(Encoder(diffusion, tmp_path / "encoded").encode_all(images))
        bias.sub_(1)


def test_a_broken_image_is_named_and_left_out(diffusion, tmp_path, caplog):
    images = captioned(tmp_path, good=image(), bad=image()[:60])
    encoder = Encoder(diffusion, tmp_path / "encoded")
    assert len(encoder.encode_all(images)) == 1
    assert "bad.png" in caplog.text and encoder.captions == ["a good house"]
    with pytest.raises(DatasetError, match="none of 1 pictures can be opened"):
        encoder.encode_all(images[1:])


def test_shards_are_encoded_up_to_a_limit_and_none_is_said(diffusion, tmp_path):
    shard(tmp_path / "x.tar", {f"{i}.png": image(colour=(i, 0, 0)) for i in range(5)})
    encoder = Encoder(diffusion, tmp_path / "encoded")
    assert len(set(encoder.encode_all(read_shards(str(tmp_path / "x.tar"), "any"), limit=3))) == 3
    with pytest.raises(DatasetError, match="none of 0 pictures"):
        encoder.encode_all(read_shards(str(tmp_path / "nothing.tar")))


def encoded(folder, *shapes):
    paths = [folder / f"{i}.safetensors" for i in range(len(shapes))]
    more = {"prompt_embeds": torch.zeros(2, 3), "pooled": torch.zeros(5), "time_ids": torch.zeros(6)}
    for i, shape in enumerate(shapes):
        save_file({"latents": torch.full((4, *shape), float(i)), **more}, paths[i])
    return paths


def shown(batches, step, share=WHOLE):
    return [int(value) for value in batches(step, share).latents[:, 0, 0, 0]]


def test_every_image_is_shown_once_an_epoch_beside_others_of_its_shape(tmp_path):
    batches = Batches(encoded(tmp_path, *[(16, 16)] * 7, *[(12, 20)] * 2), 3, 5, torch.device("cpu"))
    epochs = [[shown(batches, 4 * epoch + step) for step in range(4)] for epoch in range(2)]
    for epoch in epochs:
        counts = Counter(i for batch in epoch for i in batch)
        assert set(counts) == set(range(9)) and max(counts.values()) <= 2
        assert all(len(batch) == 3 and len({i < 7 for i in batch}) == 1 for batch in epoch)
    assert epochs[0] != epochs[1]


def test_a_batch_depends_on_its_step_and_the_seed_alone(tmp_path):
    every = encoded(tmp_path, *[(16, 16)] * 10)
    one, other, third = (Batches(every, 4, seed, torch.device("cpu")) for seed in (5, 5, 6))
    expected = [shown(one, step) for step in range(9)]
    assert shown(other, 7) == expected[7]
    assert [shown(third, step) for step in range(9)] != expected
    assert shown(other, 7, Shard(0, 2)) + shown(other, 7, Shard(1, 2)) == expected[7]
    shapes = [part.shape for part in (one(0).prompt_embeds, one(0).pooled, one(0).time_ids)]
    assert shapes == [(4, 2, 3), (4, 5), (4, 6)]


def test_sd_has_no_pooled_states_and_an_empty_prompt_of_its_own(tmp_path):
    sd = make_diffusers_folder(get_model("sd15"), tmp_path / "sd15")
    diffusion = load_base(str(sd), Settings(), torch.device("cpu"))
    encoder = Encoder(diffusion, tmp_path / "encoded")
    files = encoder.encode_all(captioned(tmp_path, one=image()))
    batch = Batches(files, 2, 0, torch.device("cpu"), encoder.no_prompt())(0)
    assert batch.pooled is None and batch.time_ids is None and len(batch.latents) == 2
    empty = batch.without_prompt().prompt_embeds
    assert empty.shape == batch.prompt_embeds.shape and empty.any()
