"""What every request passes before anything of ours sees it, and what every answer says.

A page of another site can have a visitor's browser ask here, with the visitor's cookie, and a name that its
owner points at 127.0.0.1 makes that page one of our own. So the Host must be one of ours, and whatever
changes something, or opens a socket, must come from the same origin if a browser sent it.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from fewstep.errors import SettingsError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
ANY_HOST = "*"
MAX_BODY = 64 * 1024
MAX_UPLOAD = 64 * 10**6  # up to two images
UPLOADS = ("/v1/images/edits",)
KEY_CHARS = 32
BODY_S = 30.0  # for a body to come
SAFE = ("GET", "HEAD", "OPTIONS")
HEADERS = {
    b"content-security-policy": (
        b"default-src 'self'; img-src 'self' blob: data:; script-src 'self'; style-src 'self'; "
        b"connect-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"referrer-policy": b"no-referrer",
    b"cross-origin-opener-policy": b"same-origin",
    b"cross-origin-resource-policy": b"same-origin",
}


class TooLong(Exception):
    """The body is longer than its limit."""


class TooSlow(Exception):
    """The body does not come."""


class Guard:
    """ASGI middleware before all others."""

    def __init__(self, app: App, hosts: Collection[str] = LOOPBACK) -> None:
        self._app = app
        self._hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if scope["type"] == "websocket":
            if refusal:
                return await send({"type": "websocket.close", "code": 1008})  # 403, before it is accepted
            return await self._app(scope, receive, send)
        guarded = _with_headers(send)
        if refusal:
            return await _answer(guarded, *refusal)
        limit = MAX_UPLOAD if scope.get("path") in UPLOADS else MAX_BODY
        length = headers.get(b"content-length", "0")
        too_long = 413, "too_long", f"the body has more than {limit} bytes; send less"
        if not length.isdecimal() or int(length) > limit:
            return await _answer(guarded, *too_long)
        try:
            await self._app(scope, _limited(receive, limit), guarded)
        except TooLong:
            await _answer(guarded, *too_long)
        except TooSlow:
            await _answer(guarded, 408, "too_slow", f"the body did not come within {BODY_S:g} s")

    def _refusal(self, scope: Scope, headers: dict[bytes, str]) -> tuple[int, str, str] | None:
        host = headers.get(b"host", "").lower()
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if ANY_HOST not in self._hosts and name not in self._hosts:
            return (
                421,
                "unknown_host",
                "this server has another name; start it with --allow-host for this one",
            )
        if scope["type"] == "http" and scope["method"] in SAFE:
            return None
        origin = headers.get(b"origin")
        foreign = origin is not None and origin.lower().partition("://")[2] != host
        if foreign or headers.get(b"sec-fetch-site", "none") not in ("same-origin", "none"):
            return 403, "other_site", "this may only be asked from the page of this server"
        return None


def _limited(receive: Receive, limit: int) -> Receive:
    read, whole = 0, False
    until = time.monotonic() + BODY_S

    async def limited() -> Message:
        nonlocal read, whole
        if whole:  # what comes then is that the client has left
            return await receive()
        try:
            message = await asyncio.wait_for(receive(), until - time.monotonic())
        except TimeoutError:
            raise TooSlow from None
        whole = not message.get("more_body", False)
        read += len(message.get("body", b""))
        if read > limit:
            raise TooLong
        return message

    return limited


def _with_headers(send: Send) -> Send:
    async def guarded(message: Message) -> None:
        if message["type"] == "http.response.start":
            known = {name.lower() for name, _ in message.get("headers", ())}
            extra = [(name, value) for name, value in HEADERS.items() if name not in known]
            message = {**message, "headers": [*message.get("headers", ()), *extra]}
        await send(message)

    return guarded


async def _answer(send: Send, status: int, code: str, sentence: str) -> None:
    content = json.dumps({"code": code, "message": sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def cookie_key(folder: Path) -> str:
    """Return what clients' cookies are signed with: made once, and kept in `folder`."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = folder / "cookie-key"
    if not file.exists():
        with NamedTemporaryFile("w", dir=folder) as new:  # which only we may read
            new.write(secrets.token_urlsafe(KEY_CHARS))
            new.flush()
            with suppress(FileExistsError):  # another was quicker
                os.link(new.name, file)  # whole, or not at all
    key = file.read_text(encoding="utf-8")
    if len(key) < KEY_CHARS:
        raise SettingsError("cookie-key in FEWSTEP_WEB_DATA is damaged; remove it, and visitors start anew")
    return key
