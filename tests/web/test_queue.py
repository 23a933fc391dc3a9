"""Fair, bounded, and nothing lost: the queue before backends whose time is what the test says."""

import asyncio
import random

import pytest
from conftest import Easel

from fewstep.errors import Busy, DeadlineExceeded, GenerationError, InternalError, Stopped, TooMany
from fewstep.web import queue as queue_module
from fewstep.web.backends import BackendBusy, BackendResult, BackendUnavailable
from fewstep.web.monitoring import Metrics
from fewstep.web.queue import MAX_ATTEMPTS, RequestQueue, Worker


def queue(*easels, slots=1, limit=64, per_client=4, deadline_s=20.0):
    made = RequestQueue(limit=limit, per_client=per_client, deadline_s=deadline_s, watcher=Metrics())
    made.workers = [
        Worker(name=str(i), slots=slots, backend=easel, ready=True) for i, easel in enumerate(easels)
    ]
    return made


def wish(prompt):
    return {"prompt": prompt}


def test_each_visitor_has_a_turn_before_any_has_a_second_one():
    async def main():
        easel = Easel(0.01)
        made = queue(easel)
        requests = [made.submit("a", wish(f"a{i}")) for i in range(4)]
        requests += [made.submit(name, wish(f"{name}{i}")) for name in "bc" for i in range(2)]
        await asyncio.gather(*(made.result(request) for request in requests))
        return easel.done

    assert asyncio.run(main()) == ["a0", "b0", "c0", "a1", "b1", "c1", "a2", "a3"]


def test_when_many_positions_come_free_at_once_each_visitor_gets_one():
    async def main():
        easel = Easel(0.01)
        made = queue(easel, slots=3)
        made.workers[0].ready = False
        requests = [made.submit("a", wish(f"a{i}")) for i in range(4)]
        requests += [made.submit(name, wish(name)) for name in "bc"]
        made.workers[0].ready = True
        made.pump()
        await asyncio.gather(*(made.result(request) for request in requests))
        return easel.begun

    assert asyncio.run(main())[:3] == ["a0", "b", "c"]


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again():
    async def main():
        easel = Easel(30)
        made = queue(easel, limit=3, per_client=2)
        for visitor in ("a", "a", "a", "b"):  # the first is generated
            made.submit(visitor, wish("any"))
        with pytest.raises(TooMany) as many:
            made.submit("a", wish("any"))
        with pytest.raises(Busy) as full:
            made.submit("c", wish("any"))
        text = made._watcher.text().decode()
        assert 'fewstep_rejections_total{code="too_many_requests"} 1.0' in text
        assert len(easel.begun) == 0  # not even begun: nothing was awaited yet
        return many.value, full.value

    many, full = asyncio.run(main())
    assert (many.status, full.status) == (429, 503)
    assert many.retry_after_s >= 1 and full.retry_after_s >= 1


def test_positions_are_told_as_they_change():
    async def main():
        told = []
        made = queue(Easel(0.02))
        made.submit("a", wish("a"))
        made.submit("b", wish("b"), lambda position: told.append(("b", position)))
        last = made.submit("c", wish("c"), lambda position: told.append(("c", position)))
        await made.result(last)
        return told

    assert asyncio.run(main()) == [("b", 0), ("c", 1), ("c", 0)]


def test_whoever_leaves_is_not_generated_for_and_a_running_result_is_given_up():
    async def main():
        easel = Easel(0.05)
        made = queue(easel)
        first, second, third = (made.submit(name, wish(name)) for name in "abc")
        await asyncio.sleep(0.01)
        made.cancel(second)
        made.cancel(first)
        await made.result(third)
        for gone in (first, second):
            with pytest.raises(Stopped):
                await made.result(gone)
        waiter = asyncio.create_task(made.generate("d", wish("d")))
        await asyncio.sleep(0.01)
        waiter.cancel()
        await asyncio.sleep(0.01)
        return easel, made

    easel, made = asyncio.run(main())
    assert (easel.begun, easel.done, easel.left) == (["a", "c", "d"], ["c"], ["a", "d"])
    assert made.running == made.waiting == 0


