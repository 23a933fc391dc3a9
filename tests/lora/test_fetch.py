"""Fetches from servers on this machine; the test says what names mean, and public addresses lead here too."""

import errno
import hashlib
import shutil
import socket
import socketserver
import ssl
import subprocess
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from fewstep.errors import DownloadError, InvalidRequest
from fewstep.lora.fetch import JSON_MAX_BYTES, Allowed, fetch, fetch_json

HUB, CDN, OTHER = "huggingface.co", "cdn.hf.co", "other.hf.co"
PUBLIC, DEAD = "93.184.216.34", "93.184.216.35"
LISTED = Allowed((HUB, "*.HF.co"), max_bytes=1_000_000)
BODY = bytes(range(256)) * 2000
TOKEN = "hf_token"


def answer(status: int = 200, body: bytes = b"", **headers: str) -> bytes:
    """An HTTP answer; its Content-Length is that of the body unless given, and "" leaves it out."""
    fields = {"Content_Length": str(len(body))} | headers
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in fields.items() if value]
    return "\r\n".join([f"HTTP/1.1 {status} x", *lines, "", ""]).encode() + body


def chunks(*bodies: bytes, end: bytes = b"0\r\n\r\n") -> bytes:
    framed = b"".join(b"%x\r\n%b\r\n" % (len(body), body) for body in bodies) + end
    return answer(body=framed, Content_Length="", Transfer_Encoding="chunked")


@contextmanager
def running(tls: ssl.SSLContext | None = None):
    """A server that sends `answers[path]` as it is; of a list, one item every 0.1 s."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            with suppress(OSError), tls.wrap_socket(self.request, True) if tls else self.request as wire:
                request, *lines = wire.recv(65536).decode().strip().split("\r\n")
                path = request.split()[1]
                server.seen.append((path, dict(line.split(": ") for line in lines)))
                wanted = server.answers[path]
                for piece in wanted if isinstance(wanted, list) else [wanted]:
                    wire.sendall(piece)
                    time.sleep(0.1 if isinstance(wanted, list) else 0)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as tcp:
        tcp.daemon_threads, tcp.block_on_close = True, False
        port = tcp.server_address[1]
        server = SimpleNamespace(answers={}, seen=[], port=port, url=f"http://127.0.0.1:{port}")
        threading.Thread(target=tcp.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        tcp.shutdown()


@pytest.fixture
def server():
    with running() as server:
        yield server


@pytest.fixture
def own(server):
    """Leave to fetch from the plain server, as from one that the operator has set."""
    return replace(LISTED, trusted_origin=server.url)


@pytest.fixture
def listener():
    """The port of a socket that must see no connection."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        yield listening.getsockname()[1]
        with pytest.raises(BlockingIOError):
            listening.accept()


@pytest.fixture
def net(monkeypatch):
    """`names` says what a name means, at each time of asking; `asked` and `connected` say what was done, but
    for addresses just `found`. Every connection ends on this machine, at `port` if that is set."""
    net = SimpleNamespace(names={"127.0.0.1": [["127.0.0.1"]]}, asked=[], found=[], connected=[], port=None)
    connect = socket.socket.connect

    def getaddrinfo(host, port, family=0, type=0, *_):
        if host in net.found:
            return [(socket.AF_INET, type, 0, "", (host, port))]
        net.asked.append(host)
        if host not in net.names:
            raise socket.gaierror(socket.EAI_NONAME, "not known")
        meanings = net.names[host]
        net.found = meanings.pop(0) if len(meanings) > 1 else meanings[0]
        return [(socket.AF_INET, type, 0, "", (address, port)) for address in net.found]

    def connect_here(self, address):
        net.connected.append(address)
        if address[0] == DEAD:
            raise ConnectionRefusedError
        connect(self, ("127.0.0.1", net.port or address[1]))

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(socket.socket, "connect", connect_here)
    return net


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    files = [str(tmp_path_factory.mktemp("tls") / name) for name in ("certificate.pem", "key.pem")]
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=x -days 2"
    names, usage = f"subjectAltName=DNS:{HUB},DNS:{CDN}", "keyUsage=critical,digitalSignature,keyCertSign"
    arguments = [*command.split(), "-addext", names, "-addext", usage, "-out", files[0], "-keyout", files[1]]
    subprocess.run(arguments, check=True, capture_output=True)
    return files


