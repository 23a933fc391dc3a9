"""The work behind train(): scripts/train in a process of its own, gone when a training is cancelled."""

import asyncio
import codecs
import contextvars
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from fewstep.coglet.server import ROOT, WATCHED
from fewstep.errors import Busy, InternalError, error_in
from fewstep.images.outputs import KEEP_S

TAIL = 10_000  # characters of what it said last, in which the reason of a failure stands
TRACEBACK = "Traceback (most recent call last)"
KEPT = "fewstep-training-"  # begins the name of a folder that holds what a training made

_one_at_a_time = asyncio.Lock()


async def run_training(pictures: Path, out: Path, **options: object) -> None:
    """Run scripts/train on `pictures`, a zip, into the folder `out`; of `options`, None is left to it.

    What it says is the caller's to read. Being cancelled, or losing this process, ends it and all that it
    started. Raises Busy while another training runs, the FewstepError that it ended with, and InternalError
    for all else, which the server's log alone holds.
    """
    if _one_at_a_time.locked():
        raise Busy("a training is running already; send this one when it has ended", 60)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
    command = [sys.executable, "-P", "-m", "fewstep.cli.train", str(pictures), "--out", str(out), *flags]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(out.parent)}  # a killed one leaves nothing
    async with _one_at_a_time:
        status, last = await _run(command, environ)
    if status:
        raise (error_in(last) if last.startswith("[") else None) or InternalError()


def keep(result: Path) -> Path:
    """Move `result` to where Cog reads it once train() has returned; what lay there for ten minutes goes."""
    for folder in Path(tempfile.gettempdir()).glob(f"{KEPT}*"):
        with suppress(OSError):  # it is another's, or gone
            if folder.stat().st_mtime < time.time() - KEEP_S:
                shutil.rmtree(folder)
    return Path(shutil.move(result, Path(tempfile.mkdtemp(prefix=KEPT), result.name)))


async def _run(command: list[str], environ: dict[str, str]) -> tuple[int, str]:
    """Hand on what `command` says; its exit status, and its last line."""
    decoder, said, unforeseen = codecs.getincrementaldecoder("utf-8")("replace"), "", False
    # Not asyncio's, which a cancel can interrupt when the process is there and nobody has it yet.
    with subprocess.Popen(
        ["/bin/sh", "-c", WATCHED, "sh", *command],
        env=environ,
        stdin=subprocess.PIPE,  # the watcher's: it ends with this process
        stdout=subprocess.DEVNULL,  # ours may be how this worker speaks to coglet
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert isinstance(process.stderr, io.BufferedReader)
        try:
            while content := await asyncio.to_thread(process.stderr.read1, TAIL):
                text = decoder.decode(content)
                said = (said + text)[-2 * TAIL :]
                # coglet hands on what is written in this context; a traceback is for the server's log, and
                # so is all that follows it.
                unforeseen = unforeseen or TRACEBACK in said
                context = contextvars.Context() if unforeseen else contextvars.copy_context()
                context.run(_hand_on, text)
            return await asyncio.to_thread(process.wait), said.rstrip().rpartition("\n")[2]
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the watcher too, which is left when all went well
            await asyncio.to_thread(process.wait)


def _hand_on(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()  # coglet waits for the end of a line, which a progress bar's only has when all is done