def test_what_a_server_did_not_answer_is_asked_of_another_with_its_turn_kept():
    async def main():
        broken, sound = Easel(), Easel(0.01)
        broken.fails = [BackendUnavailable("broken")] * 9
        made = queue(broken, sound)
        gone = []

        def doubt():
            made.workers[0].ready = False
            gone.append(1)

        made.workers[0].doubt = doubt
        generated = await asyncio.gather(*(made.generate(name, wish(name)) for name in "abcd"))
        return gone, generated, sound.done

    gone, generated, done = asyncio.run(main())
    assert gone == [1] and len(generated) == 4 and sorted(done) == list("abcd")


def test_a_wish_that_breaks_every_server_is_given_up():
    async def main():
        easel = Easel()
        easel.fails = [BackendUnavailable("broken")] * 9
        made = queue(easel)
        with pytest.raises(InternalError):
            await made.generate("a", wish("a"))
        return easel.begun

    assert len(asyncio.run(main())) == MAX_ATTEMPTS


def test_what_breaks_a_server_takes_nobody_along_twice():
    async def main():
        class Fragile(Easel):
            running = 0

            async def generate(self, inputs):
                self.running += 1
                try:
                    await asyncio.sleep(0.01)
                    if "poison" in self.asked:
                        raise BackendUnavailable("broken")
                    return await super().generate(inputs)
                finally:
                    self.running -= 1
                    if not self.running:
                        self.asked.clear()

            def __init__(self):
                super().__init__()
                self.asked = set()

        class Noting(Fragile):
            async def generate(self, inputs):
                self.asked.add(inputs["prompt"])
                return await super().generate(inputs)

        made = queue(Noting(), slots=8)
        names = ["a", "b", "poison", "c", "d"]
        return await asyncio.gather(
            *(made.generate(name, wish(name)) for name in names), return_exceptions=True
        )

    outcomes = asyncio.run(main())
    assert [type(one).__name__ for one in outcomes] == [
        "BackendResult",
        "BackendResult",
        "InternalError",
        "BackendResult",
        "BackendResult",
    ]


def test_a_server_that_refuses_though_nothing_is_there_is_doubted_and_asked_less_and_less(monkeypatch):
    monkeypatch.setattr(queue_module, "REFUSING_S", 0.2)

    async def main():
        easel, doubts, told = Easel(), [], []
        easel.fails = [BackendBusy()] * 1000
        made = queue(easel, deadline_s=0.5)
        made.workers[0].doubt = lambda: doubts.append(1)
        for _ in range(2):
            request = made.submit("a", wish("a"), told.append)
            with pytest.raises(DeadlineExceeded):
                await made.result(request)
        return len(easel.begun), doubts, told

    asked, doubts, told = asyncio.run(main())
    assert doubts and asked < 15 and len(told) < 15


def test_a_server_that_is_full_of_our_own_requests_is_not_doubted(monkeypatch):
    """It takes none of the first eight, then four, and each of these takes longer than a refusal counts."""
    monkeypatch.setattr(queue_module, "REFUSING_S", 0.05)

    class Narrow(Easel):
        running = asked = 0

        async def generate(self, inputs):
            self.asked += 1
            await asyncio.sleep(0.001)
            if self.asked <= 8 or self.running == 4:
                raise BackendBusy
            self.running += 1
            try:
                return await super().generate(inputs)
            finally:
                self.running -= 1

    async def main():
        doubts = []
        made = queue(Narrow(0.2), slots=8)
        made.workers[0].doubt = lambda: doubts.append(1)
        results = await asyncio.gather(*(made.generate(str(i), wish(str(i))) for i in range(16)))
        return results, doubts

    results, doubts = asyncio.run(main())
    assert len(results) == 16 and doubts == []


def test_a_wish_whose_time_is_up_before_there_is_a_model_says_when_to_come_again():
    async def main():
        made = queue(Easel(), deadline_s=0.05)
        made.workers[0].ready = False
        with pytest.raises(DeadlineExceeded, match="not there yet") as told:
            await made.generate("a", wish("a"))
        return told.value

    assert asyncio.run(main()).retry_after_s >= 1


def test_a_server_without_room_is_asked_again_and_an_error_of_the_model_is_not():
    async def main():
        easel = Easel()
        easel.fails = [BackendBusy(), BackendBusy(), GenerationError("no picture")]
        made = queue(easel)
        with pytest.raises(GenerationError):
            await made.generate("a", wish("a"))
        return easel.begun

    assert len(asyncio.run(main())) == 3