@pytest.fixture
def web(certificate, net, monkeypatch):
    """Every public host in one TLS server, whose certificate is believed in and is for HUB and CDN."""
    monkeypatch.setenv("SSL_CERT_FILE", certificate[0])
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    with running(context) as server:
        server.named = []
        context.sni_callback = lambda _, name, __: server.named.append(name)
        net.port, net.names = server.port, {name: [[PUBLIC]] for name in (HUB, CDN, OTHER)}
        yield server


def refused(kind, words: str, url: str, folder: Path, allowed: Allowed, token: str | None = None) -> None:
    """Fetch what must fail in one sentence that quotes nothing, and leave no trace in the folder."""
    with pytest.raises(kind, match=words) as raised:
        fetch(url, folder / "file", allowed, token)
    assert list(folder.iterdir()) == []
    sentence = raised.value.sentence
    assert not [one for one in (str(folder), "evil", "127.0.0.1", "\n", TOKEN) if one in sentence]


NOT_PLAIN = """https://huggingface.co@127.0.0.1/ https://x:y@huggingface.co/ https://@huggingface.co/
https://127.0.0.1\\@huggingface.co/ https://huggingface.co\\.evil.org/ https://huggingface.co/\\evil.org
https://huggingface.co:22/ https://huggingface.co:80/ https://huggingface.co:x/ https:huggingface.co/ https:///x
https://[::1/ //huggingface.co/ /etc/passwd file:///etc/passwd file://huggingface.co/etc/passwd
ftp://huggingface.co/ data:text/plain,x http://huggingface.co/ http://huggingface.co:443/ http://127.0.0.1/
http://169.254.169.254/latest/meta-data/""".split()
NOT_PLAIN += ["", " https://huggingface.co/", "https://huggingface.co/ x", "https://hugging\tface.co/"]
NOT_PLAIN += ["https://huggingface.co/\r\nX: evil", "https://huggingface.co/\0", "https://１２７.0.0.1/"]
NOT_LISTED = """https://127.0.0.1/ https://localhost/ https://LOCALHOST./ https://169.254.169.254/ https://[::1]/
https://[::ffff:127.0.0.1]/ https://10.1.2.3/ https://2130706433/ https://0x7f.1/ https://0177.0.0.1/ https://0/
https://evil.org/ https://huggingface.co.evil.org/ https://huggingface.co%2f.evil.org/ https://evilhf.co/
https://evil.org?x=https://huggingface.co/ https://evil.org#@huggingface.co/ https://hf.co/ https://.hf.co/
https://a..hf.co/ https://a%00.hf.co/ https://huggingface.co../""".split()
REFUSED = [(url, "plain https") for url in NOT_PLAIN] + [(url, "listed host") for url in NOT_LISTED]


@pytest.mark.parametrize("url, words", REFUSED)
def test_a_wrong_address_is_refused_before_anything_is_asked(url, words, net, listener, tmp_path):
    net.port = listener

    refused(InvalidRequest, words, url, tmp_path, LISTED)

    assert (net.asked, net.connected) == ([], [])


NUMBERS = "8.8.8.8 134744072 0x8080808 8.8.0x808 0x [::1] [2606:2800::1]".split()


@pytest.mark.parametrize("host", NUMBERS)
def test_a_host_given_as_a_number_is_refused_even_if_listed(host, net, listener, tmp_path):
    net.port, net.names = listener, {host: [[PUBLIC]]}

    refused(InvalidRequest, "by name", f"https://{host}/", tmp_path, Allowed((host, host.strip("[]")), 10))

    assert (net.asked, net.connected) == ([], [])


