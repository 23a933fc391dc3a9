"""Fair, bounded, and nothing lost: the queue before backends whose time is what the test says."""

import asyncio
import random

import pytest
from conftest import FakeBackend

from fewstep.errors import Busy, DeadlineExceeded, GenerationError, InternalError, Stopped, TooMany
from fewstep.web import queue as queue_module
from fewstep.web.backends import BackendBusy, BackendResult, BackendUnavailable
from fewstep.web.monitoring import Metrics
from fewstep.web.queue import MAX_ATTEMPTS, RequestQueue, Worker

pytestmark = pytest.mark.anyio  # by whose plugin tests may be coroutines


@pytest.fixture
def anyio_backend():
    return "asyncio"


def queue(*backends, slots=1, limit=64, per_client=4, deadline_s=20.0):
    made = RequestQueue(limit=limit, per_client=per_client, deadline_s=deadline_s, watcher=Metrics())
    made.workers = [Worker(name="any", slots=slots, backend=backend, ready=True) for backend in backends]
    return made


def inputs(prompt):
    return {"prompt": prompt}


async def generate(made, client, prompt=None):
    return await made.result(made.submit(client, inputs(prompt or client)))


async def test_each_client_has_a_turn_before_any_has_a_second_one():
    backend = FakeBackend(0.01)
    made = queue(backend)
    requests = [made.submit("a", inputs(f"a{i}")) for i in range(4)]
    requests += [made.submit(name, inputs(f"{name}{i}")) for name in "bc" for i in range(2)]
    await asyncio.gather(*(made.result(request) for request in requests))
    assert backend.done == ["a0", "b0", "c0", "a1", "b1", "c1", "a2", "a3"]


async def test_when_many_positions_come_free_at_once_each_client_gets_one():
    backend = FakeBackend(0.01)
    made = queue(backend, slots=3)
    made.workers[0].ready = False
    requests = [made.submit("a", inputs(f"a{i}")) for i in range(4)]
    requests += [made.submit(name, inputs(name)) for name in "bc"]
    made.workers[0].ready = True
    made.pump()
    await asyncio.gather(*(made.result(request) for request in requests))
    assert backend.begun[:3] == ["a0", "b", "c"]


async def test_a_full_queue_refuses_at_once_and_says_when_to_come_again():
    backend = FakeBackend(30)
    made = queue(backend, limit=3, per_client=2)
    for client in ("a", "a", "a", "b"):  # the first is generated
        made.submit(client, inputs("any"))
    with pytest.raises(TooMany) as many:
        made.submit("a", inputs("any"))
    with pytest.raises(Busy) as full:
        made.submit("c", inputs("any"))
    text = made.watcher.text().decode()
    assert 'fewstep_rejections_total{code="too_many_requests"} 1.0' in text
    assert len(backend.begun) == 0  # not even begun: nothing was awaited yet
    assert (many.value.status, full.value.status) == (429, 503)
    assert many.value.retry_after_s >= 1 and full.value.retry_after_s >= 1


async def test_positions_are_told_as_they_change():
    told = []
    made = queue(FakeBackend(0.02))
    made.submit("a", inputs("a"))
    made.submit("b", inputs("b"), lambda position: told.append(("b", position)))
    last = made.submit("c", inputs("c"), lambda position: told.append(("c", position)))
    await made.result(last)
    assert told == [("b", 0), ("c", 1), ("c", 0)]


async def test_whoever_leaves_is_not_generated_for_and_a_running_result_is_given_up():
    backend = FakeBackend(0.05)
    made = queue(backend)
    first, second, third = (made.submit(name, inputs(name)) for name in "abc")
    await asyncio.sleep(0.01)
    made.cancel(second)
    made.cancel(first)
    await made.result(third)
    for gone in (first, second):
        with pytest.raises(Stopped):
            await made.result(gone)
    waiter = asyncio.create_task(generate(made, "d"))
    await asyncio.sleep(0.01)
    waiter.cancel()
    await asyncio.sleep(0.01)
    assert (backend.begun, backend.done, backend.left) == (["a", "c", "d"], ["c"], ["a", "d"])
    assert made.running == made.waiting == 0


