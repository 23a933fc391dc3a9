"""The process behind train(), in the place of scripts/train: what it says, and how it ends."""

import asyncio
import contextvars
import io
from types import SimpleNamespace

import pytest

from fewstep.coglet import training
from fewstep.errors import DatasetError, InternalError

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
