"""scripts/web from the shell: one command starts everything, and one signal ends it."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx2
import pytest
from test_worker_pool import is_gone, processes, wait_until

from fewstep.cli.web import environs_of, with_model
from fewstep.coglet.server import COGLET_ROOT, OUTPUTS, ROOT, _make_folder, free_port

WEB = [sys.executable, "-P", "-m", "fewstep.cli.web"]


def start(*arguments, command=WEB, **environ):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FEWSTEP_")}
    options = {"env": {**clean, "PYTHONPATH": str(ROOT), **environ}, "start_new_session": True}
    return subprocess.Popen([*command, *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True, **options)


def children(pid):
    """Of all its threads, since each has its own."""
    lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return {int(one) for text in lists for one in text.split()}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_opens_at_once_says_when_it_is_ready_and_ends_with_all_that_it_started(tmp_path, number):
    port = free_port()
    process = start("--port", str(port), FEWSTEP_WEB_DATA=str(tmp_path), TMPDIR=str(tmp_path))
    try:
        lines = []
        while not lines or "ready: " not in lines[-1]:
            lines.append(process.stderr.readline())
            if "is open" in lines[-1]:  # the page is there before the model is
                url = f"http://127.0.0.1:{port}"
                assert httpx2.get(url, trust_env=False).status_code == 200
                assert httpx2.get(f"{url}/healthz", trust_env=False).status_code == 200
                assert httpx2.get(f"{url}/readyz", trust_env=False).status_code == 503
            assert lines[-1], lines
        assert httpx2.get(f"{url}/readyz", trust_env=False).status_code == 200
        [group] = children(process.pid)
        assert len(processes(group)) == 3  # coglet, its worker, and the watcher
        process.send_signal(number)
        assert process.wait(30) == 0
        assert is_gone(group)
    finally:
        process.kill()
        process.wait()
    assert lines[0].startswith("model miniature") and len(lines) == 3, lines
    assert (tmp_path / "cookie-key").stat().st_mode & 0o777 == 0o600
    assert not list(tmp_path.glob("fewstep-outputs-*"))


@pytest.mark.slow
@pytest.mark.parametrize("script", ["web", "serve"])
def test_its_sigkill_ends_all_that_it_started_and_the_next_start_removes_its_files(tmp_path, script):
    port = str(free_port())
    command = [*WEB[:-1], f"fewstep.cli.{script}", *(["--port", port] if script == "web" else [])]
    process = start(command=command, FEWSTEP_WEB_DATA=str(tmp_path), TMPDIR=str(tmp_path), PORT=port)
    while not process.stderr.readline().startswith(("ready: ", "serving on ")):
        assert process.poll() is None
    [group] = children(process.pid)
    process.kill()
    process.wait()
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
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    environ = {"FEWSTEP_WEB_DATA": str(tmp_path), "TMPDIR": str(tmp_path)}
    process = start("--port", str(port), command=[*own_mounts, *WEB], **environ)
    ending, images, errors = threading.Event(), [], []

    def set_inodes(count):
        remount = ["mount", "-o", f"remount,nr_inodes={count}", str(COGLET_ROOT)]
        subprocess.run(["nsenter", "-t", str(process.pid), "-m", *remount], check=True)

    def ask(seed):
        while not ending.is_set():
            body = {"prompt": "a red house", "num_inference_steps": 1, "seed": seed}
            answer = httpx2.post(f"{url}/v1/images/generations", json=body, timeout=60, trust_env=False)
            (images if answer.status_code == 200 else errors).append(time.monotonic())

    def is_ready():
        return httpx2.get(f"{url}/readyz", trust_env=False).status_code == 200

    try:
        began = time.monotonic()
        while not process.stderr.readline().startswith("ready: "):
            assert process.poll() is None
        setup_s = time.monotonic() - began
        threading.Thread(target=process.stderr.read, daemon=True).start()
        with ThreadPoolExecutor(4) as pool:
            for seed in range(4):
                pool.submit(ask, seed)
            wait_until(lambda: images)
            status = os.statvfs(f"/proc/{process.pid}/root{COGLET_ROOT}")
            set_inodes(status.f_files - status.f_ffree + 2)
            time.sleep(1.5)
            set_inodes("10k")
            began = time.monotonic()
            wait_until(lambda: not is_ready(), 6)
            wait_until(lambda: is_ready() and images[-1] > began)
            took = time.monotonic() - began
            ending.set()
    finally:
        ending.set()
        process.terminate()
        process.wait(40)
    assert took < max(15, setup_s + 8)  # 15 s where the start takes 7
    assert len(errors) <= 4  # those that were sent into it, one after the other, as often as one is


@pytest.mark.slow
def test_when_it_is_to_end_under_load_everybody_gets_an_image_or_is_told(tmp_path):
    port = free_port()
    process = start("--port", str(port), FEWSTEP_WEB_DATA=str(tmp_path), TMPDIR=str(tmp_path))
    answers = []

    def ask(i):
        url = f"http://127.0.0.1:{port}/v1/images/generations"
        body = {"prompt": f"a red house {i}", "num_inference_steps": 8, "n": 4}
        answers.append(httpx2.post(url, json=body, timeout=60, trust_env=False))

    try:
        while "ready: " not in process.stderr.readline():
            pass
        with ThreadPoolExecutor(24) as pool:
            asking = [pool.submit(ask, i) for i in range(24)]
            time.sleep(1.0)
            process.terminate()
            for one in asking:
                one.exception()  # a connection that came too late is refused
        assert process.wait(40) == 0
    finally:
        process.kill()
        process.wait()
    log = [json.loads(line) for line in process.stderr.read().splitlines()]
    assert {one["event"] for one in log} == {"painted"}  # in JSON, and nothing else
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) <= {200, 429, 503}
    assert statuses.count(200) >= 1
    for answer in answers:
        assert answer.status_code == 200 or (answer.json()["error"]["code"] and answer.headers["Retry-After"])


def ends_with(process):
    error = process.communicate(timeout=60)[1]
    return process.returncode, error


def test_a_model_that_cannot_start_ends_it_with_the_reason(tmp_path):
    process = start("--port", str(free_port()), FEWSTEP_WEIGHTS=str(tmp_path), FEWSTEP_WEB_DATA=str(tmp_path))
    status, error = ends_with(process)
    assert status == 1
    assert "[weights] weights/miniature" in error.splitlines()[-1] and "Traceback" not in error


def test_what_cannot_be_is_said_before_anything_starts(tmp_path):
    data = {"FEWSTEP_WEB_DATA": str(tmp_path)}
    status, error = ends_with(start("--replicate", "me/fewstep", **data))
    assert status == 1 and "REPLICATE_API_TOKEN" in error
    status, error = ends_with(start(FEWSTEP_MODEL="other", **data))
    assert status == 1 and "[settings]" in error
    both = "--cog-url http://x --replicate y"
    for wrong in ("--port 0", "--workers 0", "--cog-url x", both):
        assert ends_with(start(*wrong.split(), **data))[0] == 2


def test_a_port_that_is_taken_is_said(tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        status, error = ends_with(start("--port", port, FEWSTEP_WEB_DATA=str(tmp_path)))
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
