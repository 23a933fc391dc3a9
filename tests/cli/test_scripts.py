"""The scripts as people run them, through to the file."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fewstep.coglet.server import free_port

ROOT = Path(__file__).resolve().parents[2]
# The Python that runs the tests has everything: with it first, the scripts make no environment.
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def run_script(name, *arguments, cwd, **variables):
    running = subprocess.Popen(
        [ROOT / "scripts" / name, *arguments],
        cwd=cwd,
        env={**os.environ, "PATH": PATH, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = running.communicate(timeout=280)
    except subprocess.TimeoutExpired:
        running.terminate()  # not kill: the script is to end its server
        running.wait(30)
        raise
    return subprocess.CompletedProcess(running.args, running.returncode, out, err)


def left_in(folder):
    """What a script left there, but for the cache folder that torch makes when it is imported."""
    return [path.name for path in folder.iterdir() if not path.name.startswith("torchinductor_")]


def test_predict_writes_the_file_and_prints_its_path_alone(tmp_path):
    arguments = ["-i", "prompt=a red house and a helicopter", "-i", "seed=7", "-o", "out.webp"]
    done = run_script("predict", *arguments, cwd=tmp_path, TMPDIR=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "out.webp\n"), done.stderr
    assert (tmp_path / "out.webp").read_bytes()[:4] == b"RIFF"
    assert "miniature" in done.stderr and "seed 7" in done.stderr
    assert "the miniature does not know: helicopter (try rocket)" in done.stderr
    assert left_in(tmp_path) == ["out.webp"]


def test_predict_tells_a_refusal_in_one_sentence_and_writes_nothing(tmp_path):
    done = run_script("predict", "-i", "prompt=x", "-i", "steps=9", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == (
        "the server refused the inputs: steps: 9 is greater than the maximum of 8"
    )
    assert "server's log" not in done.stderr and left_in(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_predict_that_is_stopped_leaves_no_server_and_no_files(number, tmp_path):
    running = subprocess.Popen(
        [ROOT / "scripts" / "predict", "-i", "prompt=x"],
        cwd=tmp_path,
        env={**os.environ, "PATH": PATH, "TMPDIR": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # under nohup, SIGHUP would be ignored
    )
    assert running.stderr is not None and "starting the server" in running.stderr.readline()
    while not servers_with(tmp_path):
        time.sleep(0.01)
    running.send_signal(number)
    assert running.wait(30) == 130
    assert not servers_with(tmp_path) and left_in(tmp_path) == []


def servers_with(folder):
    """The processes that were given `folder` for their outputs."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"FEWSTEP_OUTPUTS={folder}".encode() in environ.read_bytes():
                found.append(environ.parent.name)
    return found


def test_serve_ends_with_the_reason_when_the_model_cannot_be_loaded(tmp_path):
    done = run_script("serve", cwd=tmp_path, PORT=str(free_port()), FEWSTEP_MODEL="nothing")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("[settings] FEWSTEP_MODEL")


@pytest.mark.parametrize("name", ["predict", "serve"])
def test_help_needs_no_environment(name, tmp_path):
    for part in ("scripts", "fewstep"):
        shutil.copytree(ROOT / part, tmp_path / part)
    for part in ("predict.py", "pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / part, tmp_path)
    bare = tmp_path / "bin"
    bare.mkdir()
    (bare / "python3.11").symlink_to(Path(sys.base_prefix) / "bin" / "python3")
    done = subprocess.run(
        [tmp_path / "scripts" / name, "--help"],
        env={"PATH": f"{bare}{os.pathsep}/usr/bin{os.pathsep}/bin"},
        capture_output=True,
        text=True,
        timeout=10,
        check=False,
    )
    assert done.returncode == 0 and f"usage: scripts/{name}" in done.stdout, done.stderr
    assert not list(tmp_path.glob(".venv*"))


OTHER_PYTHON = """#!/bin/sh
echo "$PYTHONPATH: $*"
"""


def test_a_python_that_is_named_is_used_with_what_it_has(tmp_path):
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    other = tmp_path / "other"
    other.write_text(OTHER_PYTHON)
    other.chmod(0o755)
    done = subprocess.run(
        [tmp_path / "scripts" / "benchmark", "gpu", "--out", "a b.csv"],
        env={"PATH": "/usr/bin:/bin", "FEWSTEP_PYTHON": str(other), "PYTHONPATH": "wheels"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"{tmp_path}:wheels: -P -m fewstep.cli.benchmark gpu --out a b.csv\n"
    assert done.returncode == 0 and done.stderr.count("\n") == 1 and "FEWSTEP_PYTHON is set" in done.stderr
    assert not list(tmp_path.glob(".venv*"))


LISTING_PYTHON = """#!/usr/bin/env bash
case "$*" in *get_cpu_capability*) echo "$CAPABILITY"; exit ;; esac
shift 3  # of the extras, -m and pytest
[ "$1" != -n ] || shift 5  # of how many side by side
echo "${ATEN_CPU_CAPABILITY:-}/${ONEDNN_MAX_CPU_ISA:-}: $*" >> "$(dirname "$0")/ran"
exit "$(case "$*" in *numeric*) echo "$SECOND" ;; *) echo "$FIRST" ;; esac)"
"""


@pytest.mark.parametrize(
    ("arguments", "capability", "ends", "ran", "status"),
    [
        (("a.py", "-k", "x y"), "AVX512", (3, 0), ["/: a.py -k x y"], 3),
        ((), "AVX512", (0, 0), ["/: -m not slow"], 0),
        (("--all",), "AVX512", (0, 0), ["/: ", "avx2/AVX2: -m numeric"], 0),
        (("--all", "a.py"), "AVX512", (0, 5), ["/: a.py", "avx2/AVX2: -m numeric a.py"], 0),
        (("--all",), "AVX512", (0, 1), ["/: ", "avx2/AVX2: -m numeric"], 1),
        (("--all",), "AVX512", (1, 0), ["/: "], 1),
        (("--all",), "AVX2", (0, 0), ["/: "], 0),
        (("--all",), "DEFAULT", (0, 0), ["/: "], 0),
    ],
)
def test_all_tests_are_run_and_the_numeric_ones_once_more_for_avx2(
    arguments, capability, ends, ran, status, tmp_path
):
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "test", tmp_path / "scripts")
    (tmp_path / "scripts" / "python").write_text(LISTING_PYTHON)
    (tmp_path / "scripts" / "python").chmod(0o755)
    own = {"CAPABILITY": capability, "FIRST": str(ends[0]), "SECOND": str(ends[1])}
    done = subprocess.run(
        [tmp_path / "scripts" / "test", *arguments], env={"PATH": PATH, **own}, capture_output=True, text=True
    )
    assert (tmp_path / "scripts" / "ran").read_text().splitlines() == ran
    assert done.returncode == status
    left_out = "--all" in arguments and capability != "AVX512"
    assert ("this CPU has no AVX512 to do without" in done.stdout) == left_out
