"""The page's server, run by uvicorn on a port of its own: before fake backends, or the real coglet."""

import asyncio
import io
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

from fewstep.coglet.server import free_port
from fewstep.models.specs import get_model
from fewstep.settings import Settings
from fewstep.web.app import WebServer, create_app
from fewstep.web.app_state import AppState
from fewstep.web.backends import BackendResult
from fewstep.web.queue import Worker
from fewstep.web.worker_pool import LocalWorkers

MINIATURE = get_model("miniature")


def webp(colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(file, "WEBP")
    return file.getvalue()


class FakeBackend:
    """Generates for `seconds`, and writes down what it was asked and what was given up."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.begun: list[str] = []
        self.done: list[str] = []
        self.left: list[str] = []
        self.inputs: list[Mapping[str, Any]] = []
        self.fails: list[Exception] = []

    async def generate(self, inputs: Mapping[str, Any]) -> BackendResult:
        self.begun.append(inputs["prompt"])
        self.inputs.append(inputs)
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.left.append(inputs["prompt"])
            raise
        if self.fails:
            raise self.fails.pop(0)
        self.done.append(inputs["prompt"])
        return BackendResult([webp()] * inputs.get("num_outputs", 1), self.seconds * 1000)


class FakePool:
    """A pool of fake backends, which are always there unless a test says otherwise."""

    live = True
    failure = ""

    def __init__(self, *backends: FakeBackend, slots: int = 1) -> None:
        self.workers = [Worker(name="fake", slots=slots, backend=one, ready=True) for one in backends]
        self.on_change: Callable[[], None] = lambda: None

    def start(self, on_change: Callable[[], None], on_restart: Callable[[], None]) -> None:
        self.on_change = on_change

    async def stop(self) -> None:
        pass


class RunningApp:
    """The page's server as it runs."""

    def __init__(self, url: str, app: Any, server: WebServer) -> None:
        self.url = url
        self.app = app
        self.server = server

    @property
    def state(self) -> AppState:
        state: AppState = self.app.state.app_state
        return state

    @property
    def live(self) -> str:
        return self.url.replace("http://", "ws://") + "/live"

    @contextmanager
    def client(self, **options: Any) -> Iterator[httpx2.Client]:
        """A browser, as far as cookies go."""
        with httpx2.Client(base_url=self.url, trust_env=False, timeout=60, **options) as client:
            client.get("/")
            yield client

    def set_ready(self, ready: bool) -> None:
        """Let a pool of fakes begin or end."""

        def turn() -> None:
            self.state.queue.workers[0].ready = ready
            self.state.worker_pool.on_change()  # type: ignore[attr-defined]

        self.app.state.loop.call_soon_threadsafe(turn)

    def wait_ready(self, seconds: float = 90) -> float:
        began = time.monotonic()
        while httpx2.get(f"{self.url}/readyz", trust_env=False).status_code != 200:
            assert time.monotonic() - began < seconds
            time.sleep(0.05)
        return time.monotonic() - began


@contextmanager
def running_app(folder: Path, pool: Any, model: str = "miniature", **settings: Any) -> Iterator[RunningApp]:
    app = create_app(get_model(model), Settings(web_data=folder / "data", **settings), pool)
    port = free_port()
    server = WebServer(app, "127.0.0.1", port)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield RunningApp(f"http://127.0.0.1:{port}", app, server)
    finally:
        server.should_exit = True
        thread.join(40)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    """The real thing: coglet with the miniature, as scripts/web starts it, one for all tests of a run."""
    folder = tmp_path_factory.mktemp("web")
    environ = {"PATH": "/usr/bin:/bin", "TMPDIR": str(folder)}
    pool = LocalWorkers([environ], 180, log=folder / "painters.log")
    with running_app(folder, pool) as web:
        web.wait_ready()
        yield web
