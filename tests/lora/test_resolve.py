"""Style LoRAs by name, from the hub and from addresses. Reading is a fake: test_merge.py has the real."""

import asyncio
import hashlib
import json
import os
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fewstep.errors import DeadlineExceeded, DownloadError, InvalidRequest, LoraError
from fewstep.lora.resolve import LoraResolver
from fewstep.lora.types import LoraSource, parse_source
from fewstep.models.specs import MODELS
from fewstep.request import Inputs
from fewstep.settings import Settings

PAPER, PIXELS = b"paper" * 200, b"pixels" * 200


def hash_of(content):
    return hashlib.sha256(content).hexdigest()


@dataclass
class Lora:
    sha256: str
    size: int


class Reader:
    """Counts how often each file was read; refuses those that begin with "bad"."""

    def __init__(self):
        self.reads = Counter()

    def __call__(self, path, sha256):
        content = path.read_bytes()
        assert hash_of(content) == sha256
        self.reads[content] += 1
        if content.startswith(b"bad"):
            raise LoraError("has 2 of 3 modules that do not fit this model", ", first QQQ_cancelled")
        return Lora(sha256, len(content))


@pytest.fixture
def site():
    """Pages by path, with the log of what was asked for and with which token."""
    pages, asked = {}, []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers.get("Authorization")))
            status, content = pages.get(self.path, (404, b""))
            if callable(content):
                content = content()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    server.pages, server.asked, server.origin = pages, asked, f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def folder(tmp_path):
    """This server's styles of the model."""
    folder = tmp_path / "styles" / "miniature"
    folder.mkdir(parents=True)
    (folder / "paper-cut.safetensors").write_bytes(PAPER)
    return folder


@pytest.fixture
def settings(folder, tmp_path, site):
    hub = {"hf_endpoint": site.origin, "hf_token": "hf_secret", "style_repos": ("me/private",)}
    return Settings(styles_root=tmp_path / "styles", style_cache=tmp_path / "cache", deadline_s=5, **hub)


@pytest.fixture
def reader():
    return Reader()


@pytest.fixture
def styles(settings, reader):
    return LoraResolver(settings, reader)


PAGE = "/a/b/resolve/main/x.safetensors"


def refs(*names):
    inputs = dict(zip(("style", "extra_style"), names, strict=False))
    return Inputs.create(MODELS["miniature"], prompt="a house", **inputs).styles


def load(styles, *names):
    return asyncio.run(styles.load(refs(*names)))


def list_files(site, sha, files):
    listed = {"sha": sha, "siblings": [{"rfilename": file} for file in files]}
    site.pages["/api/models/a/b"] = (200, json.dumps(listed).encode())


def cached(settings):
    return {path.read_bytes() for path in settings.style_cache.iterdir()}


@pytest.mark.parametrize(
    ("kind", "place", "file"),
    [
        *(("folder", "paper-cut", ""), ("folder", "paper_cut.v1.2", ""), ("hub", "owner/repo", "")),
        ("hub", "owner/repo", "a.safetensors"),
        ("hub", "owner/repo", "sub folder/a.safetensors"),
        ("url", "https://civitai.com/api/download/models/1", ""),
    ],
)
def test_what_a_source_means(kind, place, file):
    text = f"{place}/{file}" if file else place
    assert parse_source("style", text) == LoraSource(kind, place, file)


@pytest.mark.parametrize(
    "text",
    [
        ".", "..", "...", "../x", "a/..", "../../etc/passwd", "/etc/passwd", "a//b", "a/b/../c.safetensors",
        "a/b/c.bin", "a/b/", "/a/b", "~/x", "a b", "ä", "a\\b", "x" * 97, "http://x.org/a.safetensors",
        "file:///etc/passwd", "ftp://x/y", "data:,x", "s3://a/b", "javascript:1", "a/b/c.safetensors\n", " ",
    ],
)  # fmt: skip
def test_what_names_nothing_is_refused_before_any_work(text):
    with pytest.raises(InvalidRequest, match=r"^\[invalid_request\] style names no LoRA; give the name of"):
        parse_source("style", text)