PRIVATE = """127.0.0.1 10.1.2.3 172.16.0.1 192.168.0.1 169.254.169.254 100.100.100.200 0.0.0.0 224.0.0.1
192.0.0.192 168.63.129.16 255.255.255.255 ::1 :: ::127.0.0.1 ::ffff:127.0.0.1 ::ffff:10.0.0.1
::ffff:0:127.0.0.1 fe80::1%1 fc00::1 fec0::1 ff0e::1 64:ff9b::127.0.0.1 64:ff9b:1::10.0.0.1 2002:7f00:1::
2001:0:7f00:1::1 2001:db8::1""".split()


@pytest.mark.parametrize("address", PRIVATE)
def test_a_listed_name_must_mean_public_addresses_only(address, net, listener, tmp_path):
    net.port = listener
    for meaning in [address], [PUBLIC, address], [address, PUBLIC]:
        net.names[HUB] = [meaning]

        refused(InvalidRequest, "huggingface.co leads to an address", f"https://{HUB}/x", tmp_path, LISTED)

    assert (net.asked, net.connected) == ([HUB] * 3, [])


LED_ASTRAY = """http://127.0.0.1:{port}/ https://127.0.0.1/ http://localhost:{own}/ https://127.0.0.1:{own}/
http://evil@127.0.0.1:{own}/ https://evil.org/ //evil.org/x http://huggingface.co/ file:///etc/passwd
/\\evil.org https://huggingface.co@127.0.0.1:{port}/ https://huggingface.co/ http://[::1]:{own}/ http://127.1:{own}/""".split()


@pytest.mark.parametrize("status", [301, 307])
@pytest.mark.parametrize("location", LED_ASTRAY)
def test_a_redirect_is_held_to_the_same_rules(location, status, server, own, net, listener, tmp_path):
    net.names[HUB] = [["127.0.0.1"]]
    server.answers["/x"] = answer(status, Location=location.format(port=listener, own=server.port))

    refused(InvalidRequest, "redirect|not public", f"{server.url}/x", tmp_path, own)

    assert net.connected == [("127.0.0.1", server.port)]


@pytest.mark.parametrize("mean", [[PUBLIC], [DEAD, PUBLIC], ["64:ff9b::808:808"]], ids=str)
def test_a_name_is_asked_once_and_the_address_that_was_checked_is_taken(mean, web, net, tmp_path):
    net.names[HUB] = [mean, ["127.0.0.1"]]  # another machine from the second time on
    web.answers["/x?y=1"] = answer(body=BODY)

    fetch("https://HuggingFace.co./x?y=1#z", tmp_path / "file", LISTED)

    assert (net.asked, net.connected, web.named) == ([HUB], [(one, 443) for one in mean], [HUB])


def test_a_name_that_comes_to_mean_another_machine_is_refused_at_the_next_hop(web, net, tmp_path):
    net.names[HUB] = [[PUBLIC], ["127.0.0.1"]]
    web.answers["/x"] = answer(302, Location="/y")

    refused(InvalidRequest, "not public", f"https://{HUB}/x", tmp_path, LISTED)

    assert (net.asked, net.connected) == ([HUB, HUB], [(PUBLIC, 443)])


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_token_stays_with_the_origin_it_was_given_for(status, web, net, tmp_path):
    web.answers["/here"] = answer(status, Location="there")
    web.answers["/there"] = answer(status, Location=f"https://{CDN}/away")
    web.answers["/away"] = answer(status, Location=f"https://{HUB}/back")
    web.answers["/back"] = answer(body=BODY)

    fetch(f"https://{HUB}/here", tmp_path / "file", LISTED, TOKEN)

    seen = [(path, headers["Host"], headers.get("Authorization")) for path, headers in web.seen]
    told = f"Bearer {TOKEN}"
    assert seen == [("/here", HUB, told), ("/there", HUB, told), ("/away", CDN, None), ("/back", HUB, None)]
    assert net.asked == [HUB, HUB, CDN, HUB]


