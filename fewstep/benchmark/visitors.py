"""Many clients who type at once, before scripts/web as people start it: what they wait, and its memory.

Each types a sentence at ten keys a second, small images following as the page has it, waits until the full
one is there, and types the next. A fair share
is a turn after each of the others has had one: clients / images a second.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from dataclasses import dataclass, field
from itertools import cycle, islice
from typing import Any

import httpx2
from websockets.asyncio.client import connect

from fewstep.benchmark.measure import memory_bytes, serving_web
from fewstep.benchmark.page import PROMPTS

KEY_S = 0.1
WARM_UP_S = 10.0  # until memory is what it stays at


@dataclass
class Session:
    """What all clients together saw."""

    until: float  # by the monotonic clock
    waits: list[float] = field(default_factory=list)  # from the last key of a sentence to its image, seconds
    images: int = 0
    errors: int = 0
    memory_mb: list[float] = field(default_factory=list)  # of scripts/web, every second


def measure(clients: int, seconds: float, warm_up_s: float = WARM_UP_S) -> dict[str, Any]:
    """Return one row. Raises ServerFailed when scripts/web does not come up."""
    with serving_web() as (port, pid):
        began = time.monotonic()
        session = Session(began + warm_up_s + seconds)

        async def main() -> None:
            await asyncio.gather(_weigh(pid, session), *(_type(port, i, session) for i in range(clients)))

        asyncio.run(main())
        took = time.monotonic() - began
    share, longest = clients * took / session.images, max(session.waits)
    return {
        "visitors": clients,
        "seconds": round(took, 1),
        "pictures_per_s": round(session.images / took, 2),
        "sentences": len(session.waits),
        "wait_median_s": round(statistics.median(session.waits), 2),
        "wait_most_s": round(longest, 2),
        "fair_share_s": round(share, 2),
        "most_of_fair_shares": round(longest / share, 2),
        "errors": session.errors,
        "front_mb_before": round(session.memory_mb[int(warm_up_s)], 1),
        "front_mb_after": round(session.memory_mb[-1], 1),
    }


async def _type(port: int, i: int, session: Session) -> None:
    """Be client `i`: type one sentence after the other until time is up."""
    url = f"http://127.0.0.1:{port}"
    page = await asyncio.to_thread(httpx2.get, url, trust_env=False)
    cookie = {"Cookie": page.headers["set-cookie"].partition(";")[0]}
    live = url.replace("http", "ws") + "/live"
    async with connect(live, max_size=2**24, proxy=None, additional_headers=cookie) as socket:
        sentences, n = islice(cycle(PROMPTS), i, None), 0
        while time.monotonic() < session.until:
            sentence = next(sentences)
            watching = asyncio.create_task(_watch(socket, n + len(sentence), session))
            for end in range(1, len(sentence) + 1):
                n += 1
                request, quick = {"prompt": sentence[:end], "seed": i}, end < len(sentence)
                await socket.send(json.dumps({"type": "paint", "n": n, "quick": quick, "request": request}))
                await asyncio.sleep(KEY_S)
            began = time.monotonic() - KEY_S
            await asyncio.wait_for(watching, 120)
            session.waits.append(time.monotonic() - began)


async def _watch(socket: Any, last: int, session: Session) -> None:
    """Count what comes, until it is image `last`."""
    async for message in socket:
        fields = {"type": "image"} if isinstance(message, bytes) else json.loads(message)
        session.errors += fields["type"] == "failed"
        session.images += fields["type"] == "painted"
        if fields["type"] == "painted" and fields["n"] == last:
            return


async def _weigh(pid: int, session: Session) -> None:
    while time.monotonic() < session.until:
        session.memory_mb.append(memory_bytes(pid, "VmRSS") / 1024 / 1000)
        await asyncio.sleep(1)