def test_a_style_of_the_folder_is_found_with_and_without_its_suffix(styles):
    [one], [other] = load(styles, "paper-cut"), load(styles, "paper-cut.safetensors")
    assert one is other and one.sha256 == hash_of(PAPER)


def test_a_style_that_is_not_there_is_refused_and_no_link_leads_out_of_the_folder(styles, folder, tmp_path):
    said = "style is none of this server's styles; choose one of"
    with pytest.raises(InvalidRequest, match=f"{said} paper-cut"):
        load(styles, "paper-cat")
    (tmp_path / "secret.safetensors").write_bytes(PIXELS)
    (folder / "link.safetensors").symlink_to(tmp_path / "secret.safetensors")
    with pytest.raises(InvalidRequest, match=said):
        load(styles, "link")


def test_a_file_that_was_replaced_is_read_anew_even_at_equal_size_and_time(styles, folder, reader):
    path, other = folder / "paper-cut.safetensors", folder / "paper-cut.new"
    load(styles, "paper-cut")
    path.write_bytes(PIXELS)
    load(styles, "paper-cut")
    other.write_bytes(PIXELS[::-1])
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    other.replace(path)
    [after] = load(styles, "paper-cut")
    assert after.sha256 == hash_of(PIXELS[::-1])
    assert reader.reads == {PAPER: 1, PIXELS: 1, PIXELS[::-1]: 1}


def test_one_content_under_two_names_is_read_once(styles, settings, site, reader):
    site.pages[PAGE] = (200, PAPER)
    one, other = load(styles, "paper-cut", "a/b/x.safetensors")
    assert one is other and reader.reads == {PAPER: 1}


def test_a_hub_file_is_fetched_once_without_the_operators_token(styles, site, settings):
    path = "/owner/repo/resolve/main/sub%20folder/x.safetensors"
    site.pages[path] = (200, PIXELS)
    for _ in range(3):
        [lora] = load(styles, "owner/repo/sub folder/x.safetensors")
    assert lora.sha256 == hash_of(PIXELS)
    assert site.asked == [(path, None)] and cached(settings) == {PIXELS}


def test_the_token_goes_only_where_the_operator_said(styles, site):
    for repo in ("me/private", "me/other", "me/private2"):
        site.pages[f"/{repo}/resolve/main/x.safetensors"] = (200, repo.encode())
        load(styles, f"{repo}/x.safetensors")
    assert [token for _, token in site.asked] == ["Bearer hf_secret", None, None]


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        (["README.md", "paper.safetensors", "paper.bin"], "paper.safetensors"),
        (["a.safetensors", "pytorch_lora_weights.safetensors"], "pytorch_lora_weights.safetensors"),
    ],
)
def test_a_repo_is_asked_once_for_its_only_lora_which_is_taken_at_one_commit(styles, site, files, chosen):
    list_files(site, "c0ffee", files)
    site.pages[f"/a/b/resolve/c0ffee/{chosen}"] = (200, PIXELS)
    for _ in range(3):
        [lora] = load(styles, "a/b")
    assert lora.sha256 == hash_of(PIXELS)
    assert [path for path, _ in site.asked] == ["/api/models/a/b", f"/a/b/resolve/c0ffee/{chosen}"]


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"siblings": [{"rfilename": f"{i}.safetensors"} for i in "123"]}, "of 3 .safetensors files; name"),
        ({"siblings": [{"rfilename": "x.bin"}]}, "repo of 0 .safetensors files"),
        *(([], "repo of 0"), ({"siblings": [7, {"rfilename": 7}]}, "repo of 0")),
        *(({"siblings": None}, "repo of 0"), ({"siblings": 7}, "repo of 0")),
    ],
)
def test_a_repo_without_one_lora_is_refused(styles, site, answer, said):
    site.pages["/api/models/a/b"] = (200, json.dumps(answer).encode())
    with pytest.raises(InvalidRequest, match=said):
        load(styles, "a/b")


