"""Many visitors who type at once, before scripts/web as people start it: what they wait, and its memory.

Each types a sentence at ten keys a second, waits until its image is there, and types the next. A fair share
is a turn after each of the others has had one: visitors / images a second.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from websockets.asyncio.client import connect

from fewstep.benchmark.page import PROMPTS
from fewstep.coglet.server import ROOT, ServerFailed, free_port

KEY_S = 0.1
WARM_UP_S = 10.0  # until memory is what it stays at


def measure(visitors: int, seconds: float) -> dict[str, Any]:
    """One row. Raises ServerFailed when scripts/web does not come up."""
    with _web() as (port, pid):
        waits: list[float] = []
        counts = {"pictures": 0, "errors": 0}
        memory: list[float] = []

        async def main() -> None:
            until = time.monotonic() + WARM_UP_S + seconds
            typing = [_visit(port, i, until, waits, counts) for i in range(visitors)]
            await asyncio.gather(*typing, _weigh(pid, until, memory))

        began = time.monotonic()
        asyncio.run(main())
        took = time.monotonic() - began
    rate = counts["pictures"] / took
    share = visitors / rate
    return {
        "visitors": visitors,
        "seconds": round(took, 1),
        "pictures_per_s": round(rate, 2),
        "sentences": len(waits),
        "wait_median_s": round(statistics.median(waits), 2),
        "wait_most_s": round(max(waits), 2),
        "fair_share_s": round(share, 2),
        "most_of_fair_shares": round(max(waits) / share, 2),
        "errors": counts["errors"],
        "front_mb_before": round(memory[int(WARM_UP_S)], 1),
        "front_mb_after": round(memory[-1], 1),
    }


async def _visit(port: int, i: int, until: float, waits: list[float], counts: dict[str, int]) -> None:
    url = f"http://127.0.0.1:{port}"
    page = await asyncio.to_thread(httpx2.get, url, trust_env=False)
    cookie = {"Cookie": page.headers["set-cookie"].partition(";")[0]}
    live = url.replace("http", "ws") + "/live"
    async with connect(live, max_size=2**24, proxy=None, additional_headers=cookie) as socket:
        n = 0
        shown = asyncio.Condition()
        last = [0]

        async def watch() -> None:
            async for message in socket:
                if isinstance(message, bytes):
                    continue
                fields = json.loads(message)
                counts["errors"] += fields["type"] == "failed"
                if fields["type"] == "painted":
                    counts["pictures"] += 1
                    async with shown:
                        last[0] = fields["n"]
                        shown.notify_all()

        watching = asyncio.create_task(watch())
        turn = i
        while time.monotonic() < until:
            sentence = PROMPTS[turn % len(PROMPTS)]
            turn += 1
            for end in range(1, len(sentence) + 1):
                n += 1
                wish = {"prompt": sentence[:end], "seed": i}
                await socket.send(json.dumps({"type": "paint", "n": n, "quick": False, "wish": wish}))
                await asyncio.sleep(KEY_S)
            began = time.monotonic() - KEY_S
            async with shown:
                while last[0] != n:
                    await asyncio.wait_for(shown.wait(), 120)
            waits.append(time.monotonic() - began)
        watching.cancel()


async def _weigh(pid: int, until: float, memory: list[float]) -> None:
    while time.monotonic() < until:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
        memory.append(next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1000)
        await asyncio.sleep(1)


@contextmanager
def _web() -> Iterator[tuple[int, int]]:
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fewstep.cli.web", "--port", str(port), "--no-open"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "FEWSTEP_WEB_DATA": folder},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr
        try:
            while not (line := process.stderr.readline()).startswith("ready: "):
                if not line:
                    raise ServerFailed("scripts/web did not come up")
            # Its log; were it not read, the server would wait for that.
            threading.Thread(target=process.stderr.read, daemon=True).start()
            yield port, process.pid
        finally:
            process.terminate()
            process.wait(60)
