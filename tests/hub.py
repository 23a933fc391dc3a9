"""A model hub of our own, for huggingface_hub's client: the endpoints that it calls, and every way to fail.

Large files are redirected to a second origin, as the real hub does.
"""

import hashlib
import importlib
import io
import json
import logging
import os
import re
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import patch

from huggingface_hub import constants

from fewstep.models.sources import SOURCES, HubFile, HubRepo

REVISION = "c0ffee" * 6 + "c0ff"
LARGE = 1000  # bytes; from here on a file is in large-file storage
ROOT = Path(__file__).resolve().parents[1]
# A command as it is, but for the repos of one model.
COMMAND = """
import importlib, json, sys
from fewstep.models.sources import SOURCES, HubFile, HubRepo
table, name, module, *arguments = sys.argv[1:]
SOURCES[name] = tuple(
    HubRepo(**{**row, "files": tuple(HubFile(**file) for file in row["files"])})
    for row in json.loads(table)
)
sys.exit(importlib.import_module(f"fewstep.cli.{module}").main([name, *arguments]))
"""


@dataclass
class Seen:
    """One request that the hub answered."""

    path: str
    start: int  # of the range asked for
    authorization: str | None
    at_storage: bool


@dataclass
class Hub:
    """Files by repo and path, the faults by path, and the log of requests."""

    files: dict[str, dict[str, bytes]]
    faults: dict[str, object] = field(default_factory=dict)
    token: str | None = None
    revisions: set[str] = field(default_factory=lambda: {REVISION})
    seen: list[Seen] = field(default_factory=list)
    stalled: threading.Event = field(default_factory=threading.Event)
    url: str = ""
    storage_url: str = ""

    def repo(self, name: str, pinned: bool = True) -> HubRepo:
        """The table's row for one of the hub's repos; nothing moves on the way into the weights folder."""
        rows = []
        for path, content in self.files[name].items():
            pins = (len(content), hashlib.sha256(content).hexdigest()) if pinned else (None, None)
            rows.append(HubFile(path, path, *pins))
        return HubRepo(name, REVISION, "MIT", tuple(rows))

    def start(self, rows, name, module, *arguments, code=COMMAND, **variables) -> subprocess.Popen[str]:
        """Start a command about the model `name`, whose repos are `rows`, as if this were the only hub."""
        table = json.dumps([asdict(row) for row in rows])
        environ = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environ |= {"HF_ENDPOINT": self.url, "PYTHONPATH": str(ROOT), **variables}
        command = [sys.executable, "-c", code, table, name, module, *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, env=environ, text=True, **pipes)

    def run(self, rows, name, module, *arguments, apart=False, **variables) -> tuple[int, str]:
        """The status of such a command, and what it wrote to stderr.

        Unless it is to be `apart`, it runs in this process, without the client's waits between its tries.
        """
        if apart:
            process = self.start(rows, name, module, *arguments, **variables)
            out, err = process.communicate(timeout=280)
            assert out == "" and "Traceback" not in err, err
            return process.returncode, err
        address = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        cache = f"{variables['HOME']}/hub"
        stdout, stderr, level = io.StringIO(), io.StringIO(), logging.root.level
        with (
            patch.dict(os.environ, {"HF_HOME": "", "HF_TOKEN": ""} | variables),
            patch.dict(SOURCES, {name: tuple(rows)}),
            patch.multiple(
                constants, ENDPOINT=self.url, HUGGINGFACE_CO_URL_TEMPLATE=address, HF_HUB_CACHE=cache
            ),
            patch.object(logging.root, "handlers", []),
            patch("fewstep.cli.run.end_as_by_ctrl_c"),
            patch("time.sleep"),
            redirect_stdout(stdout),
            redirect_stderr(stderr),
        ):
            status = importlib.import_module(f"fewstep.cli.{module}").main([name, *arguments])
        logging.root.setLevel(level)
        assert stdout.getvalue() == "" and "Traceback" not in stderr.getvalue(), stderr.getvalue()
        return status, stderr.getvalue()

    def gets(self, path: str) -> list[Seen]:
        """The requests that carried the content of `path`, or were to."""
        gets = [one for one in self.seen if one.path.endswith(path)]
        return [one for one in gets if one.at_storage] or gets


