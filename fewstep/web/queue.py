"""Who is generated for next: a bounded queue before one or many servers, fair to every visitor.

A server that batches gets as many requests at once as it takes; the rest wait here, where their place can be
told, and where a wish can still be replaced by a newer one.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from fewstep.errors import FewstepError, InternalError, Stopped
from fewstep.web.backends import BackendBusy, BackendResult, BackendUnavailable, Generator
from fewstep.web.logs import FIELDS

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3  # a request may itself be what ends a server
# coglet has room for a caller again only a moment after its answer; one that others use too, later.
FULL_AGAIN_S = (0.01, 1.0)
JOIN_S = 0.01  # in which others join a batch: its prompts are being encoded
TOLD = ("width", "height", "steps", "num_outputs")  # of the inputs, in the log
REMEMBERED = 4096  # visitors, of whom it is known when they were last generated for


class Busy(FewstepError):
    """The queue is full, or closed; `retry_after_s` says when to come again."""

    code = "busy"
    status = 503

    def __init__(self, sentence: str, retry_after_s: int = 1) -> None:
        super().__init__(sentence)
        self.retry_after_s = retry_after_s


class TooMany(Busy):
    """This visitor has enough waiting."""

    code = "too_many_requests"
    status = 429


class Late(Busy):
    """The deadline has passed."""

    code = "deadline"


def _ending() -> Busy:
    return Busy("the server is about to end; come again in a moment", 5)


class Watcher(Protocol):
    """Is told what happens, to count it."""

    def waited(self, seconds: float) -> None: ...
    def generated(self, milliseconds: float) -> None: ...
    def rejected(self, code: str) -> None: ...


@dataclass(eq=False, kw_only=True)
class Worker:
    """A server, and what it is generating; `slots` requests at a time."""

    name: str
    slots: int
    generator: Generator | None = None
    ready: bool = False
    on_gone: Callable[[], None] = lambda: None  # it did not answer as it should
    on_stuck: Callable[[], None] = lambda: None  # it has had no room for longer than any generating takes
    running: set[QueuedRequest] = field(default_factory=set)
    batch_since: float = 0.0  # in seconds of time.monotonic(), as are the next two
    full_since: float | None = None
    rests_until: float = 0.0
    rest_s: float = FULL_AGAIN_S[0]

    def takes(self, ticket: QueuedRequest) -> bool:
        """Whether it can be sent now. What may have ended a server is sent alone, so that nobody else is
        taken along a second time."""
        suspect = bool(ticket.attempts) or any(other.attempts for other in self.running)
        room = 1 if suspect else self.slots
        rested = time.monotonic() >= self.rests_until
        return self.ready and self.generator is not None and rested and len(self.running) < room

    def was_full(self) -> float:
        """It had no room, though it should: the seconds until it is asked again."""
        now = time.monotonic()
        self.full_since = self.full_since or now
        rest = self.rest_s
        self.rests_until = now + rest
        self.rest_s = min(2 * rest, FULL_AGAIN_S[1])
        return rest

    def answered(self) -> None:
        """It had room."""
        self.full_since, self.rest_s = None, FULL_AGAIN_S[0]


@dataclass(eq=False, kw_only=True)
class QueuedRequest:
    """One visitor's wish on its way."""

    visitor: str
    inputs: Mapping[str, Any]
    came: float
    number: int
    future: asyncio.Future[BackendResult]
    tell: Callable[[int], None]  # the place, whenever it changes: so many are before it
    place: int = -1
    sent: float | None = None
    attempts: int = 0
    # Whether its generating has begun, as far as can be told from outside: an idle server begins at once,
    # who comes within moments joins, and the rest begin when something of the running batch has come back.
    begun: bool = False
    task: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> bool:
        """Whether it is still here."""
        return self.sent is None and not self.future.done()