@pytest.mark.parametrize("revision", ["../../x", "a b", 7, None, "main?x"])
def test_a_hub_that_lies_about_the_commit_leads_nowhere_else(styles, site, revision):
    list_files(site, revision, ["x.safetensors"])
    site.pages[PAGE] = (200, PIXELS)
    load(styles, "a/b")
    assert site.asked[-1][0] == PAGE


@pytest.mark.parametrize(
    ("status", "error", "said"),
    [(404, InvalidRequest, "no file"), (401, InvalidRequest, "access"), (503, DownloadError, "later")],
)
def test_what_cannot_be_fetched_is_told_and_leaves_nothing(styles, site, settings, status, error, said):
    site.pages[PAGE] = (status, b"")
    with pytest.raises(error, match=said):
        load(styles, "a/b/x.safetensors")
    assert cached(settings) == set()
    site.pages[PAGE] = (200, PAPER)
    load(styles, "a/b/x.safetensors")


def test_an_address_that_is_not_listed_is_never_asked(styles, site):
    for address in ("https://example.org/x.safetensors", "https://127.0.0.1/x.safetensors"):
        with pytest.raises(InvalidRequest, match="not at a listed host"):
            load(styles, address)
    assert site.asked == []


def test_a_lora_that_does_not_fit_is_refused_without_its_own_words(styles, folder):
    (folder / "bad.safetensors").write_bytes(b"bad")
    with pytest.raises(InvalidRequest) as caught:
        load(styles, "paper-cut", "bad")
    assert str(caught.value) == (
        "[invalid_request] extra_style has 2 of 3 modules that do not fit this model; give another LoRA"
    )


def test_disk_and_memory_have_limits_and_the_oldest_goes(site, settings, reader):
    contents = {f"{i}": bytes([48 + i]) * 1000 for i in range(4)}
    for name, content in contents.items():
        site.pages[f"/a/{name}/resolve/main/x.safetensors"] = (200, content)
    small = replace(settings, style_disk_bytes=2500, style_memory_bytes=2500)
    styles = LoraResolver(small, reader)
    for name in ("0", "1", "0", "2"):  # 1 was used longest ago
        load(styles, f"a/{name}/x.safetensors")
        time.sleep(0.01)
    assert cached(settings) == {contents["0"], contents["2"]}
    assert reader.reads == {contents["0"]: 1, contents["1"]: 1, contents["2"]: 1}
    load(styles, "a/1/x.safetensors")
    assert reader.reads[contents["1"]] == 2 and len(site.asked) == 4
    assert cached(settings) == {contents["1"], contents["2"]}


def test_a_file_removed_from_the_cache_is_fetched_again(styles, site, settings):
    site.pages[PAGE] = (200, PAPER)
    load(styles, "a/b/x.safetensors")
    for path in settings.style_cache.iterdir():
        path.unlink()
    load(styles, "a/b/x.safetensors")
    assert len(site.asked) == 2


def test_an_address_is_asked_again_when_what_it_gave_is_old(styles, site):
    site.pages[PAGE] = (200, PAPER)
    [before] = load(styles, "a/b/x.safetensors")
    site.pages[PAGE] = (200, PIXELS)
    styles._answers.expire(time.monotonic() + 3590)
    [still] = load(styles, "a/b/x.safetensors")
    styles._answers.expire(time.monotonic() + 3601)
    [after] = load(styles, "a/b/x.safetensors")
    assert before is still and before.sha256 != after.sha256


def test_what_many_want_at_once_is_fetched_and_read_once(styles, site, reader):
    def slowly():
        time.sleep(0.2)
        return PIXELS

    site.pages[PAGE] = (200, slowly)

    async def many():
        return await asyncio.gather(*(styles.load(refs("a/b/x.safetensors")) for _ in range(6)))

    found = asyncio.run(many())
    assert len({id(lora) for [lora] in found}) == 1
    assert len(site.asked) == 1 and reader.reads == {PIXELS: 1}


