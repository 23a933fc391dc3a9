"""The page in a real Chromium, before the real coglet with the miniature; skipped where there is none."""

import re
import shutil
import time
from contextlib import contextmanager

import numpy as np
import pytest
from conftest import FakeBackend, FakePool, decoded, encoded, running_app
from small import read
from test_live import difference

from fewstep.benchmark.page import LOADED
from fewstep.images.metadata import read_recipe

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here; on Debian: apt install chromium")
TEXT = "a red car in the snow at night"
OTHER = "a blue sailboat on a lake at sunset"
HOSTILE = "<img src=x onerror=window.hacked=1> <script>window.hacked=1</script>"


@pytest.fixture(scope="module")
def browser():
    quiet = ("background-networking", "component-update", "sync", "gpu", "quic")
    options = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in quiet)]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


class Tab:
    """One visitor's page; whatever its console or its network says that it should not is kept."""

    def __init__(self, browser, web, path="/", size=(1280, 800)):
        self.context = browser.new_context(viewport={"width": size[0], "height": size[1]})
        self.page = self.context.new_page()
        self.wrong, self.hosts = [], set()
        self.page.on("console", lambda m: m.type in ("error", "warning") and self.wrong.append(m.text))
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda one: self.hosts.add(re.sub(r"^(\w+://[^/]*).*", r"\1", one.url)))
        self.page.goto(web.url + path)
        self.page.wait_for_selector("#prompt")

    def type(self, text, delay_ms=20):
        self.page.locator("#prompt").press_sequentially(text, delay=delay_ms)

    def generate(self, prompt):
        """The image of this prompt, filled in at once."""
        self.page.fill("#prompt", prompt)
        return self.shown(prompt)

    def shown(self, prompt):
        """The image of this prompt, once it is on the screen in full size."""
        is_shown = """prompt => { const { shownPrompt, shownQuick } = document.documentElement.dataset
            return shownPrompt === prompt && shownQuick === 'false' }"""
        self.page.wait_for_function(is_shown, arg=prompt, timeout=60_000)
        return self.image()

    def image(self):
        """Its pixels: the page may not even fetch what it shows, as its policy has it."""
        url = self.page.evaluate(
            """() => { const picture = document.querySelector('#picture')
               const canvas = document.createElement('canvas')
               canvas.width = picture.naturalWidth; canvas.height = picture.naturalHeight
               canvas.getContext('2d').drawImage(picture, 0, 0); return canvas.toDataURL('image/png') }"""
        )
        return decoded(url)

    def image_after(self, act):
        """The image that `act` brings."""
        n = int(self.page.evaluate("document.documentElement.dataset.shownN || 0"))
        act()
        is_newer = "n => Number(document.documentElement.dataset.shownN) > n"
        self.page.wait_for_function(is_newer, arg=n, timeout=60_000)
        return self.rest()

    def rest(self):
        """The image that stands once all that was asked is shown, and for a moment nothing more is asked."""
        self.page.evaluate("window.restSince = undefined")
        self.page.wait_for_function(
            """() => { const { askedN, shownN } = document.documentElement.dataset
               window.restSince = askedN === shownN ? window.restSince ?? performance.now() : undefined
               return performance.now() - window.restSince > 500 }""",
            polling=50,
            timeout=60_000,
        )
        return self.image()

    def set(self, selector, value):
        self.page.locator(selector).evaluate(
            """(element, value) => { element.value = value; for (const kind of ['input', 'change'])
               element.dispatchEvent(new Event(kind, {bubbles: true})) }""",
            str(value),
        )

    def stroke(self, selector, start, end):
        """Draw over an element between two points, in shares of its width and height."""
        box = self.page.locator(selector).bounding_box()
        points = [(box["x"] + box["width"] * x, box["y"] + box["height"] * y) for x, y in (start, end)]
        self.page.mouse.move(*points[0])
        self.page.mouse.down()
        self.page.mouse.move(*points[1], steps=8)
        self.page.mouse.up()


