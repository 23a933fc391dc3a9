"""Whose request is generated next: a bounded queue before one or many servers, fair to every client.

A server that batches gets as many requests at once as it takes; the rest wait here, where their position can
be told, and where a prompt can still be replaced by a newer one.
"""

import asyncio
import itertools
import logging
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fewstep.errors import Busy, DeadlineExceeded, FewstepError, InternalError, Stopped, TooMany
from fewstep.web.backends import Backend, BackendBusy, BackendResult, BackendUnavailable
from fewstep.web.monitoring import FIELDS, Metrics

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3  # a request may itself be what ends a server
# coglet has room for a caller again only a moment after its answer; one that others use too, later.
FULL_AGAIN_S = (0.01, 1.0)
REFUSING_S = 2.0  # of having no room while nothing of ours is there, after which it is not ready
LOGGED = ("width", "height", "steps", "num_outputs")  # of the inputs
REMEMBERED = 4096  # clients, of whom it is known when they last had a turn


@dataclass(eq=False)
class QueuedRequest:
    """One client's request on its way; it counts as running from when it is sent until its answer comes."""

    client: str
    inputs: Mapping[str, Any]
    tell: Callable[[int], None]  # its position, whenever it changes: so many are before it
    number: int
    future: asyncio.Future[BackendResult]
    came: float = field(default_factory=time.monotonic)
    position: int = -1
    sent: float | None = None
    attempts: int = 0
    task: asyncio.Task[BackendResult] | None = None

    @property
    def waiting(self) -> bool:
        """Whether it is still here."""
        return self.sent is None and not self.future.done()


@dataclass(eq=False, kw_only=True)
class Worker:
    """A server, and what is at it: at most `slots` requests at a time."""

    name: str
    slots: int
    backend: Backend | None = None
    ready: bool = False
    running: set[QueuedRequest] = field(default_factory=set)
    # Since when it has refused everything though nothing of ours was there, in seconds of time.monotonic().
    refused_since: float | None = None
    resting: asyncio.TimerHandle | None = None  # it had no room, and is not asked until this has run
    rest_s: float = FULL_AGAIN_S[0]

    @property
    def refuses(self) -> bool:
        """Whether it has lost its room, as coglet does for good when it cannot make a folder."""
        return self.refused_since is not None and time.monotonic() - self.refused_since > REFUSING_S

    def takes(self, request: QueuedRequest) -> bool:
        """Whether it can be sent now. What may have ended a server is sent alone, so that nobody else is
        taken along a second time."""
        suspect = bool(request.attempts) or any(other.attempts for other in self.running)
        room = 1 if suspect else self.slots
        return self.ready and self.backend is not None and not self.resting and len(self.running) < room

    def doubt(self) -> None:
        """Learn that it did not answer as it should, or refuses; who watches it asks for its health."""

    def was_full(self, ask_again: Callable[[], None]) -> None:
        """Learn that it had no room, though it should; call `ask_again` in a while."""
        if not self.running:
            self.refused_since = self.refused_since or time.monotonic()

        def rested() -> None:
            self.resting = None
            if self.running:  # which it has taken, then
                self.refused_since = None
            ask_again()

        if not self.resting:
            self.resting = asyncio.get_running_loop().call_later(self.rest_s, rested)
            self.rest_s = min(2 * self.rest_s, FULL_AGAIN_S[1])

    def had_room(self) -> None:
        """Learn that it took a request."""
        self.refused_since, self.rest_s = None, FULL_AGAIN_S[0]