def test_whoever_was_sent_to_a_server_without_room_keeps_the_turn():
    async def main():
        easel = Easel(0.02)
        made = queue(easel)
        for name in "abc":
            await made.generate(name, wish("before"))
        easel.begun.clear()
        easel.fails = [BackendBusy()]
        await asyncio.gather(*(made.generate(name, wish(name)) for name in "abcd"))
        return easel.done[3:]

    # While the server rests, nobody overtakes it.
    assert asyncio.run(main()) == ["a", "b", "c", "d"]


def test_a_deadline_holds_while_waiting_for_a_server_and_while_result():
    async def main():
        easel = Easel(30)
        made = queue(easel, deadline_s=0.05)
        late = [made.submit(name, wish(name)) for name in "ab"]
        for request in late:
            with pytest.raises(DeadlineExceeded):
                await made.result(request)
        await asyncio.sleep(0.01)
        return easel.left, made.running, made.waiting

    assert asyncio.run(main()) == (["a"], 0, 0)


def test_the_least_busy_server_is_asked_and_one_that_is_not_ready_is_not():
    async def main():
        easels = [Easel(0.05) for _ in range(3)]
        made = queue(*easels, slots=4)
        made.workers[1].ready = False
        await asyncio.gather(*(made.generate(str(i), wish(str(i))) for i in range(6)))
        return [len(easel.done) for easel in easels]

    assert asyncio.run(main()) == [3, 0, 3]


def test_whoever_takes_a_request_back_keeps_the_turn_but_only_once():
    async def main(times):
        easel = Easel(0.05)
        made = queue(easel, slots=2)
        for name in "abc":  # whose turn it is in this order, from now on
            await made.generate(name, wish("before"))
        easel.begun.clear()
        made.submit("other", wish("other"))
        requests = [made.submit("a", wish("a 0"))]
        waiting = [made.submit(name, wish(name)) for name in "bc"]
        for i in range(times):
            await asyncio.sleep(0.005)
            made.cancel(requests[-1])
            requests.append(made.submit("a", wish(f"a {i + 1}")))
        await asyncio.gather(*(made.result(one) for one in (*waiting, requests[-1])))
        return easel.begun

    assert asyncio.run(main(1)) == ["other", "a 0", "a 1", "b", "c"]
    # Whoever goes on so is behind the others.
    begun = asyncio.run(main(2))
    assert begun.index("a 2") > begun.index("c")


def test_whoever_never_waits_for_a_result_does_not_starve_the_others():
    async def main():
        easel = Easel(0.01)
        made = queue(easel)
        await made.generate("a", wish("before"))  # known, and with the oldest turn
        results = [asyncio.create_task(made.generate(name, wish(name))) for name in "bcdef"]
        while not all(task.done() for task in results):
            request = made.submit("a", wish("a"))
            await asyncio.sleep(0.005)
            made.cancel(request)
        return easel.done

    assert asyncio.run(asyncio.wait_for(main(), 5))[1:] == list("bcdef")


def test_at_the_end_what_is_generated_is_finished_and_what_waits_is_told():
    async def main():
        made = queue(Easel(0.05))
        running, waiting = made.submit("a", wish("a")), made.submit("b", wish("b"))
        await asyncio.sleep(0)
        await made.close(5)
        with pytest.raises(Busy):
            await made.result(waiting)
        with pytest.raises(Busy):
            made.submit("c", wish("c"))
        return await made.result(running)

    assert isinstance(asyncio.run(main()), BackendResult)


@pytest.mark.parametrize("seed", range(5))
def test_whatever_happens_every_wish_ends_once_and_no_server_gets_more_than_it_takes(seed):
    chance = random.Random(seed)

    class Moody(Easel):
        running = most = 0

        async def generate(self, inputs):
            self.running += 1
            self.most = max(self.most, self.running)
            try:
                self.seconds = chance.random() * 0.004
                kinds = (BackendBusy(), BackendUnavailable("any"), GenerationError("any"))
                self.fails = [chance.choice(kinds)] if chance.random() < 0.3 else []
                return await super().generate(inputs)
            finally:
                self.running -= 1

    async def main():
        easels = [Moody() for _ in range(2)]
        made = queue(*easels, slots=3)
        outcomes = []

        async def visit(name):
            for i in range(20):
                try:
                    request = made.submit(name, wish(f"{name}{i}"))
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
        return outcomes, made, [easel.most for easel in easels]

    outcomes, made, most = asyncio.run(main())
    assert len(outcomes) == 500 and outcomes.count("painted") > 100
    assert max(most) <= 3
    assert made.running == made.waiting == 0 and not made._sent
