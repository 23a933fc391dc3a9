"""Who shares a forward pass, in which order, and who may still join."""

import asyncio
import threading

import pytest
from traffic import Result, called, ends_of, held, queued, scene, seeds_of, styled, until, wish

from fewstep.errors import InvalidRequest
from fewstep.generation.batcher import MAX_OVERTAKEN


@scene
async def test_a_lone_request_is_served_at_once_with_its_own_result(model, batcher):
    assert (await batcher.submit(wish(42))).seed == 42
    assert model.batches == [[42]]


@pytest.mark.parametrize(
    ("limit", "requests", "batches"),
    [
        # Those of one shape share a pass, in order, and others keep their turn.
        (
            8,
            [wish(1), wish(2, steps=8), wish(3), wish(4, guidance=2.0), wish(5), wish(6, steps=8)],
            [[1, 3, 5], [2, 6], [4]],
        ),
        # A pass holds what its size allows: 3 does not fit beside 1 and 2; 4 would, but it came later.
        (4, [wish(1, 2), wish(2), wish(3, 2), wish(4), wish(5), wish(6)], [[1, 2], [3, 4, 5], [6]]),
        # A request bigger than a pass goes alone.
        (2, [wish(1, 4), wish(2)], [[1], [2]]),
        # Styles never share one.
        (8, [styled(i, "ab"[i % 2]) for i in range(1, 7)], [[1, 3, 5], [2, 4, 6]]),
        # What needs no change of weights goes first: three changes where the order of arrival takes five.
        (
            1,
            [styled(i, weights) for i, weights in enumerate(["a", None, "b", "a", None], 1)],
            [[2], [5], [1], [4], [3]],
        ),
    ],
)
@scene
async def test_who_shares_a_pass_and_in_which_order(model, batcher, limit, requests, batches):
    model.limit = limit
    first = await held(model, batcher)
    tasks = await queued(batcher, *requests)
    model.gate.set()
    assert await seeds_of([first, *tasks]) == [0, *(request.seed for request in requests)]
    assert model.batches == [[0], *batches]
    assert model.heads == [seeds[0] for seeds in model.batches]  # who are asked for the limit


@scene
async def test_one_thread_does_all_the_work_and_it_is_not_the_callers(model, batcher):
    loaded_on = await batcher.run(threading.get_ident)
    await asyncio.gather(*(batcher.submit(wish(seed)) for seed in range(20)))
    assert model.threads == {loaded_on}
    assert loaded_on != threading.get_ident()


@pytest.mark.parametrize("early, late", [(wish(1), wish(2)), (styled(1, "a"), styled(2, None))])
@scene
async def test_a_call_runs_in_its_turn_and_nobody_joins_or_overtakes_across_it(model, batcher, early, late):
    first = await held(model, batcher)
    before = await queued(batcher, early)
    call = await called(batcher, lambda: model.batches.append("call") or "done")
    after = await queued(batcher, late)
    model.gate.set()
    await seeds_of([first, *before, *after])
    assert await call == "done"
    assert model.batches == [[0], [1], "call", [2]]


@scene
async def test_what_a_caller_wanted_that_leaves_the_queue_is_not_done(model, batcher):
    first = await held(model, batcher)
    call = await called(batcher, lambda: model.batches.append("call"))
    leaver, stayer = await queued(batcher, wish(1), wish(2))
    for task in (call, leaver):
        task.cancel()
        await asyncio.wait([task])
    assert len(batcher._queue) == 1
    model.gate.set()
    assert await seeds_of([first, stayer]) == [0, 2]
    assert call.cancelled() and leaver.cancelled()
    assert model.batches == [[0], [2]]


@scene
async def test_a_caller_that_leaves_a_running_batch_leaves_its_mates_unharmed(model, batcher):
    first = await held(model, batcher)
    tasks = await queued(batcher, wish(1), wish(2), wish(3))
    first.cancel()
    await until(lambda: [1, 2, 3] in model.batches)
    model.saw_stopped = False
    tasks[1].cancel()
    await asyncio.wait([tasks[1]])
    await asyncio.sleep(0.02)  # many looks at stopped()
    assert not model.saw_stopped
    model.gate.set()
    assert await seeds_of([tasks[0], tasks[2]]) == [1, 3]
    assert tasks[1].cancelled()
    assert model.batches == [[0], [1, 2, 3]]


@scene
async def test_who_comes_while_others_are_encoded_joins_if_there_is_room(model, batcher):
    batches, asked = [], threading.Semaphore(0)
    gates = {seed: threading.Event() for seed in (1, 2, 4)}

    def encode(request):
        if request.seed in gates:
            asked.release()
            gates[request.seed].wait(10)
        return f"encoded {request.seed}"

    def generate(encoded, stopped):
        seeds = [int(text.removeprefix("encoded ")) for text in encoded]
        batches.append(seeds)
        return [Result(seed) for seed in seeds]

    model.encode, model.generate, model.limit = encode, generate, 4
    tasks = await queued(batcher, wish(1))
    comers = [[wish(2), wish(3, steps=2)], [wish(4)], [wish(5, num_outputs=2), wish(6)]]
    for gate, late in zip(gates.values(), comers, strict=True):
        await asyncio.to_thread(asked.acquire)
        tasks += await queued(batcher, *late)
        gate.set()
    assert await seeds_of(tasks) == [1, 2, 3, 4, 5, 6]  # each got its own
    # Another shape waits, and so do two images where there is room for one, and what is behind them.
    assert batches == [[1, 2, 4], [3], [5, 6]]


@scene
async def test_nobody_joins_from_behind_a_call_nor_once_gone(model, batcher):
    asked, gate = threading.Event(), threading.Event()

    def encode(request):
        asked.set()
        gate.wait(10)
        return request

    model.encode = encode
    tasks = await queued(batcher, wish(1))
    await asyncio.to_thread(asked.wait)
    gone, kept = await queued(batcher, wish(2), wish(3))
    gone.cancel()
    call = await called(batcher, lambda: list(model.batches))
    behind = await queued(batcher, wish(4))
    gate.set()
    assert await seeds_of([*tasks, kept, *behind]) == [1, 3, 4]
    assert await call == [[1, 3]] and model.batches == [[1, 3], [4]]


@scene
async def test_a_prompt_that_cannot_be_encoded_fails_its_batch_and_no_other(model, batcher):
    def encode(request):
        if request.seed == 2:
            raise InvalidRequest("prompt is too long")
        return request

    model.encode = encode
    first = await held(model, batcher)
    tasks = await queued(batcher, wish(1), wish(2), wish(3, steps=2))
    model.gate.set()
    assert await ends_of([first, *tasks]) == [Result, InvalidRequest, InvalidRequest, Result]
    assert model.batches == [[0], [3]]


@scene
async def test_a_rare_style_is_overtaken_a_few_times_and_no_more(model, batcher):
    model.limit = 1
    wishes = [styled(100, "rare"), *(styled(i, None) for i in range(1, 11)), styled(101, "rarer")]
    tasks = [await held(model, batcher), *await queued(batcher, *wishes)]
    model.gate.set()
    await asyncio.gather(*tasks)
    assert model.batches.index([100]) == 1 + MAX_OVERTAKEN
    assert sorted(seed for [seed] in model.batches) == [*range(11), 100, 101]
