"""The process behind train(), in the place of scripts/train: what it says, and how it ends."""

import asyncio
import contextvars
import io
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from processes import naming

from fewstep.coglet import training
from fewstep.errors import DatasetError, InternalError

# Starts a process that keeps its stderr open, and waits for it, for longer than a test.
LONG = '[ "$1" = child ] && sleep 30 && exit; "$0" child & echo begun >&2; wait'
CALLER = contextvars.ContextVar("caller", default="nobody")


@pytest.fixture
def heard(monkeypatch):
    """What is written on stderr, by whether it was in the caller's own context."""
    texts = {"me": "", "nobody": ""}

    class Stderr(io.StringIO):
        def write(self, text):
            texts[CALLER.get()] += text
            return len(text)

    monkeypatch.setattr(training, "sys", SimpleNamespace(stderr=Stderr()))
    return texts


async def run(folder, script, **options):
    """Run `script` as if it were Python, which is scripts/train."""
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    training.sys.executable = str(python)
    CALLER.set("me")
    await training.run_training(folder / "images.zip", folder / "run", **options)


def test_what_it_is_told_are_the_commands_own_options(tmp_path, heard):
    script = 'echo "$@ in $TMPDIR" >&2'
    asyncio.run(run(tmp_path, script, learning_rate=1e-4, rank=None, caption="-- a b"))
    own = f"-P -m fewstep.cli.train {tmp_path}/images.zip --out {tmp_path}/run"
    assert heard["me"] == f"{own} --learning-rate=0.0001 --caption=-- a b in {tmp_path}\n"


def test_the_reason_is_the_error_that_its_last_line_says(tmp_path, heard):
    with pytest.raises(DatasetError, match="there is no picture"):
        asyncio.run(run(tmp_path, "echo begun >&2; echo [dataset] there is no picture >&2; exit 1"))


def test_what_is_unforeseen_is_for_the_servers_log_alone(tmp_path, heard):
    script = 'echo begun >&2; sleep 0.5; echo "Traceback (most recent call last)" >&2; echo [x] /secret >&2'
    with pytest.raises(InternalError):
        asyncio.run(run(tmp_path, f"{script}; sleep 0.5; echo ValueError: more >&2; exit 1"))
    assert heard["me"] == "begun\n" and "/secret" in heard["nobody"] and "more" in heard["nobody"]


def test_nothing_of_a_traceback_reaches_the_caller_however_long_it_is(tmp_path, heard):
    lines = "for i in $(seq 2000); do echo a line of the traceback >&2; done; sleep 0.5"
    script = f'echo "Traceback (most recent call last)" >&2; {lines}; echo /secret >&2; exit 1'
    with pytest.raises(InternalError):
        asyncio.run(run(tmp_path, script))
    assert heard["me"] == "" and heard["nobody"].endswith("/secret\n")


def test_a_code_within_another_message_is_no_reason(tmp_path, heard):
    with pytest.raises(InternalError):
        asyncio.run(run(tmp_path, "echo ValueError: [dataset] /secret >&2; exit 1"))


@pytest.mark.timeout(60)
def test_a_cancel_ends_it_and_what_it_started(tmp_path, heard):
    async def cancel() -> None:
        running = asyncio.create_task(run(tmp_path, LONG))
        while not heard["me"]:
            await asyncio.sleep(0.01)
        assert len(naming(tmp_path)) > 2  # the watcher, too
        running.cancel()
        await running

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(cancel())
    while naming(tmp_path):
        time.sleep(0.01)


@pytest.mark.timeout(60)
def test_a_cancel_while_it_starts_leaves_nothing_and_lets_the_next_one_run(tmp_path, heard):
    async def cancel_after(turns: int) -> None:
        running = asyncio.create_task(run(tmp_path, LONG))
        for _ in range(turns):
            await asyncio.sleep(0)
        running.cancel()
        await running

    for turns in range(8):
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(cancel_after(turns))
    while naming(tmp_path):
        time.sleep(0.01)
    asyncio.run(run(tmp_path, "echo done >&2"))
    assert heard["me"].endswith("done\n")


@pytest.mark.timeout(60)
def test_it_ends_with_the_process_that_waits_for_it(tmp_path):
    (tmp_path / "python").write_text(f"#!/bin/sh\n{LONG}\n")
    (tmp_path / "python").chmod(0o755)
    worker = (
        "import asyncio, sys; from pathlib import Path; from fewstep.coglet.training import run_training\n"
        "sys.executable = 'python'; asyncio.run(run_training(Path('images.zip'), Path('out')))"
    )
    environ = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-c", worker]
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE) as process:
        assert process.stderr
        assert process.stderr.readline() == b"begun\n"
        process.kill()
    while naming(tmp_path):
        time.sleep(0.01)


def test_a_result_is_kept_for_cog_and_removed_after_ten_minutes(tmp_path, monkeypatch):
    monkeypatch.setattr(training.tempfile, "tempdir", str(tmp_path))
    results, kept = [tmp_path / name for name in ("old", "new", "newer")], []
    for result in results:
        result.write_text(result.name)
        kept.append(training.keep(result))
        if result.name == "old":
            os.utime(kept[0].parent, (0, 0))
    assert [path.exists() for path in kept] == [False, True, True]
    assert [path.read_text() for path in kept[1:]] == ["new", "newer"] and not any(map(Path.exists, results))
