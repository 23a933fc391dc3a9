"""coglet is killed, stopped and misled: generating goes on without a hand, and nothing is left behind."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
from conftest import open_house
from fewstep.web.supervisor import OUTPUTS, SECRETS, Supervisor, visible_gpus
from test_live import visit

from fewstep.web import supervisor as supervisor_module
from fewstep.web.worker_pool import LocalWorkers, RemoteWorker

SLACK_S = 15


def processes(group):
    """The processes of a group by their pid, with what they are and whether they are zombies."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = status.read_text()
        except OSError:
            continue
        rest = text.rpartition(")")[2]
        state, _, group_of = rest.split()[:3]
        if int(group_of) == group:
            found[int(status.parent.name)] = state
    return found


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    folder = tmp_path_factory.mktemp("supervised")
    environ = {"PATH": "/usr/bin:/bin", "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
    crew = LocalWorkers([environ] * 2, 60, log=folder / "painters.log")
    with open_house(folder, crew) as house:
        began = time.monotonic()
        while not all(worker.ready for worker in crew.workers):
            time.sleep(0.1)
        house.setup_s = time.monotonic() - began
        yield house
        groups = [one._server.process.pid for one in crew.supervisors if one._server]
    assert groups and all(is_gone(group) for group in groups)


def is_gone(group):
    """Whether nothing is left of it, within the moment that the system's init takes to clear what ended."""
    for _ in range(20):
        if not processes(group):
            return True
        time.sleep(0.1)
    return False


def group_of(house, i=0):
    return house.front.worker_pool.supervisors[i]._server.process.pid


def worker_of(group):
    """The process that coglet started to generate."""
    [pid] = [pid for pid in processes(group) if pid != group]
    return pid


class Load:
    """Visitors who type on; every wish that is the last for a while must be generated."""

    def __init__(self, house, visitors=4):
        self.house, self.errors, self.states, self.generated = house, [], [], 0
        self.ending = threading.Event()
        self.threads = [threading.Thread(target=self._type, args=(i,)) for i in range(visitors)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        time.sleep(1)
        return self

    def __exit__(self, *_):
        self.ending.set()
        for thread in self.threads:
            thread.join()

    def _type(self, i):
        with visit(self.house) as visitor:
            while not self.ending.is_set():
                n = visitor.type(f"a red house {i} {visitor.n}", seed=i, steps=1)
                while True:
                    message, _ = visitor.read("painted", "failed", "state", timeout=90)
                    if message["type"] == "failed":
                        self.errors.append(message)
                    if message["type"] == "state":
                        self.states.append(message["ready"])
                    if message.get("n") == n:
                        self.generated += 1
                        break


def ends_and_comes_back(house, kill):
    """Seconds until both servers are ready after `kill(group)` of both; a load is generated meanwhile."""
    groups = [group_of(house, i) for i in range(2)]
    with Load(house) as load:
        before = load.generated
        for group in groups:
            kill(group)
        began = time.monotonic()
        while True:
            time.sleep(0.1)
            fresh = [one._server.process.pid for one in house.front.worker_pool.supervisors if one._server]
            if (
                len(fresh) == 2
                and not set(fresh) & set(groups)
                and all(w.ready for w in house.front.queue.workers)
            ):
                break
            assert time.monotonic() - began < 90
        took = time.monotonic() - began
        generated = load.generated
        while load.generated < generated + 8:
            time.sleep(0.1)
            assert time.monotonic() - began < 120
    assert before > 0 and load.errors == []
    # "One moment", and then that it is over; the first of all says how it was at the beginning.
    assert False in load.states and load.states[-1] is True
    for group in groups:
        assert is_gone(group), "a process is left of what was replaced"
    return took


def test_a_worker_that_is_killed_is_replaced_and_nobodys_wish_is_lost(house):
    took = ends_and_comes_back(house, lambda group: os.kill(worker_of(group), signal.SIGKILL))
    assert took < house.setup_s + SLACK_S


def test_a_server_that_is_killed_is_replaced_with_its_worker(house):
    took = ends_and_comes_back(house, lambda group: os.kill(group, signal.SIGKILL))
    assert took < house.setup_s + SLACK_S


def test_one_that_hangs_is_routed_around_and_replaced(house):
    group = group_of(house)
    with Load(house, visitors=2) as load:
        os.kill(worker_of(group), signal.SIGSTOP)
        began = time.monotonic()
        while house.front.queue.workers[0].ready:
            time.sleep(0.1)
            assert time.monotonic() - began < 10
        while group_of_or_none(house) in (group, None) or not house.front.queue.workers[0].ready:
            time.sleep(0.1)
            assert time.monotonic() - began < 60
    assert load.errors == [] and is_gone(group)


def group_of_or_none(house):
    server = house.front.worker_pool.supervisors[0]._server
    return server and server.process.pid


def test_the_restarts_are_counted_and_every_server_has_its_own_folder(house):
    with house.client() as client:
        text = client.get("/metrics").text
    count = float(
        next(line.split()[1] for line in text.splitlines() if line.startswith("fewstep_restarts_total"))
    )
    assert count >= 5
    folders = list(house.front.settings.web_data.parent.glob(f"{OUTPUTS}*"))
    assert len(folders) == 2


def test_a_model_that_cannot_start_says_why_and_is_tried_again(tmp_path):
    changes, restarts = [], []
    environ = {"PATH": "/usr/bin:/bin", "FEWSTEP_WEIGHTS": str(tmp_path), "TMPDIR": str(tmp_path)}
    supervisor = Supervisor(
        "any",
        environ=environ,
        on_change=lambda one: changes.append((one.ready, one.failure)),
        on_restart=lambda: restarts.append(1),
        log=tmp_path / "log",
    )
    supervisor.start()
    while len(restarts) < 2:
        time.sleep(0.1)
    assert "[weights]" in supervisor.failure and str(tmp_path) not in supervisor.failure
    began = time.monotonic()
    supervisor.stop()
    assert time.monotonic() - began < 10 and not supervisor.is_alive()
    assert not any(ready for ready, _ in changes)


def test_whatever_keeps_a_server_from_starting_it_is_tried_again(tmp_path, monkeypatch):
    """A full disk, say: the thread that keeps it alive must not end."""
    restarts, kinds = [], iter((OSError(28, "No space left"), KeyError("setup"), RuntimeError("any")))

    def failing(**_):
        raise next(kinds, OSError())

    monkeypatch.setattr(supervisor_module, "running_server", failing)
    monkeypatch.setattr(supervisor_module, "BACKOFF_S", (0.01,))
    supervisor = Supervisor(
        "any",
        environ={},
        on_change=lambda one: None,
        on_restart=lambda: restarts.append(1),
        log=tmp_path / "log",
    )
    supervisor.start()
    while len(restarts) < 5:
        time.sleep(0.01)
    assert "the log says why" in supervisor.failure
    supervisor.stop()
    assert not supervisor.is_alive()


def test_one_that_is_condemned_is_replaced_though_it_calls_itself_well(house):
    group = group_of(house)
    house.front.worker_pool.supervisors[0].condemn()
    began = time.monotonic()
    while group_of_or_none(house) in (group, None) or not house.front.queue.workers[0].ready:
        time.sleep(0.1)
        assert time.monotonic() - began < 60
    assert is_gone(group)


def test_a_stop_in_the_middle_of_a_start_leaves_nothing(tmp_path):
    environ = {"PATH": "/usr/bin:/bin", "TMPDIR": str(tmp_path)}
    supervisor = Supervisor("any", environ=environ, on_change=lambda one: None, log=tmp_path / "log")
    supervisor.start()
    while supervisor._server is None:
        time.sleep(0.01)
    group = supervisor._server.process.pid
    time.sleep(0.5)
    supervisor.stop()
    assert is_gone(group) and not list(tmp_path.glob(f"{OUTPUTS}*"))


def test_the_front_doors_secrets_stay_with_it(tmp_path):
    environ = {"PATH": "/usr/bin:/bin", "KEPT": "1", **dict.fromkeys(SECRETS, "secret")}
    assert Supervisor("any", environ=environ, on_change=lambda one: None)._environ == {
        "PATH": "/usr/bin:/bin",
        "KEPT": "1",
    }


@pytest.mark.parametrize(
    ("environ", "gpus"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,3"}, ["0", "3"]),
        ({"CUDA_VISIBLE_DEVICES": ""}, []),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, []),
        ({"CUDA_VISIBLE_DEVICES": "0", "FEWSTEP_DEVICE": "cpu"}, []),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1,MIG-2"}, ["GPU-1", "MIG-2"]),
    ],
)
def test_the_gpus_that_may_be_used(environ, gpus):
    assert visible_gpus(environ) == gpus


def test_somebody_elses_server_is_used_as_long_as_it_is_ready(house, tmp_path):
    url = house.front.worker_pool.supervisors[0].url
    with open_house(tmp_path, RemoteWorker(url, 60)) as other:
        other.wait_ready(10)
        with visit(other) as visitor:
            visitor.type("a red house", steps=1)
            visitor.read("painted")
    with open_house(tmp_path, RemoteWorker("http://127.0.0.1:9", 60)) as other, other.client() as client:
        time.sleep(0.5)
        assert client.get("/readyz").status_code == 503
