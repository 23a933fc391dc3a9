"""Workers behind the front: our own Cog servers, kept alive here, somebody's Cog server, or Replicate.

coglet never restarts a worker that died, goes on answering for it, and calls itself well when its event loop
has ended or its room is lost; so what it says of itself is asked, and what it does to requests is watched.
"""

import asyncio
import logging
import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from fewstep.coglet.server import CONCURRENCY, Server, free_port, running_server
from fewstep.errors import ServerFailed
from fewstep.web.backends import CogBackend, ReplicateBackend
from fewstep.web.queue import Worker

logger = logging.getLogger(__name__)

POLL_S = 1.0
SETUP_POLL_S = 0.1
SETTLE_S = 0.2  # coglet may call itself well for a moment after its worker died
SLOW_S = 5.0  # without an answer to a question for its health, nothing more is sent to it
FAILED_POLLS = 2  # each gives up after 12 s
# After a start that failed, since what failed it may last: a full disk, another's hold on the GPU.
BACKOFF_S = (1.0, 2.0, 5.0, 10.0, 30.0)
MAX_LOG = 10**7  # bytes, above which it is begun anew at a start
SETUP_TIMEOUT_S = 1800  # a large model that is compiled at setup takes minutes
REPLICATE_AT_ONCE = 8
UNKNOWN = "the server could not be started; the log says why"
# What a server that generates has no use for: the front's secrets, and a folder that it would share.
WITHHELD = ("DATABASE_URL", "OPENAI_API_KEY", "OPENAI_BASE_URL", "REPLICATE_API_TOKEN", "FEWSTEP_API_KEY",
            "FEWSTEP_OPERATOR_KEY", "FEWSTEP_OUTPUTS")  # fmt: skip


def visible_gpus(environ: Mapping[str, str]) -> list[str]:
    """What CUDA_VISIBLE_DEVICES may hold for one GPU each; without torch, which takes seconds to import."""
    if environ.get("FEWSTEP_DEVICE") == "cpu":
        return []
    named = environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [gpu for gpu in named.split(",") if gpu and gpu != "-1"]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(i) for i in range(sum(line.startswith("GPU ") for line in listed.stdout.splitlines()))]


class WorkerPool:
    """Workers, and whether generating on them costs nothing but time."""

    workers: Sequence[Worker]
    live = True

    @property
    def failure(self) -> str:
        """Why none of them can start, in one sentence; empty as long as one may."""
        return ""

    def start(self, on_change: Callable[[], None], on_restart: Callable[[], None]) -> None:
        """Begin, on the event loop that runs.

        `on_change` is called when the readiness of a worker or the failure has changed, `on_restart` for each
        replacement.
        """

    async def stop(self) -> None:
        """End what was begun; returns when nothing is left of it."""


@dataclass(eq=False, kw_only=True)
class WatchedWorker(Worker):
    """A Cog server whose health is asked again and again."""

    on_change: Callable[[], None] = lambda: None
    doubted: asyncio.Event = field(default_factory=asyncio.Event)

    def doubt(self) -> None:
        self.doubted.set()
        self.set_ready(False)  # until it has been asked

    def set_ready(self, ready: bool) -> None:
        if ready != self.ready:
            self.ready = ready
            self.on_change()

    async def next_poll(self) -> None:
        """Return when it is to be asked again: in a while, or soon when it is in doubt."""
        with suppress(TimeoutError):
            async with asyncio.timeout(POLL_S):  # wait_for may lose a cancellation that comes with the event
                await self.doubted.wait()
            await asyncio.sleep(SETTLE_S)


@dataclass(eq=False, kw_only=True)
class LocalWorker(WatchedWorker):
    """A server that we start, with the environment `environ`, and replace when it is not well."""

    environ: Mapping[str, str]
    server: Server | None = None
    failure: str = ""  # why the last start failed, in one sentence