def test_a_file_replaced_while_it_is_read_is_read_again(settings, folder):
    path, read = folder / "paper-cut.safetensors", []

    def reader(file, sha256):
        if not read:  # between hashing and reading
            path.with_suffix(".new").write_bytes(PIXELS)
            path.with_suffix(".new").replace(path)
        read.append(file.read_bytes())
        return Lora(sha256, 1)

    styles = LoraResolver(settings, reader)
    [lora] = load(styles, "paper-cut")
    assert lora.sha256 == hash_of(PIXELS) and read == [PIXELS, PIXELS]
    assert list(styles._in_memory) == [lora.sha256]


def test_a_file_removed_before_it_is_read_is_fetched_again(settings, site):
    site.pages[PAGE] = (200, PAPER)
    calls = []

    def reader(file, sha256):
        calls.append(file)
        if len(calls) == 1:
            file.unlink()  # as another caller does, to make room
        file.read_bytes()
        return Lora(sha256, 1)

    load(LoraResolver(settings, reader), "a/b/x.safetensors")
    assert len(site.asked) == 2 and len(calls) == 2


def test_what_a_killed_server_was_fetching_is_removed(styles, settings, site):
    settings.style_cache.mkdir()
    old, young = (settings.style_cache / f".{name}.safetensors.part" for name in ("old", "young"))
    for path in (old, young):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 100, time.time() - 100))
    site.pages[PAGE] = (200, PAPER)
    load(styles, "a/b/x.safetensors")
    assert not old.exists() and young.exists()


def test_callers_who_have_left_start_no_fetches(settings, site, reader):
    site.pages[PAGE] = (200, lambda: time.sleep(1) or PAPER)
    styles = LoraResolver(replace(settings, deadline_s=0.4), reader)

    async def many():
        waiting = [asyncio.create_task(styles.load(refs("a/b/x.safetensors"))) for _ in range(12)]
        await asyncio.sleep(0.1)
        began = time.monotonic()
        await styles.load(refs("paper-cut"))
        assert time.monotonic() - began < 0.2, "a style of this server waits for nobody"
        return await asyncio.gather(*waiting, return_exceptions=True)

    assert all(isinstance(one, DeadlineExceeded | DownloadError) for one in asyncio.run(many()))
    time.sleep(1)
    assert len(site.asked) == 1


@pytest.mark.parametrize(("deadline_s", "spent_s"), [(0.3, 0.0), (5, 4.7)])
def test_a_style_that_does_not_arrive_ends_with_the_deadline(settings, site, reader, deadline_s, spent_s):
    site.pages[PAGE] = (200, lambda: time.sleep(2) or PAPER)
    styles = LoraResolver(replace(settings, deadline_s=deadline_s), reader)
    began = time.monotonic()
    with pytest.raises((DeadlineExceeded, DownloadError)):
        asyncio.run(styles.load(refs("a/b/x.safetensors"), spent_s))
    assert time.monotonic() - began < 1.5


def test_where_nothing_is_fetched_that_is_said(settings, reader):
    own = replace(settings, style_hosts=(), hf_endpoint="https://huggingface.co")
    for name in ("a/b", "a/b/x.safetensors", "https://huggingface.co/x.safetensors"):
        with pytest.raises(InvalidRequest, match="style: it cannot be fetched, since this server fetches"):
            load(LoraResolver(own, reader), name)


def test_memory_of_addresses_is_bounded(settings, site, reader, monkeypatch):
    monkeypatch.setattr("fewstep.lora.resolve.MAX_ANSWERS", 3)
    styles = LoraResolver(settings, reader)
    for i in range(6):
        site.pages[f"/a/b{i}/resolve/main/x.safetensors"] = (200, PAPER)
        load(styles, f"a/b{i}/x.safetensors")
    assert len(styles._answers) == 3
