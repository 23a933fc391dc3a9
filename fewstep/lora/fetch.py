"""Fetch one file over https from an address that a caller names, without being led anywhere else.

    sha256 = fetch(url, target, Allowed(("huggingface.co", "*.hf.co"), max_bytes=2**30))

Every hop has to be https, to a host on the operator's list whose addresses are all public. A name is looked
up once, and the connection goes to one of the very addresses that were checked: a name that means another
machine a moment later gains nothing by it. Proxy settings of the environment are not used.
"""

import errno
import hashlib
import json
import logging
import re
import socket
import ssl
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urljoin, urlsplit

import httpcore2
import httpx2

from fewstep.errors import DownloadError, InvalidRequest

logger = logging.getLogger(__name__)

JSON_MAX_BYTES = 5_000_000
MAX_REDIRECTS = 5

# Visible ASCII without the backslash, which some parsers take for a slash.
_PLAIN = re.compile(r"[!-\[\]-~]+")
_NAME = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
# Resolvers read 2130706433, 0x7f.1 and 0177.0.0.1 as addresses; no domain ends in a number.
_NUMBER_AT_END = re.compile(r"(.*\.)?([0-9]+|0x[0-9a-f]*)")

_UNICAST = ip_network("2000::/3")
_NAT64 = ip_network("64:ff9b::/96")
# What ipaddress takes for public: metadata services of Oracle's and Azure's clouds, and 6to4, which can hold
# any IPv4 address.
_NOT_PUBLIC = tuple(map(ip_network, ("192.0.0.0/24", "168.63.129.16/32", "2002::/16")))

# What a server did, by the first class that fits. The errors' own words hold names, so they are not used.
_FAILURES: tuple[tuple[type[Exception], str], ...] = (
    (socket.gaierror, "has no address here"),
    (ssl.SSLCertVerificationError, "could not prove over TLS that it is itself"),
    (ssl.SSLError, "broke the TLS connection off"),
    (TimeoutError, "took too long"),
    (ConnectionRefusedError, "refuses the connection"),
    (OSError, "broke the connection off"),
    (httpcore2.ProtocolError, "broke the connection off before a whole answer"),
    (ValueError, "did not send a readable answer"),
    (Exception, "did not send a whole answer"),
)
_BROKEN = (httpcore2.TimeoutException, httpcore2.NetworkError, httpcore2.ProtocolError, OSError, ValueError)


@dataclass(frozen=True)
class Allowed:
    """Limits of a fetch; the operator's choice, never the caller's."""

    hosts: tuple[str, ...]  # names; "*.example.org" or ".example.org" is any host below example.org
    max_bytes: int
    timeout_s: float = 30.0  # for connecting and for each read
    total_s: float = 300.0  # for all of it
    # An origin that the operator set, such as "http://127.0.0.1:1234": it counts as listed, and neither https
    # nor a public address is asked of exactly this scheme, host and port.
    trusted_origin: str = ""


class _Hop(NamedTuple):
    scheme: str
    host: str
    port: int
    path: str
    shown: str = ""  # how a sentence may call it: the list's entry, not the caller's words
    trusted: bool = False


class _Stream(httpcore2.NetworkStream):
    """A connection used against the clock, so that dripping bytes cannot hold it for ever."""

    def __init__(self, stream: httpcore2.NetworkStream, left: Callable[[], float]) -> None:
        self._stream, self._left = stream, left

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._left())

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, self._left())

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, self._left()), self._left)

    def close(self) -> None:
        self._stream.close()


class _Network(httpcore2.NetworkBackend):
    """Connects to one of the very addresses that were found public, unless the hop is trusted."""

    def __init__(self, hop: _Hop, left: Callable[[], float]) -> None:
        self._hop, self._left = hop, left

    def connect_tcp(self, host: str, port: int, *_: Any, **__: Any) -> httpcore2.NetworkStream:
        answers = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [str(address[0]) for *_, address in answers]
        if not self._hop.trusted and not all(map(_is_public, addresses)):
            raise InvalidRequest(
                f"{self._hop.shown} leads to an address that is not public; name a file elsewhere"
            )
        failure: Exception = OSError("no address")
        for address in addresses:
            try:
                return _Stream(httpcore2.SyncBackend().connect_tcp(address, port, self._left()), self._left)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure


