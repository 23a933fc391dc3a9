"""coglet, the server inside every Cog container, as our scripts and tests start it on a bare machine.

It dies with the process that started it, however that ends, and its folder says by a lock whether that lives.
"""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fewstep.errors import ServerFailed
from fewstep.images.outputs import is_abandoned, try_lock

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = Path(__file__).with_name("openapi_schema.json")  # of predict.py and train.py, as Cog makes it
# As @cog.concurrent says in predict.py, and as Cog then sets it for trainings too; coglet does not read it.
CONCURRENCY = 8
# Fixed within coglet: neither TMPDIR nor an argument moves it.
COGLET_ROOT = Path("/tmp/coglet/predictions")
OUTPUTS = "fewstep-outputs-"  # begins the name of each server's own folder
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DIFFUSERS_DISABLE_REMOTE_CODE": "1"}
# Becomes the server, and leaves a watcher in its process group, which reads a pipe that only our process
# holds: a line says that all is over, and the pipe's end that we are gone, so that the group has to go too.
# The watcher keeps no output open, since whoever reads that waits for its end.
WATCHED = 'exec 3<&0; (read -r _ <&3 || kill -KILL 0) >/dev/null 2>&1 & exec "$@" 3<&- </dev/null'
# coglet answers /health-check late while the model holds the interpreter; it gives up after 10 s itself.
HEALTH_TIMEOUT_S = 12.0
UNHEALTHY_POLLS = 20
STOP_TIMEOUT_S = 25.0
CODE_AND_SENTENCE = re.compile(r"\[[a-z_]+\] .*", re.DOTALL)