async def test_what_a_server_did_not_answer_is_asked_of_another_with_its_turn_kept():
    broken, sound = FakeBackend(), FakeBackend(0.01)
    broken.fails = [BackendUnavailable("broken")] * 9
    made = queue(broken, sound)
    gone = []

    def doubt():
        made.workers[0].ready = False
        gone.append(1)

    made.workers[0].doubt = doubt
    generated = await asyncio.gather(*(generate(made, name) for name in "abcd"))
    assert gone == [1] and len(generated) == 4 and sorted(sound.done) == list("abcd")


@pytest.mark.parametrize(
    ("fails", "error", "times"),
    [
        ([BackendUnavailable("broken")] * 9, InternalError, MAX_ATTEMPTS),
        ([BackendBusy(), BackendBusy(), GenerationError("no picture")], GenerationError, 3),
    ],
    ids=["what breaks every server", "what finds no room, and then an error of the model"],
)
async def test_what_is_asked_again_and_how_often(fails, error, times):
    backend = FakeBackend()
    backend.fails = list(fails)
    with pytest.raises(error):
        await generate(queue(backend), "a")
    assert len(backend.begun) == times


async def test_what_breaks_a_server_takes_nobody_along_twice():
    class Fragile(FakeBackend):
        asked = frozenset()  # of those that are there together

        async def generate(self, inputs):
            self.asked = (self.asked if self.running else frozenset()) | {inputs["prompt"]}
            result = await super().generate(inputs)
            if "poison" in self.asked:
                raise BackendUnavailable("broken")
            return result

    made = queue(Fragile(0.01), slots=8)
    names = ["a", "b", "poison", "c", "d"]
    results = (generate(made, name) for name in names)
    outcomes = await asyncio.gather(*results, return_exceptions=True)
    image, error = BackendResult, InternalError
    assert [type(outcome) for outcome in outcomes] == [image, image, error, image, image]


async def test_a_server_that_refuses_though_nothing_is_there_is_doubted_and_asked_less_and_less(monkeypatch):
    monkeypatch.setattr(queue_module, "REFUSING_S", 0.2)

    backend, doubts, told = FakeBackend(), [], []
    backend.fails = [BackendBusy()] * 1000
    made = queue(backend, deadline_s=0.5)
    made.workers[0].doubt = lambda: doubts.append(1)
    for _ in range(2):
        request = made.submit("a", inputs("a"), told.append)
        with pytest.raises(DeadlineExceeded):
            await made.result(request)
    assert doubts and len(backend.begun) < 15 and len(told) < 15


async def test_a_server_that_is_full_of_our_own_requests_is_not_doubted(monkeypatch):
    """It takes none of the first eight, then four, and each of these takes longer than a refusal counts."""
    monkeypatch.setattr(queue_module, "REFUSING_S", 0.05)

    class Narrow(FakeBackend):
        asked = 0

        async def generate(self, inputs):
            self.asked += 1
            await asyncio.sleep(0.001)
            if self.asked <= 8 or self.running == 4:
                raise BackendBusy
            return await super().generate(inputs)

    doubts = []
    made = queue(Narrow(0.2), slots=8)
    made.workers[0].doubt = lambda: doubts.append(1)
    results = await asyncio.gather(*(generate(made, str(i)) for i in range(16)))
    assert len(results) == 16 and doubts == []


async def test_a_request_whose_time_is_up_before_there_is_a_model_says_when_to_come_again():
    made = queue(FakeBackend(), deadline_s=0.05)
    made.workers[0].ready = False
    with pytest.raises(DeadlineExceeded, match="not there yet") as told:
        await generate(made, "a")
    assert told.value.retry_after_s >= 1


async def test_whoever_was_sent_to_a_server_without_room_keeps_the_turn():
    backend = FakeBackend(0.02)
    made = queue(backend)
    for name in "abc":
        await generate(made, name, "before")
    backend.begun.clear()
    backend.fails = [BackendBusy()]
    await asyncio.gather(*(generate(made, name) for name in "abcd"))
    # While the server rests, nobody overtakes it.
    assert backend.done[3:] == ["a", "b", "c", "d"]


