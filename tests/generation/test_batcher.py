"""Here `generate` is a fake, since only the traffic matters: a result carries the seed of its request."""

import asyncio
import functools
import gc
import random
import threading
import time
import weakref
from collections.abc import Hashable
from dataclasses import dataclass

import pytest

from fewstep.errors import DeadlineExceeded, GenerationError, InternalError, InvalidRequest, Stopped
from fewstep.generation import batcher as batching
from fewstep.generation.batcher import MAX_OVERTAKEN, Batcher


@dataclass(frozen=True)
class Wish:
    """What the batcher must know of a request."""

    seed: int
    num_outputs: int = 1
    shape_key: Hashable = None
    weights_key: Hashable = None


def wish(seed, num_outputs=1, **inputs):
    return Wish(seed, num_outputs, tuple(inputs.items()))


def styled(seed, weights):
    return Wish(seed, 1, weights, weights)


FIRST = wish(0)


class Result:
    def __init__(self, seed):
        self.seed = seed


class Model:
    """Stands in for the model: notes every batch and its thread, and can be held in the middle of one."""

    limit = 8

    def __init__(self):
        self.batches, self.heads, self.threads = [], [], set()
        self.gate = threading.Event()
        self.gate.set()
        self.saw_stopped = False
        self._inside = threading.Lock()

    def max_images(self, request):
        self.heads.append(request.seed)
        return self.limit

    def encode(self, request):
        return request

    def generate(self, requests, stopped):
        assert self._inside.acquire(blocking=False), "two batches at once"
        try:
            self.batches.append([request.seed for request in requests])
            self.threads.add(threading.get_ident())
            return self.make(requests, stopped)
        finally:
            self._inside.release()

    def make(self, requests, stopped):
        while not self.gate.wait(0.001):
            if stopped():
                self.saw_stopped = True
                raise Stopped("every caller has left")
        return [Result(request.seed) for request in requests]


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def batcher(model, request):
    """One before `model`; `options` below gives it other options."""
    batcher = Batcher(model, **({"deadline_s": 20.0} | getattr(request, "param", {})))
    yield batcher
    model.gate.set()
    play(batcher.close())


def options(**given):
    return pytest.mark.parametrize("batcher", [given], indirect=True)


def play(scene, seconds=20):
    """Run the coroutine `scene` to its end; fail rather than hang."""
    return asyncio.run(asyncio.wait_for(scene, seconds))


def scene(test):
    """A test that is a coroutine."""

    @functools.wraps(test)
    def run(**given):
        play(test(**given))

    return run


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


async def held(model, batcher, request=FIRST):
    """Hold the model in a batch with that one request, so that all that comes next queues up."""
    model.gate.clear()
    task = asyncio.create_task(batcher.submit(request))
    await until(lambda: model.batches and model.batches[-1] == [request.seed])
    return task


async def queued(batcher, *requests):
    tasks = [asyncio.create_task(batcher.submit(request)) for request in requests]
    await asyncio.sleep(0)  # each has now run up to its wait
    return tasks


async def called(batcher, function):
    task = asyncio.create_task(batcher.run(function))
    await asyncio.sleep(0)
    return task


async def seeds_of(tasks):
    return [result.seed for result in await asyncio.gather(*tasks)]


async def ends_of(tasks):
    return [type(end) for end in await asyncio.gather(*tasks, return_exceptions=True)]


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


@pytest.fixture
def failing(model):
    """`model`, which raises once its gate is open."""
    make = model.make

    def fail(requests, stopped):
        make(requests, stopped)
        raise GenerationError("the picture is not finite")

    model.make = fail
    return model


def listen():
    """What the running loop will have to say of errors that nobody has read."""
    reports = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context))
    return reports


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


@scene
async def test_a_rare_style_is_overtaken_a_few_times_and_no_more(model, batcher):
    model.limit = 1
    wishes = [styled(100, "rare"), *(styled(i, None) for i in range(1, 11)), styled(101, "rarer")]
    tasks = [await held(model, batcher), *await queued(batcher, *wishes)]
    model.gate.set()
    await asyncio.gather(*tasks)
    assert model.batches.index([100]) == 1 + MAX_OVERTAKEN
    assert sorted(seed for [seed] in model.batches) == [*range(11), 100, 101]
