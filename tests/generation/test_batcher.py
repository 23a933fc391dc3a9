"""Here `generate` is a fake, since only the traffic matters: a result carries the seed of its request."""

import asyncio
import gc
import random
import threading
import time
import weakref
from collections.abc import Hashable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from fewstep.errors import DeadlineExceeded, GenerationError, InternalError, InvalidRequest, Stopped
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


class Result:
    def __init__(self, seed):
        self.seed = seed


class Model:
    """Stands in for the model: notes every batch and its thread, and can be held in the middle of one."""

    limit = 8

    def __init__(self):
        self.batches = []
        self.threads = set()
        self.entered = threading.Semaphore(0)
        self.gate = threading.Event()
        self.gate.set()
        self.saw_stopped = False
        self._inside = threading.Lock()

    def max_images(self, request):
        return self.limit

    def encode(self, request):
        return request

    def generate(self, requests, stopped):
        assert self._inside.acquire(blocking=False), "two batches at once"
        try:
            self.batches.append([request.seed for request in requests])
            self.threads.add(threading.get_ident())
            self.entered.release()
            while not self.gate.wait(0.001):
                if stopped():
                    self.saw_stopped = True
                    raise Stopped("every caller has left")
            return [Result(request.seed) for request in requests]
        finally:
            self._inside.release()


def batcher_of(model, limit=8, deadline_s=20.0, **options):
    model.limit = limit
    return Batcher(model, deadline_s=deadline_s, **options)


def batcher_by(generate, max_images=lambda request: 8, encode=lambda request: request):
    model = SimpleNamespace(generate=generate, max_images=max_images, encode=encode)
    return Batcher(model, deadline_s=20)


def play(scene, seconds=20):
    """Run the coroutine `scene` to its end; fail rather than hang."""
    return asyncio.run(asyncio.wait_for(scene, seconds))


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


async def held(model, batcher, seed=0):
    """Hold the model in a batch with that one seed, so that all that comes next queues up."""
    model.gate.clear()
    task = asyncio.create_task(batcher.submit(wish(seed)))
    await until(lambda: model.batches and model.batches[-1] == [seed])
    return task


async def queued(batcher, *requests):
    tasks = [asyncio.create_task(batcher.submit(request)) for request in requests]
    await asyncio.sleep(0)  # each has now run up to its wait
    return tasks


async def seeds_of(tasks):
    return [result.seed for result in await asyncio.gather(*tasks)]


def test_a_lone_request_is_served_at_once_with_its_own_result():
    model = Model()

    async def scene():
        batcher = batcher_of(model)
        result = await batcher.submit(wish(42))
        await batcher.close()
        return result.seed

    assert play(scene()) == 42
    assert model.batches == [[42]]


def test_those_of_one_shape_share_a_pass_in_order_and_others_keep_their_turn():
    model = Model()

    async def scene():
        batcher = batcher_of(model)
        first = await held(model, batcher)
        tasks = await queued(
            batcher, wish(1), wish(2, steps=8), wish(3), wish(4, guidance=2.0), wish(5), wish(6, steps=8)
        )
        model.gate.set()
        seeds = await seeds_of([first, *tasks])
        await batcher.close()
        return seeds

    assert play(scene()) == [0, 1, 2, 3, 4, 5, 6]
    assert model.batches == [[0], [1, 3, 5], [2, 6], [4]]


def test_a_pass_holds_no_more_images_than_its_size_allows_and_nobody_overtakes():
    model = Model()

    async def scene():
        batcher = batcher_of(model, limit=4)
        first = await held(model, batcher)
        tasks = await queued(
            batcher, wish(1, num_outputs=2), wish(2), wish(3, num_outputs=2), wish(4), wish(5), wish(6)
        )
        model.gate.set()
        await seeds_of([first, *tasks])
        await batcher.close()

    play(scene())
    # 3 does not fit beside 1 and 2; 4 would, but it came later.
    assert model.batches == [[0], [1, 2], [3, 4, 5], [6]]


