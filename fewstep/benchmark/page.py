"""From the last keystroke to the image on the screen: a person at scripts/web, in a browser."""

from __future__ import annotations

import shutil
import statistics
from itertools import cycle, islice
from typing import Any

from fewstep.benchmark.measure import serving_web
from fewstep.errors import SettingsError

KEY_MS = 120  # between keystrokes: a hundred words a minute
PROMPTS = (
    "a fox in the snow at night",
    "a blue sailboat on a lake at sunset",
    "a green tree in a meadow with mountains",
    "a white castle in the desert by day",
    "a fox in a lavender field",
)
OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
           "--disable-sync", "--no-first-run"]  # fmt: skip
LOADS = 7
LOADED = """() => [performance.getEntriesByName('first-contentful-paint')[0].startTime,
  performance.getEntriesByType('resource').concat(performance.getEntriesByType('navigation'))
    .reduce((sum, one) => sum + one.encodedBodySize, 0)]"""
LAST_KEY = "addEventListener('input', event => { window.lastKey = event.timeStamp }, true)"
# What the page knows of the image of a prompt once it is on the screen.
SHOWN = """prompt => {
  const {shownPrompt, shownN} = document.documentElement.dataset
  return shownPrompt === prompt && window.fewstepTimes.find(one => one.n === Number(shownN))
}"""


def measure(rounds: int) -> dict[str, Any]:
    """Return the milliseconds beyond generating, of every prompt typed `rounds` times, as a row.

    Raises SettingsError without a Chromium, ServerFailed when scripts/web does not come up.
    """
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SettingsError("there is no Chromium to measure in; on Debian: apt install chromium")
    with serving_web() as (port, _), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=OPTIONS)
        address = f"http://127.0.0.1:{port}"
        loads = [_load(browser, address) for _ in range(LOADS)]
        page = browser.new_page()
        page.add_init_script(LAST_KEY)
        page.goto(address)
        page.wait_for_timeout(1000)
        prompts = islice(cycle(PROMPTS), 1 + rounds * len(PROMPTS))
        times = [_beyond_ms(page, prompt) for prompt in prompts][1:]  # the first does not count
        browser.close()
    return {
        "page": "fewstep",
        "samples": len(times),
        "median_ms": round(statistics.median(times), 1),
        "p95_ms": round(statistics.quantiles(times, n=20)[-1], 1),
        "least_ms": round(min(times), 1),
        "most_ms": round(max(times), 1),
        "first_paint_ms": round(statistics.median(first for first, _ in loads)),
        "kb": loads[0][1],
    }


def _load(browser: Any, address: str) -> tuple[float, float]:
    """Load a page of which nothing is cached: the milliseconds until something is seen, and its kilobytes."""
    page = browser.new_context().new_page()
    page.goto(address)
    page.wait_for_load_state("networkidle")
    first, size = page.evaluate(LOADED)
    page.context.close()
    return float(first), round(size / 1000, 1)


def _beyond_ms(page: Any, prompt: str) -> float:
    """Type a prompt; the milliseconds from the last key to its image, beyond those of generating."""
    page.fill("#prompt", "")
    page.wait_for_timeout(700)
    page.locator("#prompt").press_sequentially(prompt, delay=KEY_MS)
    shown = page.wait_for_function(SHOWN, arg=prompt).json_value()
    return float(shown["shown"] - page.evaluate("window.lastKey") - shown["paint_ms"])
