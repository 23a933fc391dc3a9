"""What is kept, done while nobody asks, said of its health, and finished at the end."""

import asyncio
import gc
import random
import threading
import time
import weakref

import pytest
from traffic import Result, held, options, play, queued, scene, seeds_of, until, wish

from fewstep.errors import GenerationError, Stopped
from fewstep.generation import batcher as batching


@scene
async def test_no_result_is_kept_alive_after_its_caller_has_it(batcher):
    alive = weakref.ref(await batcher.submit(wish(1)))
    await batcher.run(lambda: None)  # the batch's own turn is over by now
    gc.collect()
    assert alive() is None


@scene
async def test_the_model_works_on_itself_while_nobody_asks_until_it_is_done_or_fails(
    model, batcher, monkeypatch
):
    monkeypatch.setattr(batching, "IDLE_S", 0.01)
    left, calls = [True, True, False], []

    def work():
        calls.append(threading.get_ident())
        return left.pop(0)

    batcher.idle_work = work
    await batcher.run(lambda: None)  # wakes it up
    await until(lambda: not left)
    await asyncio.sleep(0.05)
    await batcher.submit(wish(1))
    assert len(calls) == 3 and set(calls) == model.threads

    def failing():
        calls.append(None)
        raise RuntimeError("any")

    batcher.idle_work = failing
    await batcher.run(lambda: None)
    await until(lambda: len(calls) == 4)
    await asyncio.sleep(0.05)
    assert len(calls) == 4 and batcher.healthy() and (await batcher.submit(wish(2))).seed == 2


@scene
async def test_a_pause_between_two_requests_is_not_idle(model, batcher, monkeypatch):
    monkeypatch.setattr(batching, "IDLE_S", 60)
    calls = []
    batcher.idle_work = lambda: calls.append(0)
    for seed in (1, 2):
        await batcher.submit(wish(seed))
        await asyncio.sleep(0.1)
    assert calls == []


@scene
async def test_requests_come_before_what_the_model_does_while_idle(model, batcher, monkeypatch):
    monkeypatch.setattr(batching, "IDLE_S", 0.05)
    calls = []
    batcher.idle_work = lambda: calls.append(len(model.batches)) or True
    first = await held(model, batcher)
    tasks = await queued(batcher, *(wish(seed, steps=seed) for seed in range(1, 5)))
    model.gate.set()
    await asyncio.gather(first, *tasks)
    served = len(model.batches)
    await until(lambda: calls)
    assert calls[0] == served
    batcher.idle_work = None


@options(deadline_s=0.3, grace_s=0.2)
@scene
async def test_health_follows_the_model_thread(model, batcher):
    assert batcher.healthy()
    stubborn = threading.Event()
    long_call = asyncio.create_task(batcher.run(lambda: stubborn.wait(10)))
    await asyncio.sleep(0.7)
    assert batcher.healthy()  # loading may take as long as it must
    stubborn.set()
    await long_call

    model.generate = lambda *_: stubborn.wait(10) and [1]  # does not look at stopped()
    stubborn.clear()
    task = asyncio.create_task(batcher.submit(wish(1)))
    await asyncio.sleep(0.05)
    assert batcher.healthy()  # busy is not stuck
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.sleep(0.4)
    assert not batcher.healthy()
    stubborn.set()
    await batcher.run(lambda: None)
    assert batcher.healthy()
    await batcher.close()
    assert not batcher.healthy()


@scene
async def test_close_finishes_what_waits_and_refuses_what_comes_later(model, batcher):
    first = await held(model, batcher)
    tasks = await queued(batcher, wish(1), wish(2, steps=8))
    closing = asyncio.create_task(batcher.close())
    await asyncio.sleep(0)
    assert not batcher.healthy()
    with pytest.raises(Stopped):
        await batcher.submit(wish(3))
    with pytest.raises(Stopped):
        await batcher.run(lambda: None)
    model.gate.set()
    assert await seeds_of([first, *tasks]) == [0, 1, 2]
    await closing
    assert not batcher._thread.is_alive()
    await batcher.close()  # at once; that of an idle one is at every test's end


async def customer(batcher, seed, dice, ends):
    await asyncio.sleep(dice.random() * 0.3)
    request = wish(seed, steps=dice.choice((4, 8)), num_outputs=dice.choice((1, 1, 2, 4)))
    task = asyncio.create_task(batcher.submit(request))
    leaves = dice.random() < 0.3
    if leaves:
        await asyncio.sleep(dice.random() * 0.02)
        task.cancel()
    try:
        end = (await task).seed
    except asyncio.CancelledError:
        end = "left" if leaves else "thrown out"
    except GenerationError:
        end = "spoilt"
    assert seed not in ends
    ends[seed] = end


@pytest.mark.parametrize("round_", range(3))
def test_under_a_crowd_everybody_ends_once_with_their_own_result(model, batcher, round_):
    ends, spoilt = {}, set()

    def make(requests, stopped):
        assert len({request.shape_key for request in requests}) == 1
        assert len(requests) == 1 or sum(request.num_outputs for request in requests) <= 6
        time.sleep(random.random() * 0.003)
        if any(request.seed % 41 == 0 for request in requests):
            spoilt.update(request.seed for request in requests)
            raise GenerationError("spoilt")
        if stopped():
            raise Stopped("every caller has left")
        return [Result(request.seed) for request in requests]

    model.make, model.limit = make, 6

    async def crowd(first_seed):
        dice = random.Random(first_seed + round_)
        seeds = range(first_seed, first_seed + 150)
        async with asyncio.TaskGroup() as group:
            for seed in seeds:
                group.create_task(customer(batcher, seed, dice, ends))

    # Three event loops on three threads, as careless callers might have.
    threads = [threading.Thread(target=play, args=(crowd(1000 * i),)) for i in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    play(batcher.close())

    seen = [seed for seeds in model.batches for seed in seeds]
    assert len(model.threads) == 1
    assert len(ends) == 450, "somebody never came to an end, or a batch was wrong, as the log says"
    for seed, end in ends.items():
        assert end in (seed, "left", "spoilt")
        assert end != "spoilt" or seed in spoilt
        assert end != seed or (seed in seen and seed not in spoilt)
    assert len(seen) == len(set(seen)), "somebody was painted twice"
    assert sum(end == "left" for end in ends.values()) > 30
    assert sum(end == seed for seed, end in ends.items()) > 150