def test_a_request_bigger_than_a_pass_goes_alone():
    model = Model()

    async def scene():
        batcher = batcher_of(model, limit=2)
        first = await held(model, batcher)
        tasks = await queued(batcher, wish(1, num_outputs=4), wish(2))
        model.gate.set()
        await seeds_of([first, *tasks])
        await batcher.close()

    play(scene())
    assert model.batches == [[0], [1], [2]]


def test_the_limit_is_asked_of_the_head():
    model = Model()
    asked = []

    async def scene():
        batcher = batcher_by(model.generate, lambda request: asked.append(request.seed) or 8)
        first = await held(model, batcher)
        tasks = await queued(batcher, wish(1), wish(2))
        model.gate.set()
        await seeds_of([first, *tasks])
        await batcher.close()

    play(scene())
    assert asked == [0, 1]


def test_one_thread_does_all_the_work_and_it_is_not_the_callers():
    model = Model()

    async def scene():
        batcher = batcher_of(model)
        loaded_on = await batcher.run(threading.get_ident)
        await asyncio.gather(*(batcher.submit(wish(seed)) for seed in range(20)))
        await batcher.close()
        return loaded_on

    loaded_on = play(scene())
    assert model.threads == {loaded_on}
    assert loaded_on != threading.get_ident()


def test_a_call_runs_in_its_turn_and_no_request_joins_a_batch_across_it():
    model = Model()

    async def scene():
        batcher = batcher_of(model)
        first = await held(model, batcher)
        before = await queued(batcher, wish(1))
        call = asyncio.create_task(batcher.run(lambda: model.batches.append("call") or "done"))
        await asyncio.sleep(0)
        after = await queued(batcher, wish(2))
        model.gate.set()
        await seeds_of([first, *before, *after])
        await batcher.close()
        return await call

    assert play(scene()) == "done"
    assert model.batches == [[0], [1], "call", [2]]


def test_a_caller_that_leaves_the_queue_is_never_generated():
    model = Model()

    async def scene():
        batcher = batcher_of(model)
        first = await held(model, batcher)
        leaver, stayer = await queued(batcher, wish(1), wish(2))
        leaver.cancel()
        await asyncio.wait([leaver])
        assert len(batcher._queue) == 1
        model.gate.set()
        seeds = await seeds_of([first, stayer])
        await batcher.close()
        return leaver.cancelled(), seeds

    assert play(scene()) == (True, [0, 2])
    assert model.batches == [[0], [2]]


def test_a_call_whose_caller_left_the_queue_is_not_made():
    model = Model()
    calls = []

    async def scene():
        batcher = batcher_of(model)
        first = await held(model, batcher)
        call = asyncio.create_task(batcher.run(lambda: calls.append(1)))
        await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait([call])
        model.gate.set()
        await first
        await batcher.close()

    play(scene())
    assert calls == []


def test_a_caller_that_leaves_a_running_batch_leaves_its_mates_unharmed():
    model = Model()

    async def scene():
        batcher = batcher_of(model)
        first = await held(model, batcher)
        tasks = await queued(batcher, wish(1), wish(2), wish(3))
        first.cancel()
        await until(lambda: [1, 2, 3] in model.batches)
        model.saw_stopped = False
        tasks[1].cancel()
        await asyncio.wait([tasks[1]])
        await asyncio.sleep(0.02)  # many looks at stopped()
        stopped_under_the_others = model.saw_stopped
        model.gate.set()
        seeds = await seeds_of([tasks[0], tasks[2]])
        await batcher.close()
        return seeds, tasks[1].cancelled(), stopped_under_the_others

    assert play(scene()) == ([1, 3], True, False)
    assert model.batches == [[0], [1, 2, 3]]


def test_who_comes_while_others_are_encoded_joins_if_there_is_room():
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

    async def scene():
        batcher = batcher_by(generate, lambda request: 4, encode)
        tasks = await queued(batcher, wish(1))
        comers = [[wish(2), wish(3, steps=2)], [wish(4)], [wish(5, num_outputs=2), wish(6)]]
        for gate, late in zip(gates.values(), comers, strict=True):
            await asyncio.to_thread(asked.acquire)
            tasks += await queued(batcher, *late)
            gate.set()
        return await seeds_of(tasks)

    assert play(scene()) == [1, 2, 3, 4, 5, 6]  # each got its own
    # Another shape waits, and so do two images where there is room for one, and what is behind them.
    assert batches == [[1, 2, 4], [3], [5, 6]]


