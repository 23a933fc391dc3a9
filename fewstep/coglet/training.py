"""The work behind train(): scripts/train in a process of its own, gone when a training is cancelled."""

import asyncio
import codecs
import contextvars
import os
import subprocess
import sys
from pathlib import Path

from fewstep.coglet.server import ROOT
from fewstep.errors import Busy, InternalError, error_in

TAIL = 10_000  # characters of what it said last, in which the reason of a failure stands
TRACEBACK = "Traceback (most recent call last)"

_one_at_a_time = asyncio.Lock()


async def run_training(pictures: Path, out: Path, **options: object) -> None:
    """Run scripts/train on `pictures`, a zip, into the folder `out`; of `options`, None is left to it.

    What it says is the caller's to read. Being cancelled kills it. Raises Busy while another training runs,
    the FewstepError that it ended with, and InternalError for all else, which the server's log alone holds.
    """
    if _one_at_a_time.locked():
        raise Busy("a training is running already; send this one when it has ended", 60)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if value is not None]
    command = ["-P", "-m", "fewstep.cli.train", str(pictures), "--out", str(out), *flags]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(out.parent)}  # a killed one leaves nothing
    async with _one_at_a_time:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *command,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # ours may be how this worker speaks to coglet
            stderr=subprocess.PIPE,
        )
        assert process.stderr
        decoder, said = codecs.getincrementaldecoder("utf-8")("replace"), ""
        try:
            while content := await process.stderr.read(TAIL):
                text = decoder.decode(content)
                said = (said + text)[-2 * TAIL :]
                # coglet hands on what is written in this context; a traceback is for the server's log.
                context = contextvars.Context() if TRACEBACK in said else contextvars.copy_context()
                context.run(sys.stderr.write, text)
            status = await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
    if status:
        raise error_in(said.rstrip().rpartition("\n")[2]) or InternalError()
