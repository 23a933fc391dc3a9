"""A GPU that lacks memory, or is lost: halves, a sentence, and a server that is replaced.

The doubles raise what torch raises; where it is raised in a pass is all that differs from a card.
"""

import asyncio

import numpy as np
import pytest
import torch
from generating import pixels_of as generate
from generating import results_of
from small import MINIATURE

from fewstep.errors import DeviceLost, OutOfMemory
from fewstep.generation.batcher import Batcher
from fewstep.generation.engines import Engine
from fewstep.generation.pipeline import Pipeline
from fewstep.request import Inputs

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
LOST = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def wish(seed: int, **inputs) -> Inputs:
    size = {"aspect_ratio": "custom", "width": 64, "height": 64}
    return Inputs.create(MINIATURE, prompt=f"a red house {seed}", seed=seed, steps=2, **size | inputs)


class Card(Engine):
    """The networks on a card whose memory holds `most` latents of 64 px in a pass, counting what passes."""

    def __init__(self, model: Pipeline, most: int, place: str = "unet") -> None:
        super().__init__(model.diffusion.unet, model.decoder)
        self.most, self.place, self.passes, self.released = most, place, [], 0
        self.full, self.held = FULL, 0  # what is held for speed, in latents

    def unet(self, latents, timestep, condition):
        self._allocate("unet", latents)
        return super().unet(latents, timestep, condition)

    def decode(self, latents):
        self._allocate("decode", latents)
        return super().decode(latents)

    def release(self):
        self.released += 1
        self.most += self.held
        held, self.held = self.held, 0
        return held > 0

    def _allocate(self, place, latents):
        if place == self.place:
            self.passes.append(len(latents))
            if latents.shape[2:].numel() * len(latents) > 64 * self.most:
                raise self.full


def on(card: Card, miniature: Pipeline) -> Pipeline:
    model = Pipeline(MINIATURE, miniature.diffusion, miniature.adapters, max_batch=8)
    model.engine = card
    return model


@pytest.mark.parametrize("place", ["unet", "decode"])
def test_eight_images_of_which_three_fit_come_in_twos_and_later_ones_as_well(miniature, place):
    requests = [wish(seed) for seed in range(8)]
    card = Card(miniature, most=3, place=place)
    model = on(card, miniature)
    results = results_of(model, *requests)
    for found, request in zip(results, requests, strict=True):
        [expected] = generate(miniature, request)
        assert np.abs(np.asarray(found.images[0], dtype=int) - expected).max() <= 1
    assert [result.seeds for result in results] == [[seed] for seed in range(8)]
    assert results[0].metrics["batch_size"] == 2 and card.released
    assert set(card.passes) == {8, 4, 2} and card.passes.count(8) == 1
    card.passes.clear()
    results_of(model, *requests)
    assert set(card.passes) == {2}
    large = model.request(wish(0, width=128, height=128))
    assert model.max_images(model.request(requests[0])) == 2 < model.max_images(large)  # each has its own


def test_what_is_held_for_speed_is_given_back_before_a_batch_is_halved(miniature):
    card = Card(miniature, most=4)
    card.held = 4
    model = on(card, miniature)
    assert len(results_of(model, *map(wish, range(8)))) == 8
    assert set(card.passes) == {8} and card.released == 1
    card.most = 4
    assert results_of(model, *map(wish, range(8)))[0].metrics["batch_size"] == 4
    assert model.max_images(model.request(wish(0))) == 4


def test_a_librarys_own_lack_of_memory_is_one_too(miniature):
    card = Card(miniature, most=1)
    card.full = torch.AcceleratorError("CUDA error: out of memory")
    assert len(results_of(on(card, miniature), wish(0), wish(1))) == 2 and card.passes[:2] == [2, 1]


def test_one_image_that_does_not_fit_fails_with_a_sentence_and_the_next_is_generated(miniature):
    model = on(Card(miniature, most=1), miniature)
    with pytest.raises(OutOfMemory, match="does not hold an image of 128x128 px; ask for a smaller one"):
        results_of(model, wish(0, width=128, height=128))
    assert generate(model, wish(1))[0].shape == (64, 64, 3)


def fails(*_):
    raise LOST


@pytest.mark.parametrize("place", ["unet", "decode"])
def test_a_lost_device_is_named(miniature, place):
    card = Card(miniature, most=8)
    setattr(card, place, fails)
    with pytest.raises(DeviceLost, match="the GPU failed; the server has to be started anew") as caught:
        results_of(on(card, miniature), wish(0))
    assert caught.value.__cause__ is LOST


@pytest.mark.parametrize(("error", "named"), [(LOST, DeviceLost), (FULL, OutOfMemory)])
def test_what_fails_while_prompts_are_encoded_is_named(miniature, monkeypatch, error, named):
    def encode(*_):
        raise error

    monkeypatch.setattr(miniature.text, "encode", encode)
    with pytest.raises(named):
        results_of(miniature, wish(0))


def test_prompts_that_find_no_memory_are_encoded_once_what_is_held_for_speed_is_given_back(
    miniature, monkeypatch
):
    card, encode = Card(miniature, most=8), miniature.text.encode
    model = on(card, miniature)

    def encode_with_room(*given):
        if not card.released:
            raise FULL
        return encode(*given)

    monkeypatch.setattr(model.text, "encode", encode_with_room)
    assert results_of(model, wish(0))[0].seeds == [0] and card.released == 1


def test_after_a_lost_device_the_server_is_never_healthy_again(miniature):
    card = Card(miniature, most=8)
    model = on(card, miniature)

    async def serve():
        batcher = Batcher(model, deadline_s=60)
        await batcher.submit(model.request(wish(0)))
        assert batcher.healthy()
        card.unet = fails
        with pytest.raises(DeviceLost):
            await batcher.submit(model.request(wish(1)))
        del card.unet  # a device is not well again because a call would go through
        passes = len(card.passes)
        assert not batcher.healthy()
        with pytest.raises(DeviceLost):
            await batcher.submit(model.request(wish(2)))
        assert not batcher.healthy() and len(card.passes) == passes
        await batcher.close()

    asyncio.run(serve())


def test_a_lack_of_memory_leaves_the_server_healthy(miniature):
    model = on(Card(miniature, most=1), miniature)

    async def serve():
        batcher = Batcher(model, deadline_s=60)
        with pytest.raises(OutOfMemory):
            await batcher.submit(model.request(wish(0, width=128, height=128)))
        assert batcher.healthy()
        assert (await batcher.submit(model.request(wish(1)))).seeds == [1]
        await batcher.close()

    asyncio.run(serve())