def test_nobody_joins_from_behind_a_call_nor_once_gone():
    model, asked, gate = Model(), threading.Event(), threading.Event()

    def encode(request):
        asked.set()
        gate.wait(10)
        return request

    async def scene():
        batcher = batcher_by(model.generate, encode=encode)
        tasks = await queued(batcher, wish(1))
        await asyncio.to_thread(asked.wait)
        gone, kept = await queued(batcher, wish(2), wish(3))
        gone.cancel()
        call = asyncio.create_task(batcher.run(lambda: list(model.batches)))
        await asyncio.sleep(0)
        behind = await queued(batcher, wish(4))
        gate.set()
        return await seeds_of([*tasks, kept, *behind]), await call

    seeds, before_the_call = play(scene())
    assert seeds == [1, 3, 4]
    assert before_the_call == [[1, 3]] and model.batches == [[1, 3], [4]]


def test_a_prompt_that_cannot_be_encoded_fails_its_batch_and_no_other():
    model = Model()

    def encode(request):
        if request.seed == 2:
            raise InvalidRequest("prompt is too long")
        return request

    async def scene():
        batcher = batcher_by(model.generate, encode=encode)
        first = await held(model, batcher)
        tasks = await queued(batcher, wish(1), wish(2), wish(3, steps=2))
        model.gate.set()
        ends = await asyncio.gather(first, *tasks, return_exceptions=True)
        return [type(end) for end in ends]

    assert play(scene()) == [Result, InvalidRequest, InvalidRequest, Result]
    assert model.batches == [[0], [3]]


def test_a_failure_among_the_results_is_raised_to_its_own_caller():
    def generate(requests, stopped):
        return [GenerationError("no picture") if request.seed == 1 else Result(2) for request in requests]

    async def scene():
        batcher, gate = batcher_by(generate), threading.Event()
        call = asyncio.create_task(batcher.run(gate.wait))
        tasks = await queued(batcher, wish(1), wish(2))
        gate.set()
        await call
        with pytest.raises(GenerationError):
            await tasks[0]
        return (await tasks[1]).seed

    assert play(scene()) == 2


def test_a_batch_is_stopped_once_everybody_has_left_and_the_next_is_served():
    model = Model()

    async def scene():
        batcher = batcher_of(model)
        first = await held(model, batcher)
        (second,) = await queued(batcher, wish(1))
        first.cancel()
        await until(lambda: model.saw_stopped)
        model.gate.set()
        seeds = await seeds_of([second])
        await batcher.close()
        return seeds

    assert play(scene()) == [1]


def test_the_deadline_ends_a_wait_for_a_batch_and_stops_it():
    model = Model()

    async def scene():
        batcher = batcher_of(model, deadline_s=1.0)
        first = await held(model, batcher)
        # The model sees the stop first and raises Stopped; the caller is told the true reason all the same.
        with pytest.raises(DeadlineExceeded, match=r"within 1 s"):
            await first
        await until(lambda: model.saw_stopped)  # not before: an open gate would let the batch end by itself
        model.gate.set()
        later = await batcher.submit(wish(1))
        await batcher.close()
        return later.seed

    assert play(scene()) == 1


def test_the_deadline_ends_a_wait_in_the_queue():
    model = Model()
    busy = threading.Event()

    async def scene():
        batcher = batcher_of(model, deadline_s=1.0)
        call = asyncio.create_task(batcher.run(lambda: busy.wait(10)))
        await asyncio.sleep(0)
        with pytest.raises(DeadlineExceeded):
            await batcher.submit(wish(1))
        busy.set()
        await call
        later = await batcher.submit(wish(2))
        await batcher.close()
        return later.seed

    assert play(scene()) == 2
    assert model.batches == [[2]]


