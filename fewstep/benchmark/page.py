"""From the last keystroke to the image on the screen: a person at scripts/web, in a browser."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Iterator
from functools import partial
from itertools import cycle
from typing import Any

from fewstep.benchmark.measure import in_turns, serving_web
from fewstep.errors import SettingsError

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
# What the page knows of the image of a prompt once it is on the screen.
SHOWN = """prompt => {
  const {shownPrompt, shownN} = document.documentElement.dataset
  return shownPrompt === prompt && window.fewstepTimes.find(one => one.n === Number(shownN))
}"""


def measure(rounds: int) -> list[dict[str, Any]]:
    """Return a row of the milliseconds beyond generating, of every prompt typed `rounds` times.

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
        typed = {"fewstep": partial(_beyond_ms, page, cycle(PROMPTS))}
        times = in_turns(typed, rounds * len(PROMPTS))["fewstep"]
        browser.close()
    figures = {
        "median_ms": statistics.median(times),
        "p95_ms": statistics.quantiles(times, n=20)[-1],
        "least_ms": min(times),
        "most_ms": max(times),
    }
    return [
        {
            "page": "fewstep",
            "samples": len(times),
            **{name: round(value, 1) for name, value in figures.items()},
            "first_paint_ms": round(statistics.median(first for first, _ in loads)),
            "kb": loads[0][1],
        }
    ]


def _load(browser: Any, address: str) -> tuple[float, float]:
    """Load a page of which nothing is cached: the milliseconds until something is seen, and its kilobytes."""
    page = browser.new_context().new_page()
    page.goto(address)
    page.wait_for_load_state("networkidle")
    first, size = page.evaluate(LOADED)
    page.context.close()
    return float(first), round(size / 1000, 1)


def _beyond_ms(page: Any, prompts: Iterator[str]) -> float:
    """Type the next prompt; the milliseconds from the last key to its image, beyond those of generating."""
    prompt = next(prompts)
    page.fill("#prompt", "")
    page.wait_for_timeout(700)
    page.locator("#prompt").press_sequentially(prompt, delay=KEY_MS)
    shown = page.wait_for_function(SHOWN, arg=prompt).json_value()
    return float(shown["shown"] - page.evaluate("window.lastKey") - shown["paint_ms"])