class RequestQueue:
    """Belongs to one event loop. `close` lets what is running finish."""

    def __init__(self, *, limit: int, per_visitor: int, deadline_s: float, watcher: Watcher) -> None:
        self.workers: list[Worker] = []
        self.generates = 0
        self._limit = limit
        self._per_visitor = per_visitor
        self._deadline_s = deadline_s
        self._watcher = watcher
        self._waiting: list[QueuedRequest] = []
        self._sent: Counter[str] = Counter()  # of each visitor, at a server now
        self._served: OrderedDict[str, int] = OrderedDict()  # when a visitor's turn last came
        self._numbers = itertools.count(1)
        self._usual_s = 1.0  # a request's time at a server, averaged
        self._closed = False

    @property
    def waiting(self) -> int:
        """How many wishes have not been sent."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many are at servers."""
        return sum(len(worker.running) for worker in self.workers)

    @property
    def ready(self) -> bool:
        """Whether any server generates."""
        return not self._closed and any(worker.ready for worker in self.workers)

    def submit(
        self, visitor: str, inputs: Mapping[str, Any], tell: Callable[[int], None] = lambda place: None
    ) -> QueuedRequest:
        """Queue a wish, or send it at once. Raises TooMany or Busy, before anything is done."""
        if self._closed:
            raise self._rejected(_ending())
        own = sum(ticket.visitor == visitor for ticket in self._waiting)
        if own >= self._per_visitor:
            sentence = f"{own} of your pictures are waiting already; wait for one of them"
            raise self._rejected(TooMany(sentence, self._retry_after_s(own)))
        if len(self._waiting) >= self._limit:
            sentence = f"{len(self._waiting)} pictures are waiting, which is all that fit; come again soon"
            raise self._rejected(Busy(sentence, self._retry_after_s(len(self._waiting))))
        loop = asyncio.get_running_loop()
        ticket = QueuedRequest(
            visitor=visitor,
            inputs=inputs,
            came=time.monotonic(),
            number=next(self._numbers),
            future=loop.create_future(),
            tell=tell,
        )
        late = loop.call_later(self._deadline_s, self._expire, ticket)
        ticket.future.add_done_callback(lambda _: late.cancel())
        self._waiting.append(ticket)
        self.pump()
        return ticket

    async def result(self, ticket: QueuedRequest) -> BackendResult:
        """Wait for it; whoever is cancelled here takes the wish back. Raises a FewstepError."""
        try:
            return await asyncio.shield(ticket.future)
        except asyncio.CancelledError:
            self.cancel(ticket)
            raise

    async def generate(self, visitor: str, inputs: Mapping[str, Any]) -> BackendResult:
        """`submit` and `result`."""
        return await self.result(self.submit(visitor, inputs))

    def cancel(self, ticket: QueuedRequest) -> None:
        """Take it back, wherever it is; its result is Stopped."""
        self._settle(ticket, Stopped("a newer wish took its place"))
        if ticket.task:
            ticket.task.cancel()
        self.pump()

    def pump(self) -> None:
        """Send what can be sent; for whenever something has changed."""
        while not self._closed and self._send_next():  # each changes whose turn it is
            pass
        for place, ticket in enumerate(sorted(self._waiting, key=self._turn)):
            if ticket.place != place:
                ticket.place = place
                ticket.tell(place)

    async def close(self, grace_s: float) -> None:
        """Take no more; let those at the servers finish within `grace_s`, and turn the rest away."""
        self._closed = True
        for ticket in tuple(self._waiting):
            self._settle(ticket, _ending())
        tasks = [ticket.task for worker in self.workers for ticket in worker.running if ticket.task]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=grace_s)
            for task in late:
                task.cancel()

    def _turn(self, ticket: QueuedRequest) -> tuple[int, int, int]:
        """First who has nothing at a server; then who has gone without for longest, since the last image or
        since coming."""
        since = self._served.get(ticket.visitor, ticket.number)
        return self._sent[ticket.visitor], since, ticket.number

    def _send_next(self) -> bool:
        for ticket in sorted(self._waiting, key=self._turn):
            if takers := [worker for worker in self.workers if worker.takes(ticket)]:
                self._send(ticket, min(takers, key=lambda worker: len(worker.running)))
                return True
            if ticket.attempts:  # until a server has nothing else to do, nobody overtakes it
                return False
        return False

    def _send(self, ticket: QueuedRequest, worker: Worker) -> None:
        self._waiting.remove(ticket)
        ticket.sent = time.monotonic()
        if not any(other.begun for other in worker.running):
            worker.batch_since = ticket.sent
        ticket.begun = ticket.sent - worker.batch_since < JOIN_S
        worker.running.add(ticket)
        self._sent[ticket.visitor] += 1
        ticket.task = asyncio.create_task(self._run(ticket, worker))
        # Not within the task: one that is cancelled before it begins never runs.
        ticket.task.add_done_callback(lambda task: self._left(ticket, worker, task))

    async def _run(self, ticket: QueuedRequest, worker: Worker) -> None:
        assert worker.generator and ticket.sent
        try:
            generated = await worker.generator.generate(ticket.inputs)
        except FewstepError as error:
            worker.answered()
            self._settle(ticket, error)
            return
        self._usual_s += 0.1 * (time.monotonic() - ticket.sent - self._usual_s)
        self.generates += 1
        worker.answered()
        self._watcher.waited(ticket.sent - ticket.came)
        self._watcher.generated(generated.generate_ms)
        told = {
            "visitor": ticket.visitor[:8],
            "server": worker.name,
            "wait_ms": round(1000 * (ticket.sent - ticket.came), 1),
            "paint_ms": round(generated.generate_ms, 1),
            **{name: ticket.inputs[name] for name in TOLD if name in ticket.inputs},
        }
        logger.info("painted", extra={FIELDS: told})
        self._settle(ticket, generated)

    def _left(self, ticket: QueuedRequest, worker: Worker, task: asyncio.Task[None]) -> None:
        """It is no longer at `worker`, however that came."""
        worker.running.discard(ticket)
        self._sent[ticket.visitor] -= 1
        if not self._sent[ticket.visitor]:
            del self._sent[ticket.visitor]
        error = None if task.cancelled() else task.exception()
        if isinstance(error, BackendBusy):
            asyncio.get_running_loop().call_later(worker.was_full(), self.pump)
            if worker.full_since and time.monotonic() - worker.full_since > self._deadline_s:
                worker.on_stuck()
            self._requeue(ticket)
        elif isinstance(error, BackendUnavailable):
            logger.warning("%s did not answer: %s", worker.name, error)
            worker.on_gone()
            ticket.attempts += 1
            if ticket.attempts < MAX_ATTEMPTS:
                self._requeue(ticket)
            else:
                told = "the model broke down over this, several times; change it"
                self._settle(ticket, InternalError(told))
        else:
            if error:
                logger.error("painting failed", exc_info=error)
                self._settle(ticket, InternalError())
            if ticket.begun:
                self._had_a_turn(ticket, worker)
        self.pump()

    def _had_a_turn(self, ticket: QueuedRequest, worker: Worker) -> None:
        self._served[ticket.visitor] = next(self._numbers)
        self._served.move_to_end(ticket.visitor)
        if len(self._served) > REMEMBERED:
            self._served.popitem(last=False)
        if any(not other.begun for other in worker.running):
            worker.batch_since = time.monotonic()
            for other in worker.running:
                other.begun = True

    def _requeue(self, ticket: QueuedRequest) -> None:
        """Nothing was done for it: it has the turn that it had."""
        ticket.task, ticket.sent, ticket.begun = None, None, False
        if ticket.future.done():
            return
        if self._closed:
            self._settle(ticket, _ending())
        else:
            self._waiting.append(ticket)

    def _expire(self, ticket: QueuedRequest) -> None:
        if ticket.waiting and not self.ready:
            error = Late("the model is not there yet; ask again in a moment", 2)
        else:
            sentence = f"it was not done within {self._deadline_s:g} s; ask for less, or come again later"
            error = Late(sentence, self._retry_after_s(len(self._waiting)))
        self._settle(ticket, error)
        if ticket.task:
            ticket.task.cancel()
        self.pump()

    def _settle(self, ticket: QueuedRequest, outcome: BackendResult | FewstepError) -> None:
        if ticket in self._waiting:
            self._waiting.remove(ticket)
        if ticket.future.done():
            return
        if isinstance(outcome, BackendResult):
            ticket.future.set_result(outcome)
        else:
            ticket.future.set_exception(outcome)
            ticket.future.exception()  # its owner may have left without reading it

    def _retry_after_s(self, before: int) -> int:
        slots = sum(worker.slots for worker in self.workers if worker.ready) or 1
        return max(1, math.ceil(before / slots * self._usual_s))

    def _rejected(self, error: Busy) -> Busy:
        self._watcher.rejected(error.code)
        return error
