"""coglet is killed, stopped and misled: generating goes on without a hand, and nothing is left behind."""

import asyncio
import os
import re
import signal
import subprocess
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from conftest import running_app, wait_until
from test_backends import URL, answering
from test_live import open_page

from fewstep.coglet.server import OUTPUTS, Server
from fewstep.web import worker_pool
from fewstep.web.worker_pool import WITHHELD, LocalWorkers, RemoteWorker, visible_gpus

pytestmark = pytest.mark.slow

SLACK_S = 15
# Runs at the start of every Python of a server: once the file "lost" is there, the next pass takes it away
# and fails as on a GPU whose context is gone.
LOSES_ITS_GPU = """
import os, sys, threading, time
lost = os.path.join(os.path.dirname(__file__), "lost")
def wait_and_patch():
    while not hasattr(sys.modules.get("fewstep.generation.engines"), "Engine"):
        time.sleep(0.05)
    engine = sys.modules["fewstep.generation.engines"].Engine
    unet = engine.unet
    def failing(self, *given):
        try:
            os.remove(lost)
        except FileNotFoundError:
            return unet(self, *given)
        import torch
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    engine.unet = failing
threading.Thread(target=wait_and_patch, daemon=True).start()
"""
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def processes(group):
    """The processes of a group by their pid, with their state, which says whether they are zombies."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = status.read_text()
        except OSError:
            continue
        state, _, group_of = text.rpartition(")")[2].split()[:3]
        if int(group_of) == group:
            found[int(status.parent.name)] = state
    return found


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    folder = tmp_path_factory.mktemp("supervised")
    (folder / "sitecustomize.py").write_text(LOSES_ITS_GPU)
    environ = {"PATH": "/usr/bin:/bin", "TMPDIR": str(folder), "OMP_NUM_THREADS": "1", **NO_GPU}
    environ |= {"PYTHONPATH": str(folder)}
    pool = LocalWorkers([environ] * 2, 60, folder / "painters.log")
    with running_app(folder, pool) as web:
        began = time.monotonic()
        wait_until(lambda: all(worker.ready for worker in pool.workers))
        web.setup_s = time.monotonic() - began
        yield web
        groups = [group_of(web, i) for i in range(2)]
    wait_gone(*groups)


def wait_gone(*groups):
    """Nothing may be left of them, within the moment that the system's init takes to clear what ended."""
    wait_until(lambda: not any(map(processes, groups)), 2)


def group_of(web, i=0):
    """The process group of the server that runs now; None between two."""
    server = web.state.worker_pool.workers[i].server
    return server and server.process.pid


def is_replaced(web, i, group):
    """Whether this server runs in another group now, and is ready."""
    return group_of(web, i) not in (group, None) and web.state.worker_pool.workers[i].ready


def worker_of(group):
    """The process that coglet started to generate: the largest, beside coglet and the watcher."""
    sizes = {pid: int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in processes(group)}
    return max(sizes, key=sizes.get)