def test_a_hanging_event_loop_cannot_keep_a_batch_alive_beyond_its_deadline():
    model = Model()

    async def scene():
        batcher = batcher_of(model, deadline_s=0.5)
        first = await held(model, batcher)
        time.sleep(1)  # the loop hangs, so that no timer of its own can fire
        stopped_meanwhile = model.saw_stopped
        result = await asyncio.gather(first, return_exceptions=True)
        model.gate.set()
        await batcher.close()
        return stopped_meanwhile, type(result[0])

    assert play(scene()) == (True, DeadlineExceeded)


def test_a_mate_whose_time_is_up_takes_nobody_along():
    model = Model()

    async def scene():
        batcher = batcher_of(model, deadline_s=1)
        first = await held(model, batcher)
        (early,) = await queued(batcher, wish(1))
        await asyncio.sleep(0.5)
        (late,) = await queued(batcher, wish(2))
        first.cancel()
        await until(lambda: [1, 2] in model.batches)
        early_end = await asyncio.gather(early, return_exceptions=True)
        model.gate.set()
        seeds = await seeds_of([late])
        await batcher.close()
        return type(early_end[0]), seeds

    assert play(scene()) == (DeadlineExceeded, [2])


def failing_with(error):
    def generate(requests, stopped):
        if requests[0].seed == 666:
            raise error
        return [Result(request.seed) for request in requests]

    return batcher_by(generate)


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
@pytest.mark.parametrize("way", ["submit", "run"])
def test_anything_unforeseen_becomes_an_internal_error_and_the_thread_lives_on(error, way):
    def fail():
        raise error

    async def scene():
        batcher = failing_with(error)
        with pytest.raises(InternalError) as caught:
            await (batcher.submit(wish(666)) if way == "submit" else batcher.run(fail))
        healthy = batcher.healthy()
        later = await batcher.submit(wish(1))
        await batcher.close()
        return str(caught.value), healthy, later.seed

    assert play(scene()) == (str(InternalError()), True, 1)


def test_a_foreseen_error_reaches_every_mate_each_with_its_own_copy():
    model = Model()

    def generate(requests, stopped):
        model.generate(requests, stopped)
        raise GenerationError("the picture is not finite")

    async def scene():
        batcher = batcher_by(generate)
        first = await held(model, batcher)
        tasks = await queued(batcher, wish(1), wish(2))
        model.gate.set()
        errors = await asyncio.gather(first, *tasks, return_exceptions=True)
        await batcher.close()
        return errors

    errors = play(scene())
    assert model.batches == [[0], [1, 2]]
    assert [str(error) for error in errors] == ["[generation_failed] the picture is not finite"] * 3
    assert errors[1] is not errors[2]


@pytest.mark.parametrize("results", [[], [Result(1)], [Result(1)] * 3, None, 5])
def test_a_wrong_number_of_results_is_an_error_for_all_and_never_a_mixup(results):
    model = Model()

    def generate(requests, stopped):
        model.generate(requests, stopped)
        return results if len(requests) == 2 else [Result(request.seed) for request in requests]

    async def scene():
        batcher = batcher_by(generate)
        first = await held(model, batcher)
        tasks = await queued(batcher, wish(1), wish(2))
        model.gate.set()
        ends = await asyncio.gather(first, *tasks, return_exceptions=True)
        await batcher.close()
        return [type(end) for end in ends]

    assert play(scene()) == [Result, InternalError, InternalError]