@contextmanager
def running_hub(files: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    """The hub and its storage on two free ports of this machine."""
    hub = Hub(files)
    servers = []
    for storage in (False, True):
        handler = type("Handler", (_Handler,), {"hub": hub, "at_storage": storage})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
    hub.url, hub.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    try:
        yield hub
    finally:
        hub.stalled.set()
        for server in servers:
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    at_storage: bool
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: object) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self._note()
        name, revision = re.fullmatch(r"/api/models/(.+)/paths-info/(\w+)", self.path).groups()
        if self._refused(name, revision, "paths-info"):
            return
        if self.hub.faults.get("paths-info") == "html":
            self._answer(200, b"<html>please log in</html>", {"Content-Type": "text/html"})
            return
        wanted = urllib.parse.parse_qs(body)["paths"]
        rows = [_row(path, self.hub.files[name][path]) for path in wanted if path in self.hub.files[name]]
        self._answer(200, json.dumps(rows).encode(), {"Content-Type": "application/json"})

    def do_GET(self) -> None:
        pattern = r"/(.+?)/(?:resolve|blob)/(\w+)/([^?]+)"
        match = re.fullmatch(pattern, urllib.parse.unquote(self.path))
        if match is None:
            self._answer(404, b"", {})
            return
        self._note()
        name, revision, path = match.groups()
        if self._refused(name, revision, path):
            return
        content = self.hub.files[name][path]
        if len(content) >= LARGE and not self.at_storage:
            self._answer(302, b"", {"Location": f"{self.hub.storage_url}/{name}/blob/{revision}/{path}"})
        else:
            self._send(content, path)

    def _note(self) -> None:
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start, token = int(asked[1]) if asked else 0, self.headers.get("Authorization")
        self.hub.seen.append(Seen(urllib.parse.unquote(self.path), start, token, self.at_storage))

    def _refused(self, name: str, revision: str, path: str) -> bool:
        fault = self.hub.faults.get(path)
        if isinstance(fault, list):  # one status after the other, then none
            fault = fault.pop(0) if fault else None
        token = self.hub.token
        if token and not self.at_storage and self.headers.get("Authorization") != f"Bearer {token}":
            self._answer(401, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "restricted"})
        elif isinstance(fault, int):
            self._answer(fault, b"", {"Retry-After": "0"} if fault == 429 else {})
        elif revision not in self.hub.revisions or path not in {"paths-info", *self.hub.files.get(name, ())}:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            return False
        return True

    def _send(self, content: bytes, path: str) -> None:
        fault = self.hub.faults.get(path)
        start = self.hub.seen[-1].start if "Range" in self.headers else 0
        if fault == "html":
            self._answer(200, b"<html>please log in</html>", {"Content-Type": "text/html"})
            return
        if fault == "truncate":
            content = content[: len(content) // 2]
        if fault == "flip":
            content = content[:-1] + bytes([content[-1] ^ 1])
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        is_cut = fault in ("cut", "stall") or (fault == "cut once" and not start)
        send = max(0, len(content) // 2 - start) if is_cut else None
        self._answer(206 if start else 200, content[start:], headers, send)
        if fault == "stall":
            self.hub.stalled.wait(60)
        self.close_connection |= is_cut

    def _answer(self, status: int, body: bytes, headers: dict[str, str], send: int | None = None) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body[:send])
            self.wfile.flush()


def _row(path: str, content: bytes) -> dict[str, object]:
    blob = hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()
    row: dict[str, object] = {"type": "file", "path": path, "size": len(content), "oid": blob}
    if len(content) >= LARGE:
        sha256 = hashlib.sha256(content).hexdigest()
        row["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
    return row