def test_an_origin_that_was_set_may_be_a_private_mirror_over_tls(web, net, tmp_path):
    net.names[HUB], web.answers["/x"] = [["10.1.2.3"]], answer(body=BODY)

    fetch(f"https://{HUB}/x", tmp_path / "file", Allowed((), 1_000_000, trusted_origin=f"https://{HUB}/"))

    assert net.connected == [("10.1.2.3", 443)]


@pytest.mark.parametrize("believed, host", [(False, HUB), (True, OTHER)])
def test_a_certificate_must_be_believed_in_and_be_for_the_host(believed, host, web, tmp_path, monkeypatch):
    web.answers["/x"] = answer(body=BODY)
    if not believed:
        monkeypatch.delenv("SSL_CERT_FILE")

    refused(DownloadError, "prove over TLS", f"https://{host}/x", tmp_path, LISTED, TOKEN)

    assert web.seen == []


ONE_MORE = LISTED.max_bytes + 1
BAD_ANSWERS = {
    "401": (answer(401), InvalidRequest, "needs access.*401"),
    "403": (answer(403), InvalidRequest, "needs access.*403"),
    "404": (answer(404), InvalidRequest, "no file at the address"),
    "418": (answer(418, BODY), InvalidRequest, "HTTP 418"),
    "206": (answer(206, BODY), InvalidRequest, "HTTP 206"),
    "429": (answer(429), DownloadError, "429.*try again later"),
    "500": (answer(500), DownloadError, "500.*try again later"),
    "redirect to itself": (answer(302, Location="/x"), InvalidRequest, "more than 5 times"),
    "redirect to nowhere": (answer(302), InvalidRequest, "more than 5 times"),
    "compressed": (answer(body=BODY, Content_Encoding="gzip"), DownloadError, "compressed"),
    "too big, as it says": (answer(Content_Length=str(ONE_MORE)), InvalidRequest, "most 1000000 bytes"),
    "too big, unsaid": (chunks(bytes(ONE_MORE)), InvalidRequest, "most 1000000 bytes"),
    "short": (answer(body=BODY, Content_Length="512001"), DownloadError, "512000 of 512001 bytes"),
    "without an end": (answer(body=BODY, Content_Length=""), DownloadError, "where the file ends"),
    "chunks without an end": (chunks(BODY, end=b""), DownloadError, "whole answer"),
    "a chunk of size -2": (chunks(end=b"-2\r\n" + BODY), DownloadError, "did not send"),
    "no HTTP": (b"SSH-2.0-evil\r\n", DownloadError, "whole answer"),
    "nothing": (b"", DownloadError, "broke"),
}