def test_a_failure_to_size_the_batch_is_told_to_its_head():
    async def scene():
        batcher = batcher_by(lambda *_: [1], lambda request: 1 // 0)
        with pytest.raises(InternalError):
            await batcher.submit(wish(1))
        healthy = batcher.healthy()
        await batcher.close()
        return healthy

    assert play(scene())


@pytest.mark.parametrize("moment", ["early", "between the question and the call"])
def test_a_loop_that_closes_under_a_batch_harms_nobody_else(moment, monkeypatch):
    model = Model()
    batcher = batcher_of(model)
    loop = asyncio.new_event_loop()
    task = loop.run_until_complete(held(model, batcher))
    waiting = loop.run_until_complete(queued(batcher, wish(1)))
    if moment != "early":
        monkeypatch.setattr(loop, "is_closed", lambda: False)
    loop.close()  # without cancelling its tasks, as asyncio.run would
    if moment == "early":
        play(until(lambda: model.saw_stopped))
    model.gate.set()

    async def scene():
        result = await batcher.submit(wish(5))
        healthy = batcher.healthy()
        await batcher.close()
        return result.seed, healthy

    assert play(scene()) == (5, True)
    assert not task.done() and not waiting[0].done()
    if moment == "early":
        assert model.batches == [[0], [5]]


def test_an_error_on_its_way_to_a_caller_that_leaves_is_not_reported_as_forgotten():
    model = Model()
    reports = []

    def generate(requests, stopped):
        model.generate(requests, stopped)
        raise GenerationError("the picture is not finite")

    async def scene():
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: reports.append(context))
        batcher = batcher_by(generate)
        task = await held(model, batcher)
        model.gate.set()
        # Block the loop until the error waits on it, then leave before it is read.
        time.sleep(0.05)
        asyncio.get_running_loop().call_soon(task.cancel)
        await asyncio.wait([task])
        await batcher.close()
        cancelled = task.cancelled()
        del task
        gc.collect()
        await asyncio.sleep(0)
        return cancelled

    assert play(scene())
    assert reports == []


def test_a_result_that_reaches_the_loop_after_its_caller_left_is_dropped_in_silence(monkeypatch):
    model = Model()
    reports, on_their_way = [], []

    async def scene():
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda loop, context: reports.append(context))
        batcher = batcher_of(model)
        task = await held(model, batcher)
        deliver = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *call: on_their_way.append(call))
        model.gate.set()
        await until(lambda: on_their_way)
        task.cancel()
        await asyncio.wait([task])
        monkeypatch.undo()
        for call in on_their_way:
            deliver(*call)
        await batcher.close()
        return task.cancelled()

    assert play(scene())
    assert reports == []


def test_no_result_is_kept_alive_after_its_caller_has_it():
    model = Model()

    async def scene():
        batcher = batcher_of(model)
        alive = weakref.ref(await batcher.submit(wish(1)))
        await batcher.run(lambda: None)  # the batch's own turn is over by now
        gc.collect()
        kept = alive() is not None
        await batcher.close()
        return kept

    assert not play(scene())


def test_health_follows_the_model_thread():
    model = Model()

    async def scene():
        batcher = batcher_of(model, deadline_s=0.3, grace_s=0.2)
        seen = [batcher.healthy()]
        stubborn = threading.Event()
        long_call = asyncio.create_task(batcher.run(lambda: stubborn.wait(10)))
        await asyncio.sleep(0.7)
        seen.append(batcher.healthy())  # loading may take as long as it must
        stubborn.set()
        await long_call

        model.generate = lambda *_: stubborn.wait(10) and [1]  # does not look at stopped()
        stubborn.clear()
        task = asyncio.create_task(batcher.submit(wish(1)))
        await asyncio.sleep(0.05)
        seen.append(batcher.healthy())  # busy is not stuck
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.sleep(0.4)
        seen.append(batcher.healthy())
        stubborn.set()
        await batcher.run(lambda: None)
        seen.append(batcher.healthy())
        await batcher.close()
        seen.append(batcher.healthy())
        return seen

    assert play(scene()) == [True, True, True, False, True, False]


def test_close_finishes_what_waits_and_refuses_what_comes_later():
    model = Model()

    async def scene():
        batcher = batcher_of(model)
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
        seeds = await seeds_of([first, *tasks])
        await closing
        return seeds, batcher._thread.is_alive()

    assert play(scene()) == ([0, 1, 2], False)


def test_closing_an_idle_or_a_closed_batcher_returns_at_once():
    async def scene():
        batcher = batcher_of(Model())
        await batcher.close()
        await batcher.close()

    play(scene())