class LocalWorkers(WorkerPool):
    """A coglet for each of `environs`, replaced with its process group whenever it is not well."""

    workers: list[LocalWorker]

    def __init__(self, environs: Sequence[Mapping[str, str]], timeout_s: float, log: Path) -> None:
        self._timeout_s = timeout_s
        self._log = log  # for what the servers say
        self._tasks: list[asyncio.Task[None]] = []
        self.workers = []
        for i, environ in enumerate(environs, 1):
            own = {name: value for name, value in environ.items() if name not in WITHHELD}
            self.workers.append(LocalWorker(name=f"worker {i}", slots=CONCURRENCY, environ=own))

    @property
    def failure(self) -> str:
        return self.workers[0].failure if all(worker.failure for worker in self.workers) else ""

    def start(self, on_change: Callable[[], None], on_restart: Callable[[], None]) -> None:
        for worker in self.workers:
            worker.on_change = on_change
            self._tasks.append(asyncio.create_task(self._keep(worker, on_restart)))

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _keep(self, worker: LocalWorker, on_restart: Callable[[], None]) -> None:
        """Start, watch, replace, until cancelled."""
        failures = 0
        while True:
            try:
                reason = await self._serve(worker)
                failures = 0
            except Exception as error:  # a full disk, too: this task must not end
                if not isinstance(error, ServerFailed):
                    logger.error("%s could not be started", worker.name, exc_info=error)
                reason = worker.failure = str(error) if isinstance(error, ServerFailed) else UNKNOWN
                failures += 1
                worker.on_change()
            logger.warning("%s is started again: %s", worker.name, reason)
            on_restart()
            if failures:
                await asyncio.sleep(BACKOFF_S[min(failures, len(BACKOFF_S)) - 1])

    async def _serve(self, worker: LocalWorker) -> str:
        """Serve until it is to be replaced, and return why. Raises what keeps it from starting."""
        environ = {"COG_SETUP_TIMEOUT": str(SETUP_TIMEOUT_S), **worker.environ}
        with _open_log(self._log) as log:
            server = running_server(port=free_port(), environ=environ, log=log)
        worker.server = server
        backend = worker.backend = CogBackend(f"http://{server.host}:{server.port}", self._timeout_s)
        end = server.kill  # nothing is waited for of what is not well, or is in the middle of its setup
        try:
            while not server.is_ready(await backend.health()):
                await asyncio.sleep(SETUP_POLL_S)
            worker.failure = ""
            worker.had_room()
            return await self._watch(worker, server, backend)
        except asyncio.CancelledError:
            if worker.ready:
                server.process.terminate()
                end = server.stop
            raise
        finally:
            worker.server = None
            worker.set_ready(False)
            await asyncio.to_thread(end)
            while worker.running:  # which learns now that it gets no answer
                await asyncio.sleep(0.01)
            await backend.close()

    async def _watch(self, worker: LocalWorker, server: Server, backend: CogBackend) -> str:
        """Return why it must be replaced, once it must."""
        failed = 0
        while True:
            worker.doubted.clear()
            slow = asyncio.get_running_loop().call_later(SLOW_S, worker.set_ready, False)
            health = await backend.health()
            slow.cancel()
            if server.process.poll() is not None:
                return f"it ended with status {server.process.returncode}"
            if worker.refuses:
                return "it has no room though nothing is there"
            if health.get("status") in ("READY", "BUSY"):
                failed = 0
                if not worker.doubted.is_set():  # since it was asked
                    worker.set_ready(True)
            else:
                worker.set_ready(False)
                failed += 1
                # No answer may be the machine's fault; what coglet says of its worker is not.
                if health or failed == FAILED_POLLS:
                    return f"its health is {health.get('status', 'not to be had')}"
            await worker.next_poll()


def _open_log(log: Path) -> IO[bytes]:
    log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if log.exists() and log.stat().st_size > MAX_LOG:
        os.truncate(log, 0)  # several servers append to it
    return log.open("ab")


class RemoteWorker(WorkerPool):
    """A Cog server that somebody else keeps."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self._backend = CogBackend(url, timeout_s)
        self._worker = WatchedWorker(name="the Cog server", slots=CONCURRENCY, backend=self._backend)
        self.workers = [self._worker]

    def start(self, on_change: Callable[[], None], on_restart: Callable[[], None]) -> None:
        self._worker.on_change = on_change
        self._task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        worker = self._worker
        while True:
            worker.doubted.clear()
            status = (await self._backend.health()).get("status")
            # One that refused is back when it has room, and not ours to replace.
            ready = status == "READY" or (status == "BUSY" and not worker.refuses)
            if not worker.doubted.is_set():
                if ready and worker.refuses:
                    worker.had_room()
                worker.set_ready(ready)
            await worker.next_poll()

    async def stop(self) -> None:
        self._task.cancel()
        await self._backend.close()


class ReplicateWorker(WorkerPool):
    """A model on Replicate: always there, and every image is billed, so that nothing is generated unasked."""

    live = False

    def __init__(self, model: str, token: str) -> None:
        backend = ReplicateBackend(model, token)
        self.workers = [Worker(name="Replicate", slots=REPLICATE_AT_ONCE, backend=backend, ready=True)]