class Load:
    """Clients who type on; every prompt that is the last for a while must be generated."""

    def __init__(self, web, clients=4):
        self.web, self.errors, self.states, self.generated = web, [], [], 0
        self.ending = threading.Event()
        self.threads = [threading.Thread(target=self._type, args=(i,)) for i in range(clients)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        self.wait_for_more()
        return self

    def __exit__(self, *_):
        self.ending.set()
        for thread in self.threads:
            thread.join()

    def wait_for_more(self, images=1):
        before = self.generated
        wait_until(lambda: self.generated >= before + images)

    def _type(self, i):
        with open_page(self.web) as page:
            while not self.ending.is_set():
                n = page.type(f"a red house {i} {page.n}", seed=i, steps=1)
                while True:
                    message, _ = page.read("painted", "failed", "state", timeout=90)
                    if message["type"] == "failed":
                        self.errors.append(message)
                    if message["type"] == "state":
                        self.states.append(message["ready"])
                    if message.get("n") == n:
                        self.generated += 1
                        break


@pytest.mark.parametrize("victim", [worker_of, lambda group: group], ids=["its worker", "coglet"])
def test_a_server_that_is_killed_is_replaced_with_its_worker_and_nobodys_request_is_lost(web, victim):
    groups = [group_of(web, i) for i in range(2)]
    with Load(web) as load:
        for group in groups:
            os.kill(victim(group), signal.SIGKILL)
        began = time.monotonic()
        wait_until(lambda: all(is_replaced(web, i, group) for i, group in enumerate(groups)))
        took = time.monotonic() - began
        load.wait_for_more(8)
    assert load.errors == [] and took < web.setup_s + SLACK_S
    # "One moment", and then that it is over; the first of all says how it was at the beginning.
    assert False in load.states and load.states[-1] is True
    wait_gone(*groups)


def test_one_that_hangs_is_routed_around_and_replaced(web):
    group = group_of(web)
    with Load(web, clients=2) as load:
        os.kill(worker_of(group), signal.SIGSTOP)
        wait_until(lambda: not web.state.worker_pool.workers[0].ready, 15)
        wait_until(lambda: is_replaced(web, 0, group))
    assert load.errors == []
    wait_gone(group)


def test_one_whose_gpu_is_lost_is_replaced_and_nobodys_request_is_lost(web):
    groups = [group_of(web, i) for i in range(2)]
    with Load(web) as load:
        (web.state.settings.web_data.parent / "lost").touch()
        wait_until(lambda: any(is_replaced(web, i, group) for i, group in enumerate(groups)))
        load.wait_for_more(4)
    assert load.errors == []
    [gone] = [group for i, group in enumerate(groups) if group_of(web, i) != group]
    wait_gone(gone)


def test_the_restarts_are_counted_and_every_server_has_its_own_folder(web):
    with web.client() as client:
        text = client.get("/metrics").text
    assert float(re.search(r"^fewstep_restarts_total (\S+)$", text, re.MULTILINE)[1]) >= 6
    assert len(list(web.state.settings.web_data.parent.glob(f"{OUTPUTS}*"))) == 2


def keep(folder, until, **environ):
    """Keep one server alive until `until(restarts)`: why it fails, whether it was ready, its group."""

    async def main():
        restarts, states = [], []
        own = {"PATH": "/usr/bin:/bin", "TMPDIR": str(folder), **NO_GPU, **environ}
        pool = LocalWorkers([own], 60, folder / "log")
        [worker] = pool.workers
        pool.start(lambda: states.append(worker.ready), lambda: restarts.append(1))
        while not until(restarts):
            await asyncio.sleep(0.01)
        failure, group = pool.failure, worker.server and worker.server.process.pid
        began = time.monotonic()
        await pool.stop()
        assert time.monotonic() - began < 10
        return failure, any(states), group

    return asyncio.run(main())


def test_a_model_that_cannot_start_says_why_and_is_tried_again(tmp_path):
    environ = {"FEWSTEP_WEIGHTS": str(tmp_path)}
    failure, ever_ready, _ = keep(tmp_path, lambda restarts: len(restarts) > 1, **environ)
    assert "[weights]" in failure and str(tmp_path) not in failure and not ever_ready


def test_whatever_keeps_a_server_from_starting_it_is_tried_again(tmp_path, monkeypatch):
    """A full disk, say: the task that keeps it alive must not end."""
    kinds = iter((OSError(28, "No space left"), KeyError("setup"), RuntimeError("any")))

    def failing(**_):
        raise next(kinds, OSError())

    monkeypatch.setattr(worker_pool, "running_server", failing)
    monkeypatch.setattr(worker_pool, "BACKOFF_S", (0.01,))
    failure, _, _ = keep(tmp_path, lambda restarts: len(restarts) >= 5)
    assert "the log says why" in failure


def test_a_stop_in_the_middle_of_a_start_leaves_nothing(tmp_path):
    began = time.monotonic()
    _, _, group = keep(tmp_path, lambda _: time.monotonic() - began > 0.5)
    assert group and not list(tmp_path.glob(f"{OUTPUTS}*"))
    wait_gone(group)


def test_the_fronts_secrets_stay_with_it(tmp_path):
    [worker] = LocalWorkers([{"KEPT": "1", **dict.fromkeys(WITHHELD, "secret")}], 60, tmp_path).workers
    assert worker.environ == {"KEPT": "1"}


def test_the_gpus_that_may_be_used():
    gpus = {"0,3": ["0", "3"], "": [], "-1": [], "GPU-1,MIG-2": ["GPU-1", "MIG-2"]}
    assert {named: visible_gpus({"CUDA_VISIBLE_DEVICES": named}) for named in gpus} == gpus
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "0", "FEWSTEP_DEVICE": "cpu"}) == []


def test_somebody_elses_server_is_used_as_long_as_it_is_ready(web, tmp_path):
    url = web.state.worker_pool.workers[0].backend.url
    with running_app(tmp_path, RemoteWorker(url, 60)) as other:
        other.wait_ready(10)
        with open_page(other) as page:
            page.type("a red house", steps=1)
            page.read("painted")
    with running_app(tmp_path, RemoteWorker("http://127.0.0.1:9", 60)) as other, other.client() as client:
        time.sleep(0.5)
        assert client.get("/readyz").status_code == 503


def fake_coglet(health):
    """Answers of one that has lost its slots as long as `health` says BUSY."""

    def answers(method, path):
        if path == "/health-check":
            return 200, health
        if health["status"] == "BUSY":
            return 409, {"error": "At capacity"}
        return 200, {"status": "succeeded", "output": [URL]}

    return answering(answers)


def test_somebody_elses_server_that_refuses_for_ever_is_not_ready_until_it_has_room(tmp_path):
    health = {"status": "BUSY"}
    with fake_coglet(health) as server, running_app(tmp_path, RemoteWorker(server.url, 60)) as web:
        web.wait_ready(10)
        with open_page(web) as page, web.client() as client:
            page.type("a red house", steps=1)
            wait_until(lambda: client.get("/readyz").status_code == 503, 8)
            time.sleep(1.5)
            assert client.get("/readyz").status_code == 503  # though it calls itself well
            health["status"] = "READY"
            page.read("painted", timeout=10)
            assert client.get("/readyz").status_code == 200


def test_one_of_ours_that_refuses_for_ever_is_replaced(tmp_path, monkeypatch):
    """The first of two fake coglets has lost its slots; the process beside each is any."""
    ended = []
    with fake_coglet({"status": "BUSY"}) as first, fake_coglet({"status": "READY"}) as second:
        ports = iter((first.server_port, second.server_port))

        def start(**_):
            process = subprocess.Popen(["sleep", "60"], start_new_session=True, stdin=subprocess.PIPE)
            files = ExitStack()
            files.callback(ended.append, process)
            return Server(process, "127.0.0.1", next(ports), files)

        monkeypatch.setattr(worker_pool, "running_server", start)
        with running_app(tmp_path, LocalWorkers([{}], 60, tmp_path / "log")) as web, open_page(web) as page:
            web.wait_ready(10)
            began = time.monotonic()
            page.type("a red house", steps=1)
            wait_until(lambda: not web.state.queue.ready, 8)
            page.read("painted", timeout=10)
            assert time.monotonic() - began < 8
            assert [process.returncode for process in ended] == [-signal.SIGKILL]
