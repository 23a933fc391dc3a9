"""From the last keystroke to the image on the screen, in a browser: our page, and the usual small site.

The usual one waits until typing has paused for half a second, has the image saved as a PNG, and is told its
path. Both generate with the same Cog server.
"""

from __future__ import annotations

import asyncio
import base64
import shutil
import statistics
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from fewstep.coglet.server import Server, free_port
from fewstep.errors import SettingsError
from fewstep.models.specs import get_model
from fewstep.settings import Settings
from fewstep.web.app import create_app
from fewstep.web.worker_pool import RemoteWorker

KEY_MS = 120  # between keystrokes: a hundred words a minute
PROMPTS = (
    "a red house in the snow at night",
    "a blue sailboat on a lake at sunset",
    "a green tree in a meadow with mountains",
    "a white castle in the desert by day",
    "a pink balloon over a lavender field",
)
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
           "--disable-sync", "--no-first-run"]  # fmt: skip
LOADS = 7
LOADED = """() => [performance.getEntriesByName('first-contentful-paint')[0].startTime,
  performance.getEntriesByType('resource').concat(performance.getEntriesByType('navigation'))
    .reduce((sum, one) => sum + one.encodedBodySize, 0)]"""
LAST_KEY = "addEventListener('input', event => { window.lastKey = event.timeStamp }, true)"
USUAL = """<!doctype html><title>usual</title><input id=prompt><img id=picture>
<script>
let timer
document.querySelector('#prompt').addEventListener('input', event => {
  clearTimeout(timer)
  const prompt = event.target.value
  if (!prompt) return
  timer = setTimeout(async () => {
    const answer = await (await fetch('/paint', {method: 'POST', body: JSON.stringify({prompt})})).json()
    const picture = document.querySelector('#picture')
    picture.onload = () => requestAnimationFrame(() => {
      window.shown = {prompt, shown: performance.now(), paint_ms: answer.paint_ms}
    })
    picture.src = answer.path
  }, 500)
})
</script>"""


def measure(server: Server, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds beyond generating, of every prompt typed `rounds` times, the two pages in turns.

    Raises SettingsError without a Chromium.
    """
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SettingsError("there is no Chromium to measure in; on Debian: apt install chromium")
    url = f"http://{server.host}:{server.port}"
    with (
        tempfile.TemporaryDirectory() as folder,
        _serving(_ours(url, Path(folder))) as ours,
        _serving(_usual(server, Path(folder))) as usual,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=chromium, args=OPTIONS)
        loads = [_load(browser, ours) for _ in range(LOADS)]
        pages = {"fewstep": browser.new_page(), "debounce, PNG, path": browser.new_page()}
        for page, address in zip(pages.values(), (ours, usual), strict=True):
            page.add_init_script(LAST_KEY)
            page.goto(address)
            page.wait_for_timeout(1000)
            _beyond(page, PROMPTS[-1], address == ours)  # the first is slower
        found: dict[str, list[float]] = {name: [] for name in pages}
        for i in range(rounds * len(PROMPTS)):
            for name, page in pages.items():
                page.bring_to_front()
                found[name].append(_beyond(page, PROMPTS[i % len(PROMPTS)], name == "fewstep"))
        browser.close()
    rows = [{"page": name, **_summarised(values)} for name, values in found.items()]
    rows[0] |= {
        "first_paint_ms": round(statistics.median(first for first, _ in loads)),
        "kb": loads[0][1],
    }
    return rows


def _load(browser: Any, address: str) -> tuple[float, float]:
    """Of a page that nothing is cached of: the milliseconds until something is seen, and its kilobytes."""
    page = browser.new_context().new_page()
    page.goto(address)
    page.wait_for_load_state("networkidle")
    generate, size = page.evaluate(LOADED)
    page.context.close()
    return float(generate), round(size / 1000, 1)


def _beyond(page: Any, prompt: str, ours: bool) -> float:
    page.fill("#prompt", "")
    page.wait_for_timeout(700)
    page.locator("#prompt").press_sequentially(prompt, delay=KEY_MS)
    if ours:
        shown = page.wait_for_function(
            """prompt => {
                const {shownPrompt, shownN} = document.documentElement.dataset
                return shownPrompt === prompt && window.fewstepTimes.find(one => one.n === Number(shownN))
            }""",
            arg=prompt,
        ).json_value()
    else:
        found = "prompt => window.shown && window.shown.prompt === prompt && window.shown"
        shown = page.wait_for_function(found, arg=prompt).json_value()
    last = page.evaluate("window.lastKey")
    return float(shown["shown"] - last - shown["paint_ms"])


def _summarised(values: Sequence[float]) -> dict[str, Any]:
    cuts = statistics.quantiles(values, n=20)
    return {
        "samples": len(values),
        "median_ms": round(statistics.median(values), 1),
        "p95_ms": round(cuts[-1], 1),
        "least_ms": round(min(values), 1),
        "most_ms": round(max(values), 1),
    }


def _ours(url: str, folder: Path) -> Starlette:
    settings = Settings(web_data=folder / "data")
    return create_app(get_model("miniature"), settings, RemoteWorker(url, 60))


def _usual(server: Server, folder: Path) -> Starlette:
    async def page(request: Request) -> HTMLResponse:
        return HTMLResponse(USUAL)

    async def generate(request: Request) -> JSONResponse:
        body = {"input": {**await request.json(), "output_format": "png"}}
        _, answer = await asyncio.to_thread(server.post, "/predictions", body, 60)
        file = folder / f"{uuid.uuid4()}.png"
        file.write_bytes(base64.b64decode(answer["output"][0].partition(",")[2]))
        spent = sum(value for name, value in answer["metrics"].items() if name.endswith("_ms"))
        return JSONResponse({"path": f"/files/{file.name}", "paint_ms": spent})

    files = Mount("/files", StaticFiles(directory=folder))
    return Starlette(routes=[Route("/", page), Route("/paint", generate, methods=["POST"]), files])


@contextmanager
def _serving(app: Starlette) -> Iterator[str]:
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)
