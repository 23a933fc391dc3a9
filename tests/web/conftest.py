"""The page's server, run by uvicorn on a port of its own: before fake backends, or the real coglet."""

import asyncio
import base64
import io
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
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


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decoded(text: str) -> Image.Image:
    """The image of base64, or of a data URL."""
    return Image.open(io.BytesIO(base64.b64decode(text.rpartition(",")[2])))


def webp() -> bytes:
    return encoded(Image.new("RGB", (16, 16), "red"), "WEBP")


class FakeBackend:
    """Generates for `seconds`, and writes down what it was asked and what was given up."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self.begun: list[str] = []
        self.done: list[str] = []
        self.left: list[str] = []
        self.running = self.most = 0  # at once
        self.inputs: list[Mapping[str, Any]] = []
        self.fails: list[Exception] = []

    async def generate(self, inputs: Mapping[str, Any]) -> BackendResult:
        self.begun.append(inputs["prompt"])
        self.inputs.append(inputs)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.left.append(inputs["prompt"])
            raise
        finally:
            self.running -= 1
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

    def start(self, on_change: Callable[[], None], on_restart: Callable[[], None]) -> None:
        self.on_change, self.loop = on_change, asyncio.get_running_loop()

    async def stop(self) -> None:
        pass


def wait_until(happened: Callable[[], Any], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.02)


@dataclass
class RunningApp:
    """The page's server as it runs."""

    url: str
    state: AppState

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
        pool: Any = self.state.worker_pool
        pool.workers[0].ready = ready
        pool.loop.call_soon_threadsafe(pool.on_change)

    def wait_ready(self, seconds: float = 90) -> None:
        wait_until(lambda: httpx2.get(f"{self.url}/readyz", trust_env=False).status_code == 200, seconds)


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
        yield RunningApp(f"http://127.0.0.1:{port}", app.state.app_state)
    finally:
        server.should_exit = True
        thread.join(40)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningApp]:
    """The real thing: coglet with the miniature, as scripts/web starts it, one for all tests of a run."""
    folder = tmp_path_factory.mktemp("web")
    environ = {"PATH": "/usr/bin:/bin", "TMPDIR": str(folder), "CUDA_VISIBLE_DEVICES": ""}
    pool = LocalWorkers([environ], 180, folder / "painters.log")
    with running_app(folder, pool) as web:
        web.wait_ready()
        yield web