@contextmanager
def opened(browser, web, path="/", **options):
    """A tab in which nothing was wrong, and which asked nobody but our server."""
    tab = Tab(browser, web, path, **options)
    try:
        yield tab
    finally:
        tab.context.close()
    assert tab.wrong == []
    assert all(host == web.url or host.startswith(("blob:", "data:")) for host in tab.hosts), tab.hosts


@pytest.fixture
def tab(browser, web):
    with opened(browser, web) as tab:
        yield tab


def away(a, b):
    return difference(a, b).mean()


def test_what_is_typed_key_by_key_is_seen(tab):
    tab.type(TEXT)
    assert read(tab.shown(TEXT)) >= {"red", "car", "snow", "night"}
    tab.rest()
    assert tab.page.evaluate("document.documentElement.dataset.shownPrompt") == TEXT


def test_unknown_words_are_named_once_typing_rests_and_a_known_one_is_a_click_away(tab):
    hint = tab.page.locator("#unknown")
    tab.type("a red helicopter in the sn")
    assert hint.is_hidden()  # half a word is no news
    hint.wait_for(timeout=60_000)
    assert hint.inner_text() == "The miniature does not know: helicopter (try rocket), sn"
    tab.image_after(hint.get_by_role("button").click)
    assert tab.page.input_value("#prompt") == "a red rocket in the sn"
    tab.image_after(lambda: tab.type("ow"))
    hint.wait_for(state="hidden", timeout=60_000)


def test_the_page_is_light_quick_and_asks_nobody_else(browser, web):
    with opened(browser, web) as tab:
        tab.page.wait_for_load_state("networkidle")
        generate, weight = tab.page.evaluate(LOADED)
    assert tab.hosts == {web.url}
    assert weight < 150_000
    assert generate < 5000  # how quick it is, is benchmarks/page.csv's to say; this is for a page that hangs


@pytest.mark.slow
def test_a_locked_seed_stays_and_a_shuffled_one_is_another(tab):
    tab.generate(TEXT)
    page = tab.page
    tab.set("#seed", 5)
    if page.locator("#seed-lock").get_attribute("aria-pressed") != "true":
        page.click("#seed-lock")
    first = tab.rest()
    assert away(tab.image_after(lambda: page.locator("#prompt").press("Enter")), first) < 1
    assert page.input_value("#seed") == "5"
    assert away(tab.image_after(lambda: page.click("#seed-shuffle")), first) > 3
    assert page.input_value("#seed") != "5"


@pytest.mark.slow
def test_the_history_brings_an_image_back_with_all_its_settings(tab):
    tab.generate(TEXT)
    tab.set("#steps", 2)
    first = tab.rest()
    tab.generate(OTHER)
    tab.set("#steps", 6)
    tab.rest()
    tab.page.locator(".history-item").nth(2).click()  # the newest is first
    tab.page.wait_for_function("text => document.querySelector('#prompt').value === text", arg=TEXT)
    assert tab.page.input_value("#steps") == "2"
    time.sleep(0.5)
    assert away(tab.image(), first) < 1


@pytest.mark.slow
def test_two_images_are_compared_by_keyboard_too(tab):
    for prompt in (TEXT, OTHER):
        tab.generate(prompt)
        tab.page.wait_for_timeout(700)
    tab.page.locator("#prompt").evaluate("element => element.blur()")
    tab.page.keyboard.press("c")
    seam = tab.page.locator("#wipe-at")
    assert tab.page.locator("#wipe img").count() == 2 and seam.input_value() == "50"
    seam.press("ArrowRight")
    assert int(seam.input_value()) > 50
    tab.page.keyboard.press("Escape")
    assert tab.page.locator("#wipe").is_hidden() and tab.page.locator("#picture").is_visible()