@dataclass(eq=False)
class Server(AbstractContextManager["Server"]):
    """A coglet process in a process group of its own, and the requests that can be put to it; as a context
    manager it stops at the end."""

    process: subprocess.Popen[bytes]
    host: str
    port: int
    _files: ExitStack  # closed when the server has ended
    _unhealthy: int = 0

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait_ready(self) -> None:
        """Return once predictions are served; raise ServerFailed when they never will be."""
        while not self.is_ready(self.health()):
            time.sleep(0.05)

    def is_ready(self, health: Mapping[str, Any]) -> bool:
        """Whether it serves, by what it last said of itself; raise ServerFailed when it never will."""
        status = health.get("status")
        if self.process.poll() is not None:
            raise ServerFailed(f"the server ended with status {self.process.returncode} before it was ready")
        if status == "SETUP_FAILED":
            raise ServerFailed(code_and_sentence((health.get("setup") or {}).get("logs", "")))
        self._unhealthy = self._unhealthy + 1 if status in ("UNHEALTHY", "DEFUNCT") else 0
        if self._unhealthy == UNHEALTHY_POLLS:  # its worker died before anybody saw it ready
            raise ServerFailed("the server broke down before it was ready")
        return status in ("READY", "BUSY")

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
                assert self.process.stdin
                with suppress(OSError):  # the watcher is gone
                    self.process.stdin.write(b"\n")
                # The worker outlives the server by the moment in which it removes its files.
                end = time.monotonic() + 1.0
                with suppress(ProcessLookupError):
                    while time.monotonic() < end:
                        os.killpg(self.process.pid, 0)
                        time.sleep(0.01)
        finally:  # also when a second Ctrl-C says that this takes too long
            self.kill()

    def kill(self) -> None:
        """End all of it now, and remove its files."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._files.close()

    def _ask(self, method: str, path: str, body: str | None, timeout_s: float | None) -> tuple[int, Any]:
        with closing(http.client.HTTPConnection(self.host, self.port, timeout=timeout_s)) as connection:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            text = response.read()
        is_json = "json" in (response.getheader("Content-Type") or "")
        return response.status, json.loads(text) if is_json else text.decode(errors="replace")


def running_server(
    *,
    port: int,
    host: str = "127.0.0.1",
    log: IO[bytes] | None = None,
    environ: Mapping[str, str],
    root: Path = ROOT,
    mode: str = "predict",
) -> Server:
    """Start coglet with the Predictor of `root`, or with its train() where `mode` is "train".

    It logs to `log`, or to our stderr. Its outputs are in a folder of its own, unless `environ` names one.
    It is not ready yet: see `wait_ready`. Raises ServerFailed when the port or a folder cannot be had.
    """
    require_free(host, port, "set PORT to another")
    if root == ROOT:  # the benchmark's predictors have a schema of their own there
        _write_schema(root / ".cog" / SCHEMA.name)
    with ExitStack() as files:
        outputs = environ.get("FEWSTEP_OUTPUTS") or _make_folder(environ.get("TMPDIR"), files) / "files"
        process = subprocess.Popen(
            ["/bin/sh", "-c", WATCHED, "sh", sys.executable, "-m", "cog.server.http"]
            + ["--host", host, "--x-mode", mode],
            cwd=root,
            env=_environment(environ, port, str(outputs)),
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            bufsize=0,
            start_new_session=True,  # Ctrl-C reaches us alone, and the worker can be ended with it
        )
        files.enter_context(process)  # closes the pipe
        return Server(process, "127.0.0.1" if host == "0.0.0.0" else host, port, files.pop_all())


def _write_schema(target: Path) -> None:
    """Write it in one step, so that a server that starts meanwhile reads all of it."""
    schema = SCHEMA.read_bytes()
    if not target.exists() or target.read_bytes() != schema:
        target.parent.mkdir(exist_ok=True)
        unfinished = target.with_name(f"{uuid.uuid4()}.part")
        unfinished.write_bytes(schema)
        unfinished.replace(target)


def _make_folder(temporary: str | None, files: ExitStack) -> Path:
    """Make a server's folder, locked until `files` is closed, and remove those whose owner was killed."""
    parent = Path(temporary or tempfile.gettempdir())
    try:
        made = Path(tempfile.mkdtemp(prefix="fewstep-", dir=parent))
    except OSError as error:
        sentence = f"no folder for files can be made ({error.strerror}); set TMPDIR to another"
        raise ServerFailed(sentence) from None
    with suppress(OSError):  # a file system without locks, on which nothing counts as abandoned
        if lock := try_lock(made):
            files.callback(os.close, lock)
    folder = made.rename(parent / f"{OUTPUTS}{uuid.uuid4().hex[:8]}")  # under its name it was never unlocked
    files.callback(shutil.rmtree, folder, ignore_errors=True)
    for other in parent.glob(f"{OUTPUTS}*"):
        if is_abandoned(other):
            shutil.rmtree(other, ignore_errors=True)
    return folder


def end_as_by_ctrl_c() -> None:
    """Let SIGTERM and SIGHUP raise KeyboardInterrupt, so that whatever ends a script ends its server too."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(number, interrupt)


def free_port() -> int:
    """A loopback port that nobody listens on at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def code_and_sentence(text: str) -> str:
    """`[code] sentence` out of what coglet writes around it; the whole text when there is none."""
    match = CODE_AND_SENTENCE.search(text)
    return match.group() if match else text


def require_free(host: str, port: int, fix: str) -> None:
    """Raise ServerFailed when the port is taken, or not to be had."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            reason = error.strerror
            raise ServerFailed(f"port {port} of {host} cannot be had ({reason}); {fix}") from None


def _environment(environ: Mapping[str, str], port: int, outputs: str) -> dict[str, str]:
    return {
        **OFFLINE,
        "FEWSTEP_COGLET_ROOT": str(COGLET_ROOT),
        "FEWSTEP_MODEL": "miniature",
        "LOG_FORMAT": "console",
        **environ,
        "FEWSTEP_OUTPUTS": outputs,
        # coglet starts its worker as plain `python`.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environ.get('PATH', os.defpath)}",
        "COG_PREDICT_TYPE_STUB": "predict.py:Predictor",
        "COG_TRAIN_TYPE_STUB": "train.py:train",
        "COG_MAX_CONCURRENCY": str(CONCURRENCY),
        "PORT": str(port),
    }
