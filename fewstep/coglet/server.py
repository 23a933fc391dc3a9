"""coglet, the server inside every Cog container, as our scripts and tests start it on a bare machine."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = Path(__file__).with_name("openapi_schema.json")  # of predict.py and train.py, as Cog makes it
CONCURRENCY = 8  # as @cog.concurrent says in predict.py; the Cog CLI reads it there, coglet does not
# Fixed within coglet: neither TMPDIR nor an argument moves it.
COGLET_ROOT = Path("/tmp/coglet/predictions")
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DIFFUSERS_DISABLE_REMOTE_CODE": "1"}
POLL_S = 0.05
# coglet answers /health-check late while the model holds the interpreter; it gives up after 10 s itself.
HEALTH_TIMEOUT_S = 12.0
UNHEALTHY_POLLS = 20
STOP_TIMEOUT_S = 25.0
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CODE_AND_SENTENCE = re.compile(r"\[[a-z_]+\] .*", re.DOTALL)


class ServerFailed(Exception):
    """The server did not come up; `str()` is the `[code] sentence` of setup() where there is one."""


class Server:
    """A coglet process in a process group of its own, and the requests that can be put to it."""

    def __init__(self, process: subprocess.Popen[bytes], host: str, port: int) -> None:
        self.process = process
        self.host = host
        self.port = port

    def wait_ready(self) -> None:
        """Return once predictions are served; raise ServerFailed when they never will be."""
        unhealthy = 0
        while True:
            if self.process.poll() is not None:
                raise ServerFailed(
                    f"the server ended with status {self.process.returncode} before it was ready"
                )
            health = self.health()
            if health.get("status") in ("READY", "BUSY"):
                return
            if health.get("status") == "SETUP_FAILED":
                raise ServerFailed(code_and_sentence((health.get("setup") or {}).get("logs", "")))
            unhealthy = unhealthy + 1 if health.get("status") in ("UNHEALTHY", "DEFUNCT") else 0
            if unhealthy == UNHEALTHY_POLLS:  # its worker died before anybody saw it ready
                raise ServerFailed("the server broke down before it was ready")
            time.sleep(POLL_S)

    def health(self) -> dict[str, Any]:
        """What coglet says of itself; empty when nobody listens, or nothing comes within 12 s."""
        try:
            _, health = self._ask("GET", "/health-check", None, HEALTH_TIMEOUT_S)
        except (OSError, http.client.HTTPException, ValueError):  # not listening yet, or no longer
            return {}
        return health if isinstance(health, dict) else {}

    def post(self, path: str, body: object, timeout_s: float | None = None) -> tuple[int, Any]:
        """The status and the answer: parsed when it is JSON, otherwise text."""
        return self._ask("POST", path, json.dumps(body), timeout_s)

    def stop(self) -> None:
        """End the server and its worker: kindly at first, so that what is running is still answered."""
        try:
            self.process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_TIMEOUT_S)
            # The worker outlives the server by the moment in which it removes its files.
            end = time.monotonic() + 1.0
            while time.monotonic() < end and self._group_is_alive():
                time.sleep(0.01)
        finally:  # also when a second Ctrl-C says that this takes too long
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _group_is_alive(self) -> bool:
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def _ask(self, method: str, path: str, body: str | None, timeout_s: float | None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=timeout_s)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        is_json = "json" in (response.getheader("Content-Type") or "")
        return response.status, json.loads(text) if is_json else text.decode(errors="replace")


@contextmanager
def running_server(
    *,
    port: int,
    host: str = "127.0.0.1",
    log: IO[bytes] | None = None,
    environ: Mapping[str, str],
    root: Path = ROOT,
    mode: str = "predict",
) -> Iterator[Server]:
    """Start coglet with the Predictor of `root`, or with its train() where `mode` is "train", and stop it at
    the end; it logs to `log`, or to our stderr.

    Raises ServerFailed when the port is taken. The server is not ready yet: see `Server.wait_ready`.
    """
    require_free(host, port, "set PORT to another")
    if root == ROOT:  # the benchmark's predictors have a schema of their own there
        _write_schema(root / ".cog" / SCHEMA.name)
    server = None
    try:
        with _interrupts_held():
            process = subprocess.Popen(
                [sys.executable, "-m", "cog.server.http", "--host", host, "--x-mode", mode],
                cwd=root,
                env=_environment(environ, port, CONCURRENCY if mode == "predict" else 1),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C reaches us alone, and the worker can be ended with it
            )
            server = Server(process, "127.0.0.1" if host == "0.0.0.0" else host, port)
        yield server
    finally:
        if server:
            server.stop()


def _write_schema(target: Path) -> None:
    """Write it in one step, so that a server that starts meanwhile reads all of it."""
    schema = SCHEMA.read_bytes()
    if not target.exists() or target.read_bytes() != schema:
        target.parent.mkdir(exist_ok=True)
        unfinished = target.with_name(f"{uuid.uuid4()}.part")
        unfinished.write_bytes(schema)
        unfinished.replace(target)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Put off interruptions: within Popen, one would leave behind a server that nobody knows of."""
    if threading.current_thread() is not threading.main_thread():  # which alone is interrupted
        yield
        return
    came: list[int] = []
    handlers = {number: signal.signal(number, lambda number, _: came.append(number)) for number in INTERRUPTS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)


def end_as_by_ctrl_c() -> None:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt, so that whatever ends a script ends its server too."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for number in INTERRUPTS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, interrupt)


def free_port() -> int:
    """A loopback port that nobody listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def code_and_sentence(text: str) -> str:
    """`[code] sentence` out of what coglet writes around it; the whole text when there is none."""
    found = CODE_AND_SENTENCE.search(text)
    return found.group() if found else text


def require_free(host: str, port: int, fix: str) -> None:
    """Raise ServerFailed when the port is taken, or not to be had."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            reason = error.strerror
            raise ServerFailed(f"port {port} of {host} cannot be had ({reason}); {fix}") from None


def _environment(environ: Mapping[str, str], port: int, concurrency: int) -> dict[str, str]:
    return {
        **OFFLINE,
        "FEWSTEP_COGLET_ROOT": str(COGLET_ROOT),
        "FEWSTEP_MODEL": "miniature",
        "LOG_FORMAT": "console",
        **environ,
        # coglet starts its worker as plain `python`.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environ.get('PATH', os.defpath)}",
        "COG_PREDICT_TYPE_STUB": "predict.py:Predictor",
        "COG_TRAIN_TYPE_STUB": "train.py:train",
        "COG_MAX_CONCURRENCY": str(concurrency),
        "PORT": str(port),
    }