@pytest.mark.slow
def test_a_download_is_the_image_with_its_recipe(tab, tmp_path):
    tab.generate(TEXT)
    tab.rest()
    with tab.page.expect_download() as download:
        tab.page.click("#download")
    file = tmp_path / "a.webp"
    download.value.save_as(file)
    assert read_recipe(file)["prompt"] == TEXT
    assert re.fullmatch(r"fewstep-\d+\.webp", download.value.suggested_filename)


@pytest.mark.slow
def test_an_image_is_dropped_in_and_a_mask_is_generated_over_it(tab):
    tab.generate(TEXT)
    plain = tab.rest()
    upload = {"name": "a.png", "mimeType": "image/png", "buffer": encoded(plain.resize((256, 256)))}
    tab.image_after(lambda: tab.page.set_input_files("#image-file", upload))
    tab.set("#strength", 0.3)
    near = away(tab.rest(), plain)
    tab.set("#strength", 1)
    tab.generate(OTHER)
    assert near < away(tab.rest(), plain)
    tab.page.click("#mask-edit")
    for part in np.linspace(0.05, 0.95, 12):  # the left third, stroke by stroke
        tab.stroke("#mask-canvas", (0.02, part), (0.25, part))
    masked = tab.image_after(lambda: tab.page.click("#mask-done"))
    changed = difference(masked, plain)
    assert changed[:, 160:].mean() < 5 < changed[:, :64].mean()


@pytest.mark.slow
def test_a_drawing_is_generated_from(tab):
    tab.generate(TEXT)
    tab.page.click("#draw")
    tab.stroke("#draw-canvas", (0.05, 0.05), (0.95, 0.95))
    tab.image_after(lambda: tab.page.click("#draw-done"))
    assert tab.page.locator("#strength").is_visible()
    tab.page.click("#image-remove")
    assert not tab.page.locator("#strength").is_visible()


@pytest.mark.slow
def test_gallery_reviews_and_a_name_as_two_clients_see_them(browser, web, tab):
    page = tab.page
    page.click("#you-open")
    page.fill("#nickname", HOSTILE[:40])
    page.click("#nickname-save")
    page.wait_for_timeout(300)
    page.keyboard.press("Escape")
    prompt = f"{HOSTILE} a red house"
    tab.generate(prompt)
    tab.rest()
    page.click("#keep")
    page.wait_for_timeout(500)
    page.click("#reviews-open")
    rating = page.locator("input[name=rating][value='4']")
    rating.check(force=True)
    page.wait_for_function("document.querySelector('#reviews-state').textContent !== 'Loading'")
    assert rating.is_checked()  # what comes from the server while one chooses takes nothing away
    page.fill("#review-text", HOSTILE)
    page.click("#review-send")
    page.wait_for_selector(".review")
    page.keyboard.press("Escape")
    with opened(browser, web) as other:
        theirs = other.page
        theirs.click("#gallery-open")
        theirs.wait_for_selector(".gallery-item")
        theirs.keyboard.press("Escape")
        theirs.click("#reviews-open")
        theirs.wait_for_selector(".review")
        review = theirs.locator(".review").first.inner_text()
        assert "<script>" in review and HOSTILE[:40] in review
        assert theirs.locator("#delete-data").count() == 1
        theirs.keyboard.press("Escape")
        theirs.click("#gallery-open")
        theirs.locator(".gallery-item button, button.gallery-item").first.click()
        theirs.wait_for_function("text => document.querySelector('#prompt').value === text", arg=prompt)
        assert page.evaluate("window.hacked") is theirs.evaluate("window.hacked") is None
    page.click("#you-open")
    page.click("#delete-data")
    page.click("#delete-confirm")
    page.wait_for_timeout(500)
    with web.client() as client:
        assert client.get("/api/reviews").json()["count"] == 0
        assert client.get("/api/pictures").json()["pictures"] == []


@pytest.mark.slow
def test_two_clients_generate_at_once_and_each_sees_their_own(browser, web, tab):
    with opened(browser, web) as other:
        for end in (*range(3, 33, 3), None):
            tab.page.fill("#prompt", TEXT[:end])
            other.page.fill("#prompt", OTHER[:end])
        assert read(tab.shown(TEXT)) >= {"red", "car"}
        assert read(other.shown(OTHER)) >= {"blue", "sailboat"}