async def test_a_deadline_holds_while_waiting_for_a_server_and_while_result():
    backend = FakeBackend(30)
    made = queue(backend, deadline_s=0.05)
    late = [made.submit(name, inputs(name)) for name in "ab"]
    for request in late:
        with pytest.raises(DeadlineExceeded):
            await made.result(request)
    await asyncio.sleep(0.01)
    assert (backend.left, made.running, made.waiting) == (["a"], 0, 0)


async def test_the_least_busy_server_is_asked_and_one_that_is_not_ready_is_not():
    backends = [FakeBackend(0.05) for _ in range(3)]
    made = queue(*backends, slots=4)
    made.workers[1].ready = False
    await asyncio.gather(*(generate(made, str(i)) for i in range(6)))
    assert [len(backend.done) for backend in backends] == [3, 0, 3]


async def test_whoever_takes_a_request_back_keeps_the_turn_but_only_once():
    async def begun_after(times):
        backend = FakeBackend(0.05)
        made = queue(backend, slots=2)
        for name in "abc":  # whose turn it is in this order, from now on
            await generate(made, name, "before")
        backend.begun.clear()
        made.submit("other", inputs("other"))
        requests = [made.submit("a", inputs("a 0"))]
        waiting = [made.submit(name, inputs(name)) for name in "bc"]
        for i in range(times):
            await asyncio.sleep(0.005)
            made.cancel(requests[-1])
            requests.append(made.submit("a", inputs(f"a {i + 1}")))
        await asyncio.gather(*(made.result(one) for one in (*waiting, requests[-1])))
        return backend.begun

    assert await begun_after(1) == ["other", "a 0", "a 1", "b", "c"]
    # Whoever goes on so is behind the others.
    begun = await begun_after(2)
    assert begun.index("a 2") > begun.index("c")


async def test_whoever_never_waits_for_a_result_does_not_starve_the_others():
    backend = FakeBackend(0.01)
    made = queue(backend)
    await generate(made, "a", "before")  # known, and with the oldest turn
    results = [asyncio.create_task(generate(made, name)) for name in "bcdef"]
    async with asyncio.timeout(5):
        while not all(task.done() for task in results):
            request = made.submit("a", inputs("a"))
            await asyncio.sleep(0.005)
            made.cancel(request)
    assert backend.done[1:] == list("bcdef")


async def test_at_the_end_what_is_generated_is_finished_and_what_waits_is_told():
    made = queue(FakeBackend(0.05))
    running, waiting = made.submit("a", inputs("a")), made.submit("b", inputs("b"))
    await asyncio.sleep(0)
    await made.close(5)
    with pytest.raises(Busy):
        await made.result(waiting)
    with pytest.raises(Busy):
        made.submit("c", inputs("c"))
    assert isinstance(await made.result(running), BackendResult)


@pytest.mark.parametrize("seed", range(5))
async def test_whatever_happens_every_request_ends_once_and_no_server_gets_more_than_it_takes(seed):
    chance = random.Random(seed)

    class Moody(FakeBackend):
        async def generate(self, inputs):
            self.seconds = chance.random() * 0.004
            kinds = (BackendBusy(), BackendUnavailable("any"), GenerationError("any"))
            self.fails = [chance.choice(kinds)] if chance.random() < 0.3 else []
            return await super().generate(inputs)

    backends = [Moody() for _ in range(2)]
    made = queue(*backends, slots=3)
    outcomes = []

    async def visit(name):
        for i in range(20):
            try:
                request = made.submit(name, inputs(f"{name}{i}"))
            except Busy:
                outcomes.append("refused")
                continue
            if chance.random() < 0.3:
                asyncio.get_running_loop().call_later(chance.random() * 0.01, made.cancel, request)
            if chance.random() < 0.5:
                await asyncio.sleep(chance.random() * 0.003)
            try:
                await made.result(request)
                outcomes.append("painted")
            except (Stopped, GenerationError, InternalError) as error:
                outcomes.append(error.code)

    await asyncio.gather(*(visit(f"v{i}") for i in range(25)))
    assert len(outcomes) == 500 and outcomes.count("painted") > 100
    assert max(backend.most for backend in backends) <= 3
    assert made.running == made.waiting == 0 and not made._sent