@dataclass(eq=False, kw_only=True)
class RequestQueue:
    """Queue on one event loop. `close` lets what is running finish.

    A client's turn ends with an answer; a request that no server took, or that was lost, costs none. Nor does
    one that its client takes back, but only once: whoever goes on doing so would else come first for ever.
    """

    limit: int  # of requests that wait
    per_client: int
    deadline_s: float
    watcher: Metrics
    workers: Sequence[Worker] = ()
    generates: int = 0  # since the start
    _waiting: list[QueuedRequest] = field(default_factory=list)
    _sent: Counter[str] = field(default_factory=Counter)  # of each client, at a server now
    # When a client's turn last ended, and whether it has taken one back since.
    _turns: OrderedDict[str, tuple[int, bool]] = field(default_factory=OrderedDict)
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _usual_s: float = 1.0  # a request's time at a server, averaged
    _closed: bool = False

    @property
    def waiting(self) -> int:
        """How many requests have not been sent."""
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
        self, client: str, inputs: Mapping[str, Any], tell: Callable[[int], None] = lambda position: None
    ) -> QueuedRequest:
        """Queue a request, or send it at once. Raises TooMany or Busy, before anything is done."""
        if self._closed:
            raise self._rejected(_ending())
        own = sum(request.client == client for request in self._waiting)
        if own >= self.per_client:
            sentence = f"{own} of your pictures are waiting already; wait for one of them"
            raise self._rejected(TooMany(sentence, self._retry_after_s(own)))
        if len(self._waiting) >= self.limit:
            sentence = f"{len(self._waiting)} pictures are waiting, which is all that fit; come again soon"
            raise self._rejected(Busy(sentence, self._retry_after_s(len(self._waiting))))
        loop = asyncio.get_running_loop()
        request = QueuedRequest(client, inputs, tell, next(self._numbers), loop.create_future())
        late = loop.call_later(self.deadline_s, self._expire, request)
        request.future.add_done_callback(lambda _: late.cancel())
        self._waiting.append(request)
        self.pump()
        return request

    async def result(self, request: QueuedRequest) -> BackendResult:
        """Wait for it; whoever is cancelled here takes the request back. Raises a FewstepError."""
        try:
            return await asyncio.shield(request.future)
        except asyncio.CancelledError:
            self.cancel(request)
            raise

    def cancel(self, request: QueuedRequest, reason: FewstepError | None = None) -> None:
        """Take it back, wherever it is; its result is `reason`, or else Stopped."""
        self._settle(request, reason or Stopped("a newer request took its place"))
        if request.task:
            request.task.cancel()
        self.pump()

    def pump(self) -> None:
        """Send what can be sent; for whenever something has changed."""
        while not self._closed and self._send_next():  # each changes whose turn it is
            pass
        for position, request in enumerate(sorted(self._waiting, key=self._turn)):
            if request.position != position:
                request.position = position
                request.tell(position)

    async def close(self, grace_s: float) -> None:
        """Take no more; let those at the servers finish within `grace_s`, and turn the rest away."""
        self._closed = True
        for request in tuple(self._waiting):
            self._settle(request, _ending())
        tasks = [request.task for worker in self.workers for request in worker.running if request.task]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=grace_s)
            for task in late:
                task.cancel()

    def _turn(self, request: QueuedRequest) -> tuple[int, int, int]:
        """First who has nothing at a server; then who has gone without for longest, since the last turn or
        since coming."""
        since, _ = self._turns.get(request.client, (request.number, False))
        return self._sent[request.client], since, request.number

    def _send_next(self) -> bool:
        for request in sorted(self._waiting, key=self._turn):
            if takers := [worker for worker in self.workers if worker.takes(request)]:
                self._send(request, min(takers, key=lambda worker: len(worker.running)))
                return True
            if request.attempts:  # until a server has nothing else to do, nobody overtakes it
                return False
        return False

    def _send(self, request: QueuedRequest, worker: Worker) -> None:
        assert worker.backend
        self._waiting.remove(request)
        request.sent = time.monotonic()
        worker.running.add(request)
        self._sent[request.client] += 1
        request.task = asyncio.ensure_future(worker.backend.generate(request.inputs))
        # Not within the task: one that is cancelled before it begins never runs.
        request.task.add_done_callback(lambda task: self._left(request, worker, task))

    def _left(self, request: QueuedRequest, worker: Worker, task: asyncio.Task[BackendResult]) -> None:
        """Note that it is no longer at `worker`, however that came."""
        worker.running.discard(request)
        self._sent[request.client] -= 1
        if not self._sent[request.client]:
            del self._sent[request.client]
        error = None if task.cancelled() else task.exception()
        if isinstance(error, BackendBusy):
            worker.was_full(self.pump)
            if worker.refuses:
                worker.doubt()
        else:
            worker.had_room()
        if isinstance(error, BackendUnavailable):
            logger.warning("%s did not answer: %s", worker.name, error)
            worker.doubt()
            request.attempts += 1
            if request.attempts == MAX_ATTEMPTS:
                error = InternalError("the model broke down over this, several times; change it")
        if isinstance(error, BackendBusy | BackendUnavailable):
            self._requeue(request)
        else:
            self._count_turn(request, answered=not task.cancelled())
            if error is None and not task.cancelled():
                self._deliver(request, worker, task.result())
            elif isinstance(error, FewstepError):
                self._settle(request, error)
            elif error:
                logger.error("generating failed", exc_info=error)
                self._settle(request, InternalError())
        self.pump()

    def _count_turn(self, request: QueuedRequest, *, answered: bool) -> None:
        since, took_back = self._turns.get(request.client, (request.number, False))
        ends = answered or took_back
        self._turns[request.client] = (next(self._numbers), False) if ends else (since, True)
        self._turns.move_to_end(request.client)
        if len(self._turns) > REMEMBERED:
            self._turns.popitem(last=False)

    def _deliver(self, request: QueuedRequest, worker: Worker, result: BackendResult) -> None:
        assert request.sent
        self._usual_s += 0.1 * (time.monotonic() - request.sent - self._usual_s)
        self.generates += 1
        self.watcher.wait.observe(request.sent - request.came)
        self.watcher.generation.observe(result.generate_ms / 1000)
        fields = {
            "visitor": request.client[:8],
            "server": worker.name,
            "wait_ms": round(1000 * (request.sent - request.came), 1),
            "paint_ms": round(result.generate_ms, 1),
            **{name: request.inputs[name] for name in LOGGED if name in request.inputs},
        }
        logger.info("painted", extra={FIELDS: fields})
        self._settle(request, result)

    def _requeue(self, request: QueuedRequest) -> None:
        """Put it back with the turn that it had, since nothing was done for it."""
        request.task, request.sent = None, None
        if request.future.done():
            return
        if self._closed:
            self._settle(request, _ending())
        else:
            self._waiting.append(request)

    def _expire(self, request: QueuedRequest) -> None:
        if request.waiting and not self.ready:
            error = DeadlineExceeded("the model is not there yet; ask again in a moment", 2)
        else:
            sentence = f"it was not done within {self.deadline_s:g} s; ask for less, or come again later"
            error = DeadlineExceeded(sentence, self._retry_after_s(len(self._waiting)))
        self.cancel(request, error)

    def _settle(self, request: QueuedRequest, outcome: BackendResult | FewstepError) -> None:
        if request in self._waiting:
            self._waiting.remove(request)
        if request.future.done():
            return
        if isinstance(outcome, BackendResult):
            request.future.set_result(outcome)
        else:
            request.future.set_exception(outcome)
            request.future.exception()  # its owner may have left without reading it

    def _retry_after_s(self, before: int) -> int:
        slots = sum(worker.slots for worker in self.workers if worker.ready) or 1
        return max(1, math.ceil(before / slots * self._usual_s))

    def _rejected(self, error: Busy) -> Busy:
        self.watcher.rejections.labels(error.code).inc()
        return error


def _ending() -> Busy:
    return Busy("the server is about to end; come again in a moment", 5)
