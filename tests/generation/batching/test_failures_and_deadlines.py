"""What a failure, a caller that leaves or time that is up does to others: nothing."""

import asyncio
import gc
import threading
import time

import pytest
from traffic import Result, called, ends_of, held, listen, options, play, queued, scene, seeds_of, until, wish

from fewstep.errors import DeadlineExceeded, GenerationError, InternalError


@scene
async def test_a_failure_among_the_results_is_raised_to_its_own_caller(model, batcher):
    model.generate = lambda requests, stopped: [
        GenerationError("no picture") if request.seed == 1 else Result(2) for request in requests
    ]
    gate = threading.Event()
    call = await called(batcher, gate.wait)
    tasks = await queued(batcher, wish(1), wish(2))
    gate.set()
    await call
    with pytest.raises(GenerationError):
        await tasks[0]
    assert (await tasks[1]).seed == 2


@scene
async def test_a_batch_is_stopped_once_everybody_has_left_and_the_next_is_served(model, batcher):
    first = await held(model, batcher)
    tasks = await queued(batcher, wish(1))
    first.cancel()
    await until(lambda: model.saw_stopped)
    model.gate.set()
    assert await seeds_of(tasks) == [1]


@options(deadline_s=1.0)
@scene
async def test_the_deadline_ends_a_wait_for_a_batch_and_stops_it(model, batcher):
    first = await held(model, batcher)
    # The model sees the stop first and raises Stopped; the caller is told the true reason all the same.
    with pytest.raises(DeadlineExceeded, match=r"within 1 s"):
        await first
    await until(lambda: model.saw_stopped)  # not before: an open gate would let the batch end by itself
    model.gate.set()
    assert (await batcher.submit(wish(1))).seed == 1


@options(deadline_s=1.0)
@scene
async def test_the_deadline_ends_a_wait_in_the_queue(model, batcher):
    busy = threading.Event()
    call = await called(batcher, lambda: busy.wait(10))
    with pytest.raises(DeadlineExceeded):
        await batcher.submit(wish(1))
    busy.set()
    await call
    assert (await batcher.submit(wish(2))).seed == 2
    assert model.batches == [[2]]


@options(deadline_s=0.5)
@scene
async def test_a_hanging_event_loop_cannot_keep_a_batch_alive_beyond_its_deadline(model, batcher):
    first = await held(model, batcher)
    time.sleep(1)  # the loop hangs, so that no timer of its own can fire
    assert model.saw_stopped
    assert await ends_of([first]) == [DeadlineExceeded]


@options(deadline_s=1)
@scene
async def test_a_mate_whose_time_is_up_takes_nobody_along(model, batcher):
    first = await held(model, batcher)
    early = await queued(batcher, wish(1))
    await asyncio.sleep(0.5)
    late = await queued(batcher, wish(2))
    first.cancel()
    await until(lambda: [1, 2] in model.batches)
    assert await ends_of(early) == [DeadlineExceeded]
    model.gate.set()
    assert await seeds_of(late) == [2]


@pytest.mark.parametrize(
    "error",
    [
        ValueError("/secret/path was cancelled, token hf_x"),
        SystemExit(3),
        KeyboardInterrupt(),
        MemoryError(),
        RecursionError(),
        asyncio.CancelledError(),
        StopIteration(),
        TimeoutError(),
        GeneratorExit(),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("way", ["generate", "max_images", "run"])
@scene
async def test_anything_unforeseen_becomes_an_internal_error_and_the_thread_lives_on(
    model, batcher, error, way
):
    def fail(*_):
        raise error

    with pytest.MonkeyPatch.context() as broken, pytest.raises(InternalError) as caught:
        broken.setattr(model, way, fail, raising=False)
        await (batcher.run(fail) if way == "run" else batcher.submit(wish(666)))
    assert str(caught.value) == str(InternalError()) and batcher.healthy()
    assert (await batcher.submit(wish(1))).seed == 1


@scene
async def test_a_foreseen_error_reaches_every_mate_each_with_its_own_copy(failing, model, batcher):
    first = await held(model, batcher)
    tasks = await queued(batcher, wish(1), wish(2))
    model.gate.set()
    errors = await asyncio.gather(first, *tasks, return_exceptions=True)
    assert model.batches == [[0], [1, 2]]
    assert [str(error) for error in errors] == ["[generation_failed] the picture is not finite"] * 3
    assert errors[1] is not errors[2]


@pytest.mark.parametrize("results", [[], [Result(1)], [Result(1)] * 3, None, 5])
@scene
async def test_a_wrong_number_of_results_is_an_error_for_all_and_never_a_mixup(model, batcher, results):
    first = await held(model, batcher)
    model.generate = lambda requests, stopped: results
    tasks = await queued(batcher, wish(1), wish(2))
    model.gate.set()
    assert await ends_of([first, *tasks]) == [Result, InternalError, InternalError]


@pytest.mark.parametrize("moment", ["early", "between the question and the call"])
def test_a_loop_that_closes_under_a_batch_harms_nobody_else(model, batcher, moment, monkeypatch):
    loop = asyncio.new_event_loop()
    task = loop.run_until_complete(held(model, batcher))
    waiting = loop.run_until_complete(queued(batcher, wish(1)))
    if moment != "early":
        monkeypatch.setattr(loop, "is_closed", lambda: False)
    loop.close()  # without cancelling its tasks, as asyncio.run would
    if moment == "early":
        play(until(lambda: model.saw_stopped))
    model.gate.set()
    assert play(batcher.submit(wish(5))).seed == 5
    assert batcher.healthy()
    assert not task.done() and not waiting[0].done()
    if moment == "early":
        assert model.batches == [[0], [5]]


@scene
async def test_an_error_on_its_way_to_a_caller_that_leaves_is_not_reported_as_forgotten(failing, batcher):
    reports = listen()
    task = await held(failing, batcher)
    failing.gate.set()
    # Block the loop until the error waits on it, then leave before it is read.
    time.sleep(0.05)
    asyncio.get_running_loop().call_soon(task.cancel)
    await asyncio.wait([task])
    await batcher.close()
    assert task.cancelled()
    del task
    gc.collect()
    await asyncio.sleep(0)
    assert reports == []


@scene
async def test_a_result_that_reaches_the_loop_after_its_caller_left_is_dropped_in_silence(model, batcher):
    reports, on_their_way, loop = listen(), [], asyncio.get_running_loop()
    task = await held(model, batcher)
    with pytest.MonkeyPatch.context() as patched:
        deliver = loop.call_soon_threadsafe
        patched.setattr(loop, "call_soon_threadsafe", lambda *call: on_their_way.append(call))
        model.gate.set()
        await until(lambda: on_their_way)
        task.cancel()
        await asyncio.wait([task])
    for call in on_their_way:
        deliver(*call)
    await batcher.close()
    assert task.cancelled()
    assert reports == []
