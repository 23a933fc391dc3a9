"""scripts/web from the shell: one command starts everything, and one signal ends it."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx2
import pytest
from conftest import wait_until
from test_worker_pool import processes, wait_gone

from fewstep.cli.web import environs_of, main, with_model
from fewstep.coglet.server import COGLET_ROOT, OUTPUTS, ROOT, _make_folder, free_port


@contextmanager
def started(folder, script="web", within=()):
    """The process of a script, with its files in `folder`, and its address; at the end it is killed."""
    port = str(free_port())
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FEWSTEP_")}
    own = {"PYTHONPATH": str(ROOT), "TMPDIR": str(folder), "FEWSTEP_WEB_DATA": str(folder), "PORT": port}
    command = [*within, sys.executable, "-P", "-m", f"fewstep.cli.{script}"]
    command += ["--port", port] if script == "web" else []
    options = {"env": clean | own, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    with subprocess.Popen(command, cwd=ROOT, **options) as process:
        try:
            yield process, f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def until_ready(process):
    """What it says, line by line, until it is ready."""
    for line in process.stderr:
        yield line
        if line.startswith(("ready: ", "serving on ")):
            return
    pytest.fail(f"it ended with status {process.wait()}")


def get(url):
    return httpx2.get(url, trust_env=False).status_code


def generate(url, **fields):
    body = {"prompt": "a red house", **fields}
    return httpx2.post(f"{url}/v1/images/generations", json=body, timeout=60, trust_env=False)


def children(pid):
    """Of all its threads, since each has its own."""
    lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return {int(one) for text in lists for one in text.split()}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_opens_at_once_says_when_it_is_ready_and_ends_with_all_that_it_started(tmp_path, number):
    with started(tmp_path) as (process, url):
        lines = []
        for line in until_ready(process):
            lines.append(line)
            if "is open" in line:  # the page is there before the model is
                assert [get(url + path) for path in ("/", "/healthz", "/readyz")] == [200, 200, 503]
        assert get(f"{url}/readyz") == 200
        [group] = children(process.pid)
        assert len(processes(group)) == 3  # coglet, its worker, and the watcher
        process.send_signal(number)
        assert process.wait(30) == 0
        wait_gone(group)
    assert lines[0].startswith("model miniature") and len(lines) == 3, lines
    assert (tmp_path / "cookie-key").stat().st_mode & 0o777 == 0o600
    assert not list(tmp_path.glob(f"{OUTPUTS}*"))


@pytest.mark.slow
@pytest.mark.parametrize("script", ["web", "serve"])
def test_its_sigkill_ends_all_that_it_started_and_the_next_start_removes_its_files(tmp_path, script):
    with started(tmp_path, script) as (process, _):
        list(until_ready(process))
        [group] = children(process.pid)
    wait_until(lambda: not processes(group), 5)
    [left] = tmp_path.glob(f"{OUTPUTS}*")
    with ExitStack() as files:
        [made] = {_make_folder(str(tmp_path), files)} & set(tmp_path.glob(f"{OUTPUTS}*"))
        assert not left.exists()
        with ExitStack() as others:  # which leaves alone what is a living one's
            _make_folder(str(tmp_path), others)
            assert made.exists()


@pytest.mark.slow
def test_without_inodes_for_a_moment_it_generates_again_and_is_not_ready_meanwhile(tmp_path):
    """coglet then loses its slots for good, and goes on calling itself well."""
    COGLET_ROOT.mkdir(parents=True, exist_ok=True)
    mount = f'mount -t tmpfs -o nr_inodes=10k tmpfs {COGLET_ROOT} && exec "$@"'
    own_mounts = ["unshare", "-m", "sh", "-c", mount, "sh"]
    if os.getuid() or subprocess.run([*own_mounts, "true"], capture_output=True).returncode:
        pytest.skip("only root can mount a file system with few inodes, and not in every container")
    ending, images, errors = threading.Event(), [], []
    with started(tmp_path, within=own_mounts) as (process, url), ThreadPoolExecutor(4) as pool:

        def set_inodes(count):
            remount = ["mount", "-o", f"remount,nr_inodes={count}", str(COGLET_ROOT)]
            done = subprocess.run(["nsenter", "-t", str(process.pid), "-m", *remount], capture_output=True)
            return done.returncode == 0

        def leave_two_inodes():
            """False where more than two were taken since they were counted."""
            status = os.statvfs(f"/proc/{process.pid}/root{COGLET_ROOT}")
            return set_inodes(status.f_files - status.f_ffree + 2)

        def ask(seed):
            while not ending.is_set():
                answer = generate(url, num_inference_steps=1, seed=seed)
                if not ending.is_set():  # after which they are turned away
                    (images if answer.status_code == 200 else errors).append(time.monotonic())

        list(until_ready(process))
        before = children(process.pid)
        threading.Thread(target=process.stderr.read, daemon=True).start()
        for seed in range(4):
            pool.submit(ask, seed)
        try:
            wait_until(lambda: images)
            wait_until(leave_two_inodes)
            time.sleep(1.5)
            assert set_inodes("10k")
            began = time.monotonic()
            wait_until(lambda: get(f"{url}/readyz") != 200, 6)
            # Another is started at once; how long that takes is the machine's affair.
            wait_until(lambda: set(children(process.pid)) - set(before), 9)
            wait_until(lambda: get(f"{url}/readyz") == 200 and images[-1] > began)
        finally:
            ending.set()
            process.terminate()
            process.wait(40)
    assert len(errors) <= 4  # those that were sent into it, one after the other, as often as one is


@pytest.mark.slow
def test_when_it_is_to_end_under_load_everybody_gets_an_image_or_is_told(tmp_path):
    with started(tmp_path) as (process, url):
        list(until_ready(process))
        with ThreadPoolExecutor(24) as pool:
            asking = [pool.submit(generate, url, num_inference_steps=8, n=4) for _ in range(24)]
            time.sleep(1.0)
            process.terminate()
        assert process.wait(40) == 0
        log = [json.loads(line) for line in process.stderr]
    assert {one["event"] for one in log} == {"painted"}  # in JSON, and nothing else
    # A connection that came too late is refused.
    answers = [one.result() for one in asking if not one.exception()]
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) <= {200, 429, 503}
    assert statuses.count(200) >= 1
    for answer in answers:
        assert answer.status_code == 200 or (answer.json()["error"]["code"] and answer.headers["Retry-After"])


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """The command in this process: its status, and what it said on stderr."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])  # of pytest's, whose format it would change
    monkeypatch.setenv("FEWSTEP_WEB_DATA", str(tmp_path))

    def run(*arguments, **environ):
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        return main(["--port", str(free_port()), *arguments]), capsys.readouterr().err

    yield run
    root.setLevel(logging.WARNING)


