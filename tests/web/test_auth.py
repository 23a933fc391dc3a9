"""Other sites, other names and long bodies get nowhere."""

import asyncio
import json

import pytest

from fewstep.web import auth
from fewstep.web.auth import MAX_BODY, Guard

SAME = {"host": "127.0.0.1:8000"}


async def app(scope, receive, send):
    if scope["type"] == "websocket":
        await send({"type": "websocket.accept"})
        return
    while (await receive()).get("more_body"):
        pass
    headers = [(b"x-frame-options", b"SAMEORIGIN")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"ok"})


def ask(method="POST", body=b"", kind="http", chunks=1, **headers):
    sent, parts = [], [body] * chunks
    pairs = [(k.replace("_", "-").encode(), v.encode()) for k, v in headers.items()]
    scope = {"type": kind, "method": method, "path": "/", "headers": pairs}

    async def receive():
        if not parts:
            await asyncio.sleep(9)
        part = parts.pop()
        return {"type": "http.request", "body": part, "more_body": bool(parts)}

    async def send(message):
        sent.append(message)

    asyncio.run(Guard(app)(scope, receive, send))
    return sent


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8000", "localhost:1", "[::1]:8000", "LOCALHOST"])
def test_our_own_names_are_answered(host):
    assert ask("GET", host=host)[0]["status"] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "evil.example:127", "", "[::2]:8000", "127.0.0.1@evil"]
)
def test_a_name_that_was_pointed_at_us_is_not(host):
    assert ask("GET", host=host)[0]["status"] == 421


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"}, {"origin": "null"}, {"origin": "http://127.0.0.1:9000"},
        {"sec_fetch_site": "cross-site"}, {"sec_fetch_site": "same-site"},
        {"origin": "http://127.0.0.1:8000.evil.example"},
    ],
)  # fmt: skip
def test_another_sites_page_changes_nothing_and_opens_no_socket(headers):
    assert ask("POST", **SAME, **headers)[0]["status"] == 403
    assert ask("DELETE", **SAME, **headers)[0]["status"] == 403
    assert ask(kind="websocket", **SAME, **headers) == [{"type": "websocket.close", "code": 1008}]


def test_our_own_page_and_programs_may():
    own = {"origin": "http://127.0.0.1:8000", "sec_fetch_site": "same-origin"}
    for headers in (own, {}):
        assert ask("POST", **SAME, **headers)[0]["status"] == 200
        assert ask(kind="websocket", **SAME, **headers) == [{"type": "websocket.accept"}]


@pytest.mark.parametrize("length", [str(MAX_BODY + 1), "-1", "x", "9" * 40])
def test_a_body_that_says_it_is_long_is_not_read(length):
    start, body = ask("POST", content_length=length, **SAME)
    assert start["status"] == 413 and json.loads(body["body"])["code"] == "too_long"


def test_a_body_that_does_not_say_so_is_read_up_to_the_limit():
    assert ask("POST", b"x" * 1000, chunks=MAX_BODY // 1000, **SAME)[0]["status"] == 200
    assert ask("POST", b"x" * 1000, chunks=MAX_BODY // 1000 + 1, **SAME)[0]["status"] == 413


def test_a_body_that_does_not_come_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(auth, "BODY_S", 0.05)
    start, body = ask("POST", chunks=0, **SAME)
    assert start["status"] == 408 and json.loads(body["body"])["code"] == "too_slow"


def test_every_answer_forbids_what_the_page_does_not_need():
    for start in (ask("GET", **SAME)[0], ask("POST", **SAME, origin="null")[0]):
        headers = dict(start["headers"])
        policy = headers[b"content-security-policy"].decode()
        assert "default-src 'self'" in policy and "unsafe" not in policy and "script-src 'self'" in policy
        assert headers[b"x-content-type-options"] == b"nosniff"
    assert dict(ask("GET", **SAME)[0]["headers"])[b"x-frame-options"] == b"SAMEORIGIN"  # a route's own stays
