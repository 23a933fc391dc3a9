"""scripts/web from the shell: one command starts everything, and one signal ends it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest
from test_supervisor import is_gone, processes

from fewstep.cli.web import environs_of, with_model
from fewstep.coglet.server import ROOT, free_port

WEB = [sys.executable, "-P", "-m", "fewstep.cli.web"]


def start(*arguments, **environ):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("FEWSTEP_")}
    return subprocess.Popen(
        [*WEB, *arguments],
        cwd=ROOT,
        env={**clean, "PYTHONPATH": str(ROOT), **environ},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def children(pid):
    """Of all its threads, since each has its own."""
    lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return {int(one) for text in lists for one in text.split()}


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
        assert len(processes(group)) == 2
        process.send_signal(number)
        assert process.wait(30) == 0
        assert is_gone(group)
    finally:
        process.kill()
        process.wait()
    assert lines[0].startswith("model miniature") and len(lines) == 3, lines
    assert (tmp_path / "cookie-key").stat().st_mode & 0o777 == 0o600
    assert not list(tmp_path.glob("fewstep-outputs-*"))


def test_when_it_is_to_end_under_load_everybody_gets_a_image_or_is_told(tmp_path):
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
    for wrong in (
        ["--port", "0"],
        ["--workers", "0"],
        ["--cog-url", "x"],
        ["--cog-url", "http://x", "--replicate", "y"],
    ):
        assert ends_with(start(*wrong, **data))[0] == 2


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