@pytest.mark.parametrize("given, kind, words", BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_a_bad_answer_leaves_nothing_behind(given, kind, words, server, own, tmp_path):
    server.answers["/x"] = given

    refused(kind, words, f"{server.url}/x", tmp_path, own)


DRIPS = {
    "body": [answer(body=BODY[:9], Content_Length="90"), *[b"."] * 20],
    "chunks": [chunks(end=b""), *[b"1\r\n.\r\n"] * 20],
    "headers": [b"HTTP/1.1 200 x\r\n", *[b"X: y\r\n"] * 20],
    "one header": [b"HTTP/1.1 200 x\r\nX: ", *[b"y"] * 20],
}


@pytest.mark.parametrize("limits", [{"total_s": 0.25}, {"timeout_s": 0.05}], ids=str)
@pytest.mark.parametrize("pieces", DRIPS.values(), ids=DRIPS)
def test_a_slow_answer_ends_with_the_time(pieces, limits, server, own, tmp_path):
    server.answers["/x"] = pieces
    start = time.monotonic()

    refused(DownloadError, "too long", f"{server.url}/x", tmp_path, replace(own, **limits))

    assert time.monotonic() - start < 1


def test_a_chunk_of_size_minus_one_is_not_read_to_its_end(server, own, tmp_path):
    server.answers["/x"] = [chunks(end=b"-1\r\n"), *[b"."] * 20]

    refused(DownloadError, "did not send", f"{server.url}/x", tmp_path, replace(own, total_s=1))


def test_a_server_that_takes_no_tls_is_given_up(net, tmp_path):
    net.names[HUB] = [[PUBLIC]]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        net.port = silent.getsockname()[1]
        refused(DownloadError, "too long", f"https://{HUB}/x", tmp_path, replace(LISTED, timeout_s=0.1))
    with running() as plain:
        net.port, plain.answers["/x"] = plain.port, answer(body=BODY)
        refused(DownloadError, "broke the", f"https://{HUB}/x", tmp_path, LISTED)


@pytest.mark.parametrize("mean, words", [(None, "no address"), ([[DEAD]], "refuses"), ([[]], "broke")])
def test_a_server_that_is_not_there(mean, words, net, tmp_path):
    net.names = {CDN: mean} if mean else {}

    refused(DownloadError, rf"\*\.HF\.co .*{words}", f"https://{CDN}/x", tmp_path, LISTED)


@pytest.mark.parametrize("token", ["hf_token\r\nX: y", "hf token", "hf_tökén"])
def test_a_token_that_would_break_the_request_is_not_sent(token, server, own, tmp_path):
    refused(InvalidRequest, "the token", f"{server.url}/x", tmp_path, own, token)

    assert server.seen == []


@pytest.mark.parametrize("code, kind", [(errno.ENOSPC, DownloadError), (errno.EACCES, PermissionError)])
def test_a_disk_that_fails_keeps_the_older_file(code, kind, server, own, tmp_path, monkeypatch):
    server.answers["/x"] = answer(body=BODY)
    (tmp_path / "file").write_bytes(b"older")

    def replace(*_):
        raise OSError(code, "")

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(kind):
        fetch(f"{server.url}/x", tmp_path / "file", own)

    assert [one.read_bytes() for one in tmp_path.iterdir()] == [b"older"]


@pytest.mark.parametrize(
    "given", [answer(body=BODY), chunks(BODY[:1000], BODY[1000:])], ids=["plain", "chunks"]
)
def test_the_file_arrives_as_it_is_after_five_redirects(given, server, own, listener, tmp_path, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{listener}")
    server.answers = {f"/{i}": answer(302, Location=str(i + 1)) for i in range(6)} | {"/6": given}

    refused(InvalidRequest, "more than 5 times", f"{server.url}/0", tmp_path, own, TOKEN)
    digest = fetch(f"{server.url}/1", tmp_path / "file", replace(own, max_bytes=len(BODY)), TOKEN)

    assert digest == hashlib.sha256(BODY).hexdigest()
    assert [one.read_bytes() for one in tmp_path.iterdir()] == [BODY]
    assert {headers["Authorization"] for _, headers in server.seen} == {f"Bearer {TOKEN}"}
    assert {headers["Accept-Encoding"] for _, headers in server.seen} == {"identity"}


def test_json_has_a_limit_of_its_own(server, own):
    server.answers = {
        "/list": answer(body=b'[{"path": "x"}]'),
        "/page": answer(body=b"<html>"),
        "/deep": answer(body=b"[" * 100_000),
        "/big": answer(Content_Length=str(JSON_MAX_BYTES + 1)),
    }
    assert fetch_json(f"{server.url}/list", replace(own, max_bytes=1)) == [{"path": "x"}]
    for path, kind in {"/page": DownloadError, "/deep": DownloadError, "/big": InvalidRequest}.items():
        with pytest.raises(kind):
            fetch_json(server.url + path, replace(own, max_bytes=2 * JSON_MAX_BYTES))
