"""The servers behind the front door: our own, kept alive here, somebody's Cog server, or Replicate."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from fewstep.coglet.server import CONCURRENCY, ROOT
from fewstep.web.backends import CogBackend, ReplicateBackend
from fewstep.web.queue import Worker
from fewstep.web.supervisor import Supervisor

POLL_S = 2.0
REPLICATE_AT_ONCE = 8


class WorkerPool(Protocol):
    """Has `workers`, says when their readiness changes, and whether generating costs nothing but time."""

    workers: list[Worker]
    live: bool

    @property
    def failure(self) -> str:
        """Why none of them can start, in one sentence; empty as long as one may."""
        ...

    def start(self, on_change: Callable[[], None], on_restart: Callable[[], None]) -> None: ...
    async def stop(self) -> None: ...


class LocalWorkers:
    """A coglet for each of `environs`, restarted whenever it is not well."""

    live = True

    def __init__(
        self,
        environs: Sequence[Mapping[str, str]],
        timeout_s: float,
        *,
        root: Path = ROOT,
        log: Path | None = None,
    ) -> None:
        self._timeout_s = timeout_s
        self._log = log
        self._root = root
        self._environs = environs
        self.workers = [Worker(name=f"painter {i}", slots=CONCURRENCY) for i, _ in enumerate(environs, 1)]
        self.supervisors: list[Supervisor] = []

    @property
    def failure(self) -> str:
        failures = [supervisor.failure for supervisor in self.supervisors]
        return failures[0] if failures and all(failures) else ""

    def start(self, on_change: Callable[[], None], on_restart: Callable[[], None]) -> None:
        """On the loop that runs, from which everything is called back."""
        loop = asyncio.get_running_loop()

        def restarted() -> None:
            loop.call_soon_threadsafe(on_restart)

        for worker, environ in zip(self.workers, self._environs, strict=True):

            def changed(supervisor: Supervisor, worker: Worker = worker) -> None:
                ready, url = supervisor.ready, supervisor.url
                loop.call_soon_threadsafe(self._set, worker, ready, url, on_change)

            supervisor = Supervisor(
                worker.name,
                environ=environ,
                on_change=changed,
                on_restart=restarted,
                root=self._root,
                log=self._log,
            )
            worker.on_gone = lambda worker=worker, supervisor=supervisor: self._doubt(  # type: ignore[misc]
                worker, supervisor, on_change
            )
            worker.on_stuck = supervisor.condemn
            self.supervisors.append(supervisor)
            supervisor.start()

    async def stop(self) -> None:
        """End them all at once."""
        await asyncio.gather(*(asyncio.to_thread(one.stop) for one in self.supervisors))
        for worker in self.workers:
            if isinstance(worker.generator, CogBackend):
                await worker.generator.close()

    def _set(self, worker: Worker, ready: bool, url: str, on_change: Callable[[], None]) -> None:
        if ready and (not isinstance(worker.generator, CogBackend) or worker.generator.url != url):
            worker.generator = CogBackend(url, self._timeout_s)
            worker.answered()
        worker.ready = ready
        on_change()

    def _doubt(self, worker: Worker, supervisor: Supervisor, on_change: Callable[[], None]) -> None:
        worker.ready = False  # until its supervisor has asked it
        supervisor.doubt()
        on_change()


class RemoteWorker:
    """A Cog server that somebody else keeps."""

    live = True
    failure = ""

    def __init__(self, url: str, timeout_s: float) -> None:
        self._generator = CogBackend(url, timeout_s)
        self.workers = [Worker(name="the Cog server", slots=CONCURRENCY, generator=self._generator)]
        self._task: asyncio.Task[None] | None = None
        self._doubted = asyncio.Event()

    def start(self, on_change: Callable[[], None], on_restart: Callable[[], None]) -> None:
        """Ask it again and again whether it is ready."""
        [worker] = self.workers

        def doubt() -> None:
            worker.ready = False
            self._doubted.set()
            on_change()

        async def ask() -> None:
            while True:
                self._doubted.clear()
                ready = await self._generator.is_ready()
                if ready != worker.ready and not self._doubted.is_set():
                    worker.ready = ready
                    on_change()
                try:
                    await asyncio.wait_for(self._doubted.wait(), POLL_S)
                    await asyncio.sleep(0.2)  # it may say so for a moment after it broke down
                except TimeoutError:
                    pass

        worker.on_gone = doubt
        self._task = asyncio.create_task(ask())

    async def stop(self) -> None:
        """Ask no more."""
        if self._task:
            self._task.cancel()
        await self._generator.close()


class ReplicateWorker:
    """A model on Replicate: always there, and every image is billed, so that nothing is generated unasked."""

    live = False
    failure = ""

    def __init__(self, model: str, token: str) -> None:
        generator = ReplicateBackend(model, token)
        self.workers = [Worker(name="Replicate", slots=REPLICATE_AT_ONCE, generator=generator, ready=True)]

    def start(self, on_change: Callable[[], None], on_restart: Callable[[], None]) -> None:
        """There is nothing to start."""

    async def stop(self) -> None:
        """Nor to stop."""
