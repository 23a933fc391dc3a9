"""Many callers, one model: requests that arrive together share a forward pass.

One thread owns the model and is the only one to touch it, since two threads in one diffusers pipeline gave
wrong images and no error. Callers wait on an event loop; between the two lie one queue and one lock.
Batching never waits: whenever the model is free, it takes what has queued up.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from fewstep.errors import DeadlineExceeded, DeviceLost, FewstepError, InternalError, Stopped
from fewstep.request import Request

if TYPE_CHECKING:
    from fewstep.generation.pipeline import GenerationResult, Pipeline

logger = logging.getLogger(__name__)

# How many batches may go before a request that came first, because they need no change of weights.
MAX_OVERTAKEN = 4
# How long nobody has to ask before other work is done: those who type pause for less.
IDLE_S = 2.0

T = TypeVar("T")


@dataclass(eq=False, kw_only=True)
class _Waiter(Generic[T]):
    """One caller, waiting on its own event loop for what the model thread makes."""

    future: asyncio.Future[T] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    expires: float = math.inf  # in seconds of time.monotonic()
    left: bool = False  # set where the caller runs, read by the model thread

    def gone(self) -> bool:
        """Nobody will take the result. Once true it stays true; a loop that hangs cannot hide it."""
        return self.left or time.monotonic() >= self.expires or self.future.get_loop().is_closed()

    def deliver(self, outcome: T | BaseException) -> None:
        """Hand the caller a result or an error, unless nobody waits."""
        settle: Callable[[Any], None] = self.future.set_result
        if isinstance(outcome, BaseException):
            settle = self.future.set_exception
            # Each caller gets an error of its own, since whoever raises one writes its traceback into it.
            outcome = (
                type(outcome)(outcome.sentence) if isinstance(outcome, FewstepError) else InternalError()
            )
        if not self.gone():
            # The loop may close between the question and the call; then too, nobody waits.
            with suppress(RuntimeError):
                self.future.get_loop().call_soon_threadsafe(self._settle, settle, outcome)

    def _settle(self, settle: Callable[[Any], None], outcome: T | BaseException) -> None:
        if not self.future.done():
            settle(outcome)


@dataclass(eq=False, kw_only=True)
class _Pending(_Waiter["GenerationResult"]):
    request: Request
    shape_key: Hashable
    overtaken: int = 0  # batches that went first though they came later


@dataclass(eq=False, kw_only=True)
class _Call(_Waiter[T]):
    function: Callable[[], T]


class Batcher:
    """Runs a model on a thread of its own, for all waiting requests of one shape at a time.

    A request alone always goes, even when it is bigger than a pass. Who comes while the prompts of a batch
    are encoded joins it if there is room: under load, callers who were answered together ask again within
    milliseconds. A caller waits at most `deadline_s`; a batch that runs `grace_s` longer than that is held
    to be stuck.
    """

    def __init__(self, model: Pipeline | None = None, *, deadline_s: float, grace_s: float = 30.0) -> None:
        self.model = model  # may come later, loaded by `run` on the thread that owns it
        self._deadline_s = deadline_s
        self._grace_s = grace_s
        self._changed = threading.Condition()  # guards the next two
        self._queue: deque[_Waiter[Any]] = deque()
        self._closed = False
        self._lost = False  # the device: nothing will be served any more
        self.idle_work: Callable[[], bool] | None = None  # done while nobody asks, until it returns false
        self._batch_since: float | None = None
        self._weights: Hashable = None  # what the last batch left in the model
        self._thread = threading.Thread(target=self._serve, name="model", daemon=True)
        self._thread.start()

    async def submit(self, request: Request, spent_s: float = 0.0) -> GenerationResult:
        """Join the next batch of this request's shape and wait for its own result; `spent_s` of its time
        are gone already.

        Raises the FewstepError that the model gave or raised, InternalError for anything else it raised,
        DeadlineExceeded, or Stopped once the batcher is closed. A caller whose task is cancelled leaves
        the queue or its batch, and its mates do not notice.
        """
        left_s = max(0.0, self._deadline_s - spent_s)
        pending = _Pending(expires=time.monotonic() + left_s, request=request, shape_key=request.shape_key)
        return await self._result(pending, left_s)

    async def run(self, function: Callable[[], T]) -> T:
        """Call `function` on the model thread in its turn (to load, to warm up), without a deadline.

        What is queued after it runs after it. Raises as `submit` does.
        """
        return await self._result(_Call(function=function), None)

    def healthy(self) -> bool:
        """Whether a request sent now would be served: the thread lives, is not closing and not stuck, and the
        device is not lost, which it never is again."""
        since = self._batch_since
        stuck = since is not None and time.monotonic() - since > self._deadline_s + self._grace_s
        return self._thread.is_alive() and not (self._closed or self._lost or stuck)

    async def close(self) -> None:
        """Take no more requests, finish those that wait, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        await asyncio.to_thread(self._thread.join, self._deadline_s + self._grace_s)
        if self._thread.is_alive():
            logger.warning("the model thread is still busy and was left behind")

    async def _result(self, work: _Waiter[T], timeout_s: float | None) -> T:
        with self._changed:
            if self._closed:
                raise Stopped("the server is shutting down and takes no more requests; send it again later")
            self._queue.append(work)
            self._changed.notify()
        try:
            done, _ = await asyncio.wait({work.future}, timeout=timeout_s)
            if not done:
                raise DeadlineExceeded(
                    f"the request was not done within {self._deadline_s:g} s; send it again when fewer "
                    "others wait, or ask for a smaller size, fewer steps or fewer outputs"
                )
            return work.future.result()
        finally:
            with self._changed:
                work.left = True
                with suppress(ValueError):  # not in the queue: its turn has come
                    self._queue.remove(work)
            # Done or not: asyncio then does not report an error that its caller left without reading.
            work.future.cancel()

    # All that follows runs on the model thread.

    def _serve(self) -> None:
        while self._serve_next():
            pass

    def _serve_next(self) -> bool:
        """One turn; false at the end. A function, so that no result stays alive while the next is awaited."""
        with self._changed:
            idle_s = IDLE_S if self.idle_work else None
            self._changed.wait_for(lambda: self._queue or self._closed, idle_s)
            work = self._take_next() if self._queue else None
            if work is None and self._closed:
                return False
        batch: list[Any] = [work] if work else []
        try:
            if self._lost and work:
                raise DeviceLost("the GPU failed; the server has to be started anew")
            if work is None:
                idle_work, self.idle_work = self.idle_work, None  # nor again after an error
                if idle_work and idle_work():
                    self.idle_work = idle_work
            elif work.gone():
                pass
            elif isinstance(work, _Call):
                work.deliver(work.function())
            else:
                self._run_batch(batch)
        except BaseException as error:  # SystemExit too: whatever the model does, this thread lives on
            self._lost = self._lost or isinstance(error, DeviceLost)
            if not isinstance(error, FewstepError):
                logger.error("the model thread's work failed; the thread goes on", exc_info=error)
            for waiter in batch:
                waiter.deliver(error)
        finally:
            self._batch_since = None
        return True

    def _take_next(self) -> _Waiter[Any]:
        """The first of the queue, or one behind it for which the weights need not change; none waits for
        ever."""
        head = self._queue[0]
        if isinstance(head, _Pending) and head.overtaken < MAX_OVERTAKEN:
            for work in self._queue:
                if not isinstance(work, _Pending):
                    break
                if work.request.weights_key == self._weights:
                    head.overtaken += work is not head
                    self._queue.remove(work)
                    return work
        return self._queue.popleft()

    def _run_batch(self, batch: list[_Pending]) -> None:
        """Generate the head of `batch` with the mates that join it. Raises whatever the model does."""
        head = batch[0].request
        self._batch_since = time.monotonic()
        self._weights = head.weights_key
        if self.model is None:
            raise RuntimeError("a request came before the model")
        limit = self.model.max_images(head)
        encoded = [self.model.encode(head)]
        while mates := self._take_mates(batch, limit):
            batch += mates
            encoded += [self.model.encode(mate.request) for mate in mates]
        results = self.model.generate(encoded, lambda: all(pending.gone() for pending in batch))
        if len(results) != len(batch):
            raise RuntimeError(f"generate made {len(results)} results of {len(batch)} requests")
        for pending, result in zip(batch, results, strict=True):
            pending.deliver(result)

    def _take_mates(self, batch: Sequence[_Pending], limit: int) -> list[_Pending]:
        """Those of the head's shape, in order, until one does not fit; none from behind a call of `run`."""
        mates: list[_Pending] = []
        room = limit - sum(pending.request.num_outputs for pending in batch)
        with self._changed:
            for work in tuple(self._queue):
                if not isinstance(work, _Pending):
                    break
                if work.shape_key != batch[0].shape_key or work.gone():
                    continue
                if (images := work.request.num_outputs) > room:
                    break
                room -= images
                mates.append(work)
                self._queue.remove(work)
        return mates
