"""What every request passes before anything of ours sees it, what every response says, and the cookies' key.

A page of another site can have a client's browser ask here, with the client's cookie, and a name that its
owner points at 127.0.0.1 makes that page one of our own. So the Host must be one of ours, and whatever
changes something, or opens a socket, must come from the same origin if a browser sent it.

Starlette's TrustedHostMiddleware and `max_body_size` answer 400 and 413 in plain text, which cannot be
changed, and they wait for a body without end; hence our own, whose errors are JSON as all others are.
"""

import asyncio
import os
import secrets
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from tempfile import NamedTemporaryFile

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fewstep.errors import BodyTooLong, BodyTooSlow, OtherSite, SettingsError, UnknownHost
from fewstep.web.error_responses import error_response

LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
ANY_HOST = "*"
MAX_BODY = 64 * 1024
MAX_UPLOAD = 64 * 10**6  # up to two images
UPLOADS = ("/v1/images/edits",)
BODY_S = 30.0  # for a body to come
SAFE = ("GET", "HEAD", "OPTIONS")
HEADERS = {
    "content-security-policy": (
        "default-src 'self'; img-src 'self' blob: data:; script-src 'self'; style-src 'self'; "
        "connect-src 'self'; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
KEY_CHARS = 32


class Guard:
    """ASGI middleware before all others."""

    def __init__(self, app: ASGIApp, hosts: Collection[str] = LOOPBACK) -> None:
        self._app = app
        self._hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)  # a route's own stays
            await send(message)

        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        try:
            self._check(scope, headers)
            if scope["type"] == "http":
                receive = _limited(receive, headers, MAX_UPLOAD if scope["path"] in UPLOADS else MAX_BODY)
            await self._app(scope, receive, guarded)
        except (UnknownHost, OtherSite, BodyTooLong, BodyTooSlow) as error:
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})  # 403, before it is accepted
            else:
                await error_response(error)(scope, receive, guarded)

    def _check(self, scope: Scope, headers: Headers) -> None:
        host = headers.get("host", "").lower()
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if ANY_HOST not in self._hosts and name not in self._hosts:
            raise UnknownHost("this server has another name; start it with --allow-host for this one")
        if scope["type"] == "http" and scope["method"] in SAFE:
            return
        origin = headers.get("origin")
        foreign = origin is not None and origin.lower().partition("://")[2] != host
        if foreign or headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            raise OtherSite("this may only be asked from the page of this server")


def _limited(receive: Receive, headers: Headers, limit: int) -> Receive:
    """Return `receive` for a body of at most `limit` bytes that comes within BODY_S seconds.

    Raises BodyTooLong, at once if the headers say so, and BodyTooSlow.
    """
    too_long = BodyTooLong(f"the body has more than {limit} bytes; send less")
    length = headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > limit:
        raise too_long
    read, whole = 0, False
    until = asyncio.get_running_loop().time() + BODY_S

    async def limited() -> Message:
        nonlocal read, whole
        if whole:  # what comes then is that the client has left
            return await receive()
        try:
            async with asyncio.timeout_at(until):
                message = await receive()
        except TimeoutError:
            raise BodyTooSlow(f"the body did not come within {BODY_S:g} s") from None
        whole = not message.get("more_body", False)
        read += len(message.get("body", b""))
        if read > limit:
            raise too_long
        return message

    return limited


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
