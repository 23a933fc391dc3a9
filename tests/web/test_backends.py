"""What a Cog server or Replicate answers, as the queue understands it; both spoken to over HTTP."""

import asyncio
import base64
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import webp

from fewstep.errors import GenerationError, InternalError, InvalidRequest, UnsafeImage
from fewstep.web.backends import BackendBusy, BackendUnavailable, CogBackend, ReplicateBackend

URL = f"data:image/webp;base64,{base64.b64encode(webp()).decode()}"
INPUTS = {"prompt": "a red house", "seed": 1}


class Server(ThreadingHTTPServer):
    """Answers with what `answers` gives for a method and a path; what was asked is in `seen`."""

    daemon_threads = True

    def __init__(self, answers):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.seen, self.gone = answers, [], []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = json.loads(content) if content else None
        self.server.seen.append((self.command, self.path, dict(self.headers), body))
        status, answer = self.server.answers(self.command, self.path)
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST

    def log_message(self, *_):
        pass


@contextmanager
def answering(answers):
    server = Server(answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def by_cog(status, answer):
    async def main():
        return await CogBackend(server.url, 5).generate(INPUTS)

    with answering(lambda *_: (status, answer)) as server:
        return asyncio.run(main()), server


def test_images_and_the_models_own_milliseconds():
    metrics = {"text_ms": 1, "steps_ms": 20, "decode_ms": 3, "encode_ms": 1.5, "predict_time": 9, "seed": 1}
    generated, server = by_cog(200, {"status": "succeeded", "output": [URL, URL], "metrics": metrics})
    assert (generated.files, generated.generate_ms) == ([webp()] * 2, 25.5)
    [(method, path, headers, body)] = server.seen
    assert (method, path, set(body), body["input"]) == ("POST", "/predictions", {"id", "input"}, INPUTS)
    assert len(body["id"]) == 32 and "Authorization" not in headers


def failed(sentence):
    return {"status": "failed", "error": f"Prediction failed: Async prediction failed: {sentence}"}


@pytest.mark.parametrize(
    ("status", "answer", "error"),
    [
        (200, failed("InvalidRequest: [invalid_request] steps is 9"), InvalidRequest),
        (200, failed("UnsafeImage: [unsafe] every picture was flagged"), UnsafeImage),
        (200, failed("X: [never_heard_of] a sentence"), GenerationError),
        (200, failed("Worker crashed"), BackendUnavailable),
        (200, {"status": "failed", "error": None}, BackendUnavailable),
        (200, {"status": "canceled"}, BackendUnavailable),
        (200, failed("Stopped: [stopped] the server is shutting down"), BackendUnavailable),
        (200, failed("DeviceLost: [device_lost] the GPU failed"), BackendUnavailable),
        (200, {"status": "succeeded", "output": None}, GenerationError),
        (200, {"status": "succeeded", "output": []}, GenerationError),
        (200, {"status": "succeeded", "output": ["https://elsewhere/a.webp"]}, InternalError),
        (200, {"status": "succeeded", "output": ["data:image/webp;base64,???"]}, GenerationError),
        (200, [], BackendUnavailable),
        (200, b"<html>", BackendUnavailable),
        (409, {"error": "At capacity"}, BackendBusy),
        (422, {"detail": []}, InternalError),
        (503, {"error": "Setup has not finished yet"}, BackendUnavailable),
    ],
)
def test_every_other_answer_is_an_error_of_its_kind(status, answer, error):
    with pytest.raises(error):
        by_cog(status, answer)


def test_nobody_there_and_nobody_answering_is_gone():
    async def main(url):
        await CogBackend(url, 0.2).generate(INPUTS)

    with pytest.raises(BackendUnavailable):
        asyncio.run(main("http://127.0.0.1:9"))
    with answering(lambda *_: time.sleep(1) or (200, {})) as server, pytest.raises(BackendUnavailable):
        asyncio.run(main(server.url))


def by_replicate(*states, outputs=(URL,), model="owner/fewstep", cancel_after=None):
    """What comes of a prediction that goes through `states`, asked by the official client; and the server."""
    states = list(states)

    def answers(method, path):
        if path.startswith("/files/"):
            return 200, webp()
        if path.endswith("/cancel"):
            states[:] = ["canceled"]
        status = states.pop(0) if len(states) > 1 else states[0]
        if status == "refused":
            return 401, {"title": "Unauthenticated", "status": 401}
        url = f"{server.url}/v1/predictions/abc"
        made = [one.replace("HERE", server.url) for one in outputs] if status == "succeeded" else None
        error = "[unsafe] flagged" if status == "failed" else None
        return 201, {
            "id": "abc", "status": status, "output": made, "error": error, "metrics": {"predict_time": 1.0},
            "urls": {"get": url, "cancel": f"{url}/cancel"}, "model": "owner/fewstep", "version": "v",
            "logs": "", "input": {}, "source": "api", "created_at": None, "started_at": None,
            "completed_at": None,
        }  # fmt: skip

    async def main():
        task = asyncio.create_task(ReplicateBackend(model, "secret", server.url).generate(INPUTS))
        if cancel_after:
            await asyncio.sleep(cancel_after)
            task.cancel()
        return (await asyncio.gather(task, return_exceptions=True))[0]

    with answering(answers) as server:
        return asyncio.run(main()), server


def test_replicate_generates_by_the_official_client_and_its_files_are_fetched_without_the_token():
    generated, server = by_replicate("processing", "succeeded", outputs=["HERE/files/a.webp", URL])
    assert generated.files == [webp(), webp()]
    first, *_, last = server.seen
    assert (first[1], first[2]["Authorization"]) == ("/v1/models/owner/fewstep/predictions", "Bearer secret")
    assert first[3]["input"] == INPUTS
    assert last[1] == "/files/a.webp" and "Authorization" not in {name.title() for name in last[2]}


def test_a_version_on_replicate_is_asked_for_by_itself():
    _, server = by_replicate("succeeded", model="owner/fewstep:abcdef")
    assert (server.seen[0][1], server.seen[0][3]["version"]) == ("/v1/predictions", "abcdef")


def test_what_fails_on_replicate_is_told_and_not_billed_again():
    assert isinstance(by_replicate("starting", "failed")[0], UnsafeImage)
    error, server = by_replicate("refused")
    assert isinstance(error, GenerationError) and "refused" in str(error) and len(server.seen) == 1


def test_whoever_leaves_ends_the_work_on_replicate_too():
    error, server = by_replicate("processing", cancel_after=0.3)
    assert isinstance(error, asyncio.CancelledError)
    assert any(path.endswith("/cancel") for _, path, _, _ in server.seen)
