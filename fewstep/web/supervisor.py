"""Keeps Cog servers alive: each with its worker in a process group, replaced as a whole when it is not well.

coglet never restarts a worker that died, and goes on answering for it (and a worker whose event loop ended
still counts as ready), so that what it says of itself is asked, and what it does to requests is watched.
"""

from __future__ import annotations

import logging
import os
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from signal import SIGKILL
from typing import IO

from fewstep.coglet.server import ROOT, Server, ServerFailed, free_port, running_server

logger = logging.getLogger(__name__)

POLL_S = 1.0
SETTLE_S = 0.2  # coglet may call itself well for a moment after its worker died
UNKNOWN = "the server could not be started; the log says why"
OUTPUTS = "fewstep-outputs-"
SLOW_S = 5.0  # without an answer to a question for its health, nothing more is sent to it
FAILED_POLLS = 2  # each gives up after 12 s
# After a start that failed, since what failed it may last: a full disk, another's hold on the GPU.
BACKOFF_S = (1.0, 2.0, 5.0, 10.0, 30.0)
MAX_LOG = 10**7  # bytes, above which it is begun anew at a start
SETUP_TIMEOUT_S = 1800  # a large model that is compiled at setup takes minutes
# Of the front door; a server that generates has no use for them.
SECRETS = ("DATABASE_URL", "OPENAI_API_KEY", "OPENAI_BASE_URL", "REPLICATE_API_TOKEN", "FEWSTEP_API_KEY",
           "FEWSTEP_OPERATOR_KEY")  # fmt: skip


def visible_gpus(environ: Mapping[str, str]) -> list[str]:
    """What CUDA_VISIBLE_DEVICES may hold for one GPU each; without torch, which takes seconds to import."""
    if environ.get("FEWSTEP_DEVICE") == "cpu":
        return []
    named = environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [one for one in named.split(",") if one and one != "-1"]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [
        str(i) for i, _ in enumerate(line for line in listed.stdout.splitlines() if line.startswith("GPU "))
    ]


class Supervisor(threading.Thread):
    """One server of `root`, for ever. `on_change(self)` is called, on this thread, when `ready` or `failure`
    has changed; `on_restart` whenever the server is replaced."""

    def __init__(
        self,
        name: str,
        *,
        environ: Mapping[str, str],
        on_change: Callable[[Supervisor], None],
        on_restart: Callable[[], None] = lambda: None,
        root: Path = ROOT,
        log: Path | None = None,
    ) -> None:
        super().__init__(name=name, daemon=True)
        self.url = ""
        self.ready = False
        self.failure = ""  # why the last start failed, in one sentence
        self._environ = {key: value for key, value in environ.items() if key not in SECRETS}
        self._on_change = on_change
        self._on_restart = on_restart
        self._root = root
        self._log = log  # for what the server says; on our stderr without one
        self._server: Server | None = None
        self._lock = threading.Lock()  # guards what stop() and the thread both touch
        self._doubted = threading.Event()
        self._condemned = threading.Event()
        self._stopping = threading.Event()

    def doubt(self) -> None:
        """It did not answer as it should: ask for its health now, from any thread."""
        self._doubted.set()

    def condemn(self) -> None:
        """It is to be replaced, whatever it says of itself."""
        self._condemned.set()
        self._doubted.set()

    def stop(self) -> None:
        """End the server and this thread; returns when both have ended."""
        self._stopping.set()
        self._doubted.set()
        with self._lock:
            if self._server and not self.ready:  # it may be long in setup
                with suppress(ProcessLookupError):
                    os.killpg(self._server.process.pid, SIGKILL)
        self.join()

    def run(self) -> None:
        """Start, watch, replace."""
        failures = 0
        while not self._stopping.is_set():
            try:
                reason = self._serve()
                failures = 0
            except Exception as error:  # a full disk, too: this thread must not end
                if not isinstance(error, ServerFailed):
                    logger.error("%s could not be started", self.name, exc_info=error)
                reason = str(error) if isinstance(error, ServerFailed) else UNKNOWN
                failures += 1
                self._change(ready=False, failure=reason)
            if self._stopping.is_set():
                break
            logger.warning("%s is started again: %s", self.name, reason)
            self._on_restart()
            if failures:
                self._stopping.wait(BACKOFF_S[min(failures, len(BACKOFF_S)) - 1])

    def _serve(self) -> str:
        """Until it is to be replaced, for the reason that is returned. Raises what keeps it from starting."""
        port = free_port()
        temporary = self._environ.get("TMPDIR")
        environ = {
            "COG_SETUP_TIMEOUT": str(SETUP_TIMEOUT_S),
            **self._environ,
        }
        with (
            # Two servers may not share one.
            tempfile.TemporaryDirectory(prefix=OUTPUTS, dir=temporary, ignore_cleanup_errors=True) as folder,
            _opened(self._log) as log,
            running_server(
                port=port, environ={**environ, "FEWSTEP_OUTPUTS": folder}, root=self._root, log=log
            ) as server,
        ):
            with self._lock:
                self._server = server
            self._condemned.clear()
            try:
                if self._stopping.is_set():
                    return "it is to end"
                server.wait_ready()
                self.url = f"http://{server.host}:{port}"
                self._change(ready=True)
                return self._watch(server)
            finally:
                with self._lock:
                    self._server = None
                self._change(ready=False)
                if not self._stopping.is_set():  # nothing is waited for of what is not well
                    with suppress(ProcessLookupError):
                        os.killpg(server.process.pid, SIGKILL)

    def _watch(self, server: Server) -> str:
        """Why it must be replaced."""
        poll = _Poll(server)
        failed = 0
        doubted = False
        while not self._stopping.is_set():
            if server.process.poll() is not None:
                return f"it ended with status {server.process.returncode}"
            health = poll.answer(timeout_s=SLOW_S)
            if health is None:  # not yet
                self._change(ready=False)
                continue
            if health.get("status") not in ("READY", "BUSY"):
                self._change(ready=False)
                failed += 1
                # No answer may be the machine's fault; what coglet says of its worker is not.
                if health or failed == FAILED_POLLS:
                    return f"its health is {health.get('status', 'not to be had')}"
            elif self._condemned.is_set():
                return "it has taken no requests for too long"
            elif self._doubted.is_set():  # since it was asked
                doubted = True
                self._doubted.clear()
                self._stopping.wait(SETTLE_S)
            else:
                failed = 0
                self._change(ready=True, anew=doubted)
                doubted = self._doubted.wait(POLL_S)
                self._doubted.clear()
            poll.again()
        return "it is to end"

    def _change(self, *, ready: bool, failure: str = "", anew: bool = False) -> None:
        if anew or (ready, failure) != (self.ready, self.failure):
            self.ready, self.failure = ready, failure
            self._on_change(self)


def _opened(log: Path | None) -> AbstractContextManager[IO[bytes] | None]:
    if log is None:
        return nullcontext()
    log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if log.exists() and log.stat().st_size > MAX_LOG:
        os.truncate(log, 0)  # several servers append to it
    return log.open("ab")


class _Poll:
    """One question at a time for a server's health, which may take coglet 10 s to answer."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.again()

    def again(self) -> None:
        self._answer: dict[str, object] | None = None
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def answer(self, timeout_s: float) -> dict[str, object] | None:
        """None as long as it is out; empty when there was none."""
        self._thread.join(timeout_s)
        return self._answer

    def _ask(self) -> None:
        try:
            self._answer = self._server.health()
        except Exception:
            self._answer = {}