@pytest.mark.slow
@pytest.mark.parametrize("size", [(360, 740), (430, 930), (768, 1024), (1440, 900)])
def test_nothing_juts_out_at_any_width_and_the_image_is_in_sight(browser, web, size):
    with opened(browser, web, size=size) as tab:
        tab.generate(TEXT)
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= size[0]
        for selector in ("#picture", "#prompt"):
            box = tab.page.locator(selector).bounding_box()
            assert box["y"] >= 0 and box["y"] + box["height"] <= size[1] and box["width"] > 100


@pytest.mark.slow
def test_a_share_link_generates_the_same(browser, web, tab):
    tab.generate(TEXT)
    first = tab.rest()
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    tab.page.click("#share")
    tab.page.wait_for_timeout(300)
    link = tab.page.evaluate("navigator.clipboard.readText()")
    with opened(browser, web, link.removeprefix(web.url)) as other:
        assert away(other.shown(TEXT), first) < 1


@pytest.mark.slow
def test_a_page_whose_server_is_gone_says_so_and_comes_back(browser, tmp_path):
    with running_app(tmp_path, FakePool(FakeBackend(0.05))) as web:
        tab = Tab(browser, web)
        tab.generate("any")
        web.set_ready(False)
        tab.page.wait_for_function("() => /moment/i.test(document.querySelector('#status').innerText)")
        web.set_ready(True)
        tab.page.wait_for_function("() => !/moment/i.test(document.querySelector('#status').innerText)")
    tab.page.wait_for_function("() => /connect|offline/i.test(document.querySelector('#status').innerText)")
    assert tab.page.locator("#picture").is_visible()
    tab.context.close()


@pytest.mark.slow
def test_a_large_model_generates_small_while_one_types_and_full_size_when_typing_rests(browser, tmp_path):
    backend = FakeBackend(0.05)
    with running_app(tmp_path, FakePool(backend), model="sdxl") as web, opened(browser, web) as tab:
        tab.page.locator("input[name=number][value='4']").check(force=True)
        tab.type("a red house", 60)
        tab.page.wait_for_selector("html[data-shown-quick='false'][data-shown-prompt='a red house']")
        asked = [(one["width"], one["num_outputs"]) for one in backend.inputs if one["prompt"]]
    assert asked[-1] == (1024, 4) and set(asked[:-1]) == {(512, 1)} and len(asked) > 3
    assert len({one["seed"] for one in backend.inputs}) == 1


@pytest.mark.slow
def test_where_images_are_billed_nothing_is_generated_unasked(browser, tmp_path):
    backend = FakeBackend()
    pool = FakePool(backend)
    pool.live = False
    with running_app(tmp_path, pool) as web, opened(browser, web, "/#prompt=a+blue+house&seed=5") as tab:
        tab.page.fill("#prompt", "a red house")
        tab.page.locator("#steps").press("ArrowRight")
        time.sleep(1)
        assert backend.begun == []
        tab.page.locator("#prompt").press("Enter")
        tab.shown("a red house")
    assert backend.begun == ["a red house"]


@pytest.mark.slow
def test_the_keyboard_alone_is_enough(tab):
    page = tab.page
    page.keyboard.press("Escape")
    page.locator("#prompt").focus()
    page.keyboard.type(TEXT)
    tab.shown(TEXT)
    page.locator("#prompt").evaluate("element => element.blur()")
    page.keyboard.press("?")
    assert page.locator("#shortcuts").is_visible()
    page.keyboard.press("Escape")
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('button, input, select, textarea')]
            .filter(one => one.offsetParent && !(one.getAttribute('aria-label') || one.title
                || one.getAttribute('aria-labelledby') || one.innerText?.trim() || one.labels?.length))
            .map(one => one.outerHTML)"""
    )
    assert unnamed == []