class Traffic:
    """What the stress test's `generate` checks and notes; seeds divisible by 41 spoil their whole batch."""

    def __init__(self):
        self.seen = []
        self.spoilt = set()
        self.wrong = []
        self.threads = set()
        self._inside = threading.Lock()

    def generate(self, requests, stopped):
        if not self._inside.acquire(blocking=False):
            self.wrong.append("two batches at once")
        try:
            self.threads.add(threading.get_ident())
            seeds = [request.seed for request in requests]
            self.seen += seeds
            if len({request.shape_key for request in requests}) != 1:
                self.wrong.append("shapes were mixed")
            if len(requests) > 1 and sum(request.num_outputs for request in requests) > 6:
                self.wrong.append("a batch was too big")
            time.sleep(random.random() * 0.003)
            if any(seed % 41 == 0 for seed in seeds):
                self.spoilt.update(seeds)
                raise GenerationError("spoilt")
            if stopped():
                raise Stopped("every caller has left")
            return [Result(request.seed) for request in requests]
        finally:
            self._inside.release()


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
def test_under_a_crowd_everybody_ends_once_with_their_own_result(round_):
    traffic, ends = Traffic(), {}
    batcher = batcher_by(traffic.generate, lambda request: 6)

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

    assert traffic.wrong == []
    assert len(traffic.threads) == 1
    assert len(ends) == 450, "somebody never came to an end"
    for seed, end in ends.items():
        assert end in (seed, "left", "spoilt")
        assert end != "spoilt" or seed in traffic.spoilt
        assert end != seed or (seed in traffic.seen and seed not in traffic.spoilt)
    assert len(traffic.seen) == len(set(traffic.seen)), "somebody was painted twice"
    assert sum(end == "left" for end in ends.values()) > 30
    assert sum(end == seed for seed, end in ends.items()) > 150


async def order_of(model, batcher, *requests):
    """Queue `requests` behind a batch whose weights are None, and see in which batches they are generated."""
    model.gate.clear()
    first = asyncio.create_task(batcher.submit(styled(-1, None)))
    await until(lambda: model.batches)
    tasks = await queued(batcher, *requests)
    model.gate.set()
    await asyncio.gather(first, *tasks)
    return model.batches[1:]


def test_what_needs_no_change_of_weights_goes_first():
    async def scene():
        model = Model()
        batcher = batcher_of(model, limit=1)
        wishes = [styled(0, "a"), styled(1, None), styled(2, "b"), styled(3, "a"), styled(4, None)]
        found = await order_of(model, batcher, *wishes)
        assert found == [[1], [4], [0], [3], [2]]  # three changes where the order of arrival takes five
        await batcher.close()

    play(scene())


def test_a_rare_style_is_overtaken_a_few_times_and_no_more():
    async def scene():
        model = Model()
        batcher = batcher_of(model, limit=1)
        wishes = [styled(100, "rare"), *(styled(i, None) for i in range(10)), styled(101, "rarer")]
        found = await order_of(model, batcher, *wishes)
        assert found.index([100]) == MAX_OVERTAKEN
        assert sorted(seed for [seed] in found) == [*range(10), 100, 101]
        await batcher.close()

    play(scene())


def test_nobody_is_overtaken_from_behind_a_call():
    async def scene():
        model, calls = Model(), []
        batcher = batcher_of(model, limit=1)
        model.gate.clear()
        first = asyncio.create_task(batcher.submit(styled(-1, None)))
        await until(lambda: model.batches)
        before = await queued(batcher, styled(0, "a"))
        call = asyncio.create_task(batcher.run(lambda: calls.append(list(model.batches))))
        await asyncio.sleep(0)
        after = await queued(batcher, styled(1, None))
        model.gate.set()
        await asyncio.gather(first, *before, call, *after)
        assert model.batches == [[-1], [0], [1]] and calls == [[[-1], [0]]]
        await batcher.close()

    play(scene())


def test_styles_never_share_a_batch():
    async def scene():
        model = Model()
        batcher = batcher_of(model)
        wishes = [styled(i, "ab"[i % 2]) for i in range(6)]
        assert await order_of(model, batcher, *wishes) == [[0, 2, 4], [1, 3, 5]]
        await batcher.close()

    play(scene())