def fetch(url: str, target: Path, allowed: Allowed, token: str | None = None) -> str:
    """Write the file at `url` to `target`, whole or not at all, and return its sha256 in hex.

    `token` goes to the origin of `url`, so it must be one meant for that host. Raises InvalidRequest for an
    address that gives no file which may be had, DownloadError if the file does not arrive.
    """
    digest = hashlib.sha256()
    part = target.with_name(f"{target.name}.{uuid.uuid4().hex}.part")
    try:
        with closing(_pieces(url, allowed, token)) as pieces, part.open("xb") as file:
            for piece in pieces:
                digest.update(piece)
                file.write(piece)
        part.replace(target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise DownloadError("the server's disk is full; have some space freed and try again") from None
        raise
    finally:
        part.unlink(missing_ok=True)
    return digest.hexdigest()


def fetch_json(url: str, allowed: Allowed, token: str | None = None) -> Any:
    """Return the JSON document at `url`, of at most JSON_MAX_BYTES, under the same rules."""
    with closing(_pieces(url, replace(allowed, max_bytes=JSON_MAX_BYTES), token)) as pieces:
        content = b"".join(pieces)
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        raise DownloadError("what answers there sends no JSON; have the operator see what it is") from None


def _pieces(url: str, allowed: Allowed, token: str | None) -> Generator[bytes, None, None]:
    """Yield the body's bytes, after as many redirects as it takes."""
    if token and not _PLAIN.fullmatch(token):
        raise InvalidRequest("the token holds a character that no token has; give it as it was issued")
    end = time.monotonic() + allowed.total_s

    def left() -> float:
        """Return how many seconds the next step may take. Raises TimeoutError when all time is up."""
        seconds = min(allowed.timeout_s, end - time.monotonic())
        if seconds <= 0:
            raise TimeoutError
        return seconds

    hop = first = _checked(url, allowed, "the address")
    for _ in range(MAX_REDIRECTS + 1):
        with _response(hop, left, token) as response:
            if response.status not in (301, 302, 303, 307, 308):
                yield from _body(response, hop, allowed)
                return
            url = urljoin(url, httpx2.Headers(response.headers).get("Location", ""))
        hop = _checked(url, allowed, "a redirect from the address")
        if hop[:3] != first[:3]:
            token = None
    raise InvalidRequest(
        f"the address redirects more than {MAX_REDIRECTS} times; name where the file itself is"
    )


def _checked(url: str, allowed: Allowed, what: str) -> _Hop:
    """Return the parts of `url`, if it may be asked. Nothing is looked up or connected to here."""
    hop, own = _split(url), _split(allowed.trusted_origin)
    if hop and own and hop[:3] == own[:3]:
        return hop._replace(shown="the configured server", trusted=True)
    if hop is None or (hop.scheme, hop.port) != ("https", 443):
        raise InvalidRequest(
            f"{what} is not a plain https address; give https://host/path, with no user name, port or "
            "backslash, and with other characters than ASCII percent-encoded"
        )
    for entry in allowed.hosts:
        rule = entry.lower().removeprefix("*")
        listed = hop.host.endswith(rule) if rule.startswith(".") else hop.host == rule
        if listed and _NAME.fullmatch(hop.host) and not _NUMBER_AT_END.fullmatch(hop.host):
            return hop._replace(shown=entry)
    raise InvalidRequest(f"{what} is not at a listed host; use, by name, one of {', '.join(allowed.hosts)}")


def _split(url: str) -> _Hop | None:
    if not _PLAIN.fullmatch(url):
        return None
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    if not parts.hostname or "@" in parts.netloc:
        return None
    usual = 443 if parts.scheme == "https" else 80
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return _Hop(parts.scheme, parts.hostname.removesuffix("."), usual if port is None else port, path)


def _is_public(text: str) -> bool:
    address = ip_address(text)
    if address in _NAT64:
        address = IPv4Address(int(address) & 0xFFFFFFFF)
    # Other IPv6 addresses are local in some way, or IPv4 ones in disguise.
    if isinstance(address, IPv6Address) and address not in _UNICAST:
        return False
    return address.is_global and not address.is_multicast and not any(address in net for net in _NOT_PUBLIC)


@contextmanager
def _response(hop: _Hop, left: Callable[[], float], token: str | None) -> Iterator[httpcore2.Response]:
    """Ask for the file; the response has its headers read and its body not.

    What the network and the parsers raise, while it is read too, becomes one sentence.
    """
    host = f"[{hop.host}]" if ":" in hop.host else hop.host
    headers: dict[bytes | str, bytes | str] = {"User-Agent": "fewstep", "Accept": "*/*"}
    headers |= {"Accept-Encoding": "identity", "Connection": "close"}
    headers["Host"] = host if hop.port == 443 else f"{host}:{hop.port}"
    if token:
        headers["Authorization"] = f"Bearer {token}"
    try:
        url = httpcore2.URL(scheme=hop.scheme, host=hop.host, port=hop.port, target=hop.path)
        tls = ssl.create_default_context() if hop.scheme == "https" else None
        with (
            httpcore2.HTTPConnection(url.origin, tls, network_backend=_Network(hop, left)) as connection,
            connection.stream("GET", url, headers=headers) as response,
        ):
            yield response
    except _BROKEN as error:
        logger.debug("a fetch failed", exc_info=error)
        reason = error.__cause__ or error
        what = next(words for kind, words in _FAILURES if isinstance(reason, kind))
        raise DownloadError(f"{hop.shown} {what}; try again later") from None


def _body(response: httpcore2.Response, hop: _Hop, allowed: Allowed) -> Iterator[bytes]:
    _check_status(response.status, hop)
    headers = httpx2.Headers(response.headers)
    if headers.get("Content-Encoding", "identity").lower() != "identity":
        raise DownloadError(f"{hop.shown} sends the file compressed, unasked; name one elsewhere")
    stated = None if "Transfer-Encoding" in headers else int(headers.get("Content-Length", -1))
    if stated == -1:
        raise DownloadError(f"{hop.shown} does not say where the file ends; name one elsewhere")
    got, too_big = 0, InvalidRequest(f"the file is too big; name one of at most {allowed.max_bytes} bytes")
    if (stated or 0) > allowed.max_bytes:
        raise too_big
    try:
        for piece in response.iter_stream():
            got += len(piece)
            if got > allowed.max_bytes:
                raise too_big
            yield piece
    except httpcore2.RemoteProtocolError:
        if stated is None:
            raise
        raise DownloadError(
            f"{hop.shown} sent {got} of {stated} bytes of the file; try again later"
        ) from None


def _check_status(status: int, hop: _Hop) -> None:
    if status in (401, 403):
        raise InvalidRequest(
            f"the file needs access that this server does not have (HTTP {status}); name one that it may read"
        )
    if status == 404:
        raise InvalidRequest("there is no file at the address (HTTP 404); see that it is spelled right")
    if status == 429 or status >= 500:
        raise DownloadError(f"{hop.shown} cannot answer now (HTTP {status}); try again later")
    if status != 200:
        raise InvalidRequest(f"the address gives no file but HTTP {status}; name one that a plain GET gives")