def test_a_model_that_cannot_start_ends_it_with_the_reason(run, tmp_path):
    status, error = run(FEWSTEP_WEIGHTS=str(tmp_path))
    assert status == 1
    assert "[weights] weights/miniature" in error.splitlines()[-1] and "Traceback" not in error


def test_what_cannot_be_is_said_before_anything_starts(run):
    for wrong in ("--port 0", "--workers 0", "--cog-url x", "--cog-url http://x --replicate y"):
        with pytest.raises(SystemExit, match="2"):
            run(*wrong.split())
    status, error = run("--replicate", "me/fewstep")
    assert status == 1 and "REPLICATE_API_TOKEN" in error
    status, error = run(FEWSTEP_MODEL="other")
    assert status == 1 and "[settings]" in error


def test_a_port_that_is_taken_is_said(run):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        status, error = run("--port", port)
    assert status == 1 and "Traceback" not in error and port in error


def test_a_container_elsewhere_generates_what_containers_generate_unless_a_model_is_named(capsys):
    assert with_model({}, elsewhere=True)["FEWSTEP_MODEL"] == "sdxl"
    assert with_model({}, elsewhere=False)["FEWSTEP_MODEL"] == "miniature"
    assert "model sdxl" in capsys.readouterr().err
    assert with_model({"FEWSTEP_MODEL": "sd15"}, elsewhere=True)["FEWSTEP_MODEL"] == "sd15"
    assert capsys.readouterr().err == ""


def test_every_server_has_a_gpu_of_its_own_or_its_share_of_the_processors():
    two = environs_of(None, {"CUDA_VISIBLE_DEVICES": "2,5"})
    assert [one["CUDA_VISIBLE_DEVICES"] for one in two] == ["2", "5"]
    four = environs_of(4, {"CUDA_VISIBLE_DEVICES": "2,5"})
    assert [one["CUDA_VISIBLE_DEVICES"] for one in four] == ["2", "5", "2", "5"]
    cpu = environs_of(2, {"CUDA_VISIBLE_DEVICES": ""})
    assert [one["OMP_NUM_THREADS"] for one in cpu] == [str(max(1, len(os.sched_getaffinity(0)) // 2))] * 2
    assert "OMP_NUM_THREADS" not in environs_of(None, {"CUDA_VISIBLE_DEVICES": ""})[0]
    kept = environs_of(2, {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "7"})
    assert kept[0]["OMP_NUM_THREADS"] == "7"
