"""The page's API as a browser asks it, before fake backends; what generates is in test_live.py."""

import base64
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest
from conftest import FakeBackend, FakePool, running_app, webp
from prometheus_client.parser import text_string_to_metric_families
from test_backends import answering
from test_live import open_page
from websockets.exceptions import ConnectionClosed

from fewstep.errors import SettingsError
from fewstep.web.app import MAX_SESSIONS
from fewstep.web.auth import cookie_key


@pytest.fixture(scope="module")
def web(tmp_path_factory):
    folder, pool = tmp_path_factory.mktemp("app"), FakePool(FakeBackend())
    with running_app(folder, pool, operator_key="open sesame") as web:
        yield web


def generated(web, client, prompt="a red house", **inputs):
    """An image of the client's, generated through its socket."""
    cookie = "; ".join(f"{name}={value}" for name, value in client.cookies.items())
    with open_page(web, additional_headers={"Cookie": cookie}) as page:
        page.type(prompt, **inputs)
        return page.read("painted")[0]["images"][0]


def test_the_page_and_its_facts(web):
    with web.client() as client:
        page = client.get("/")
        facts = client.get("/api/config").json()
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["cache-control"] == "no-cache"
    expected = {"model": "miniature", "live": True, "quick": True, "improve": False}
    assert facts.items() >= expected.items()
    assert facts["sizes"][0] == {"name": "1:1", "width": 256, "height": 256} and len(facts["sizes"]) == 9
    assert facts["guidance"] == [0, 4] and facts["negative_prompt_above"] == 1
    assert facts["examples"][0] == "a fox in the snow at night"  # of the words that this model knows


def test_an_image_is_kept_by_whom_it_was_generated_for_and_by_nobody_else(web):
    with web.client() as ann, web.client() as bob:
        image = generated(web, ann, seed=5)
        assert bob.post("/api/pictures", json={"id": image}).status_code == 404
        kept = ann.post("/api/pictures", json={"id": image})
        assert kept.status_code == 201
        assert (kept.json()["recipe"]["prompt"], kept.json()["recipe"]["seed"]) == ("a red house", 5)
        shown = bob.get("/api/pictures").json()["pictures"][0]
        assert shown == {**kept.json(), "mine": False}
        file = bob.get(shown["url"])
        assert (file.content, file.headers["content-type"]) == (webp(), "image/webp")
        assert bob.delete(f"/api/pictures/{shown['id']}").status_code == 404
        assert ann.delete(f"/api/pictures/{shown['id']}").status_code == 204
        assert bob.get(shown["url"]).status_code == 404


def test_names_reviews_and_forgetting(web):
    with web.client() as ann, web.client() as bob:
        assert ann.put("/api/me", json={"nickname": "Ann"}).json()["nickname"] == "Ann"
        taken = bob.put("/api/me", json={"nickname": "ANN"})
        assert (taken.status_code, taken.json()["code"]) == (409, "taken")
        ann.put("/api/review", json={"rating": 5, "text": "<script>alert(1)</script>"})
        reviews = bob.get("/api/reviews").json()
        assert reviews["count"] == 1
        assert reviews["reviews"][0].items() >= {"nickname": "Ann", "mine": False}.items()
        ann.post("/api/pictures", json={"id": generated(web, ann)})
        assert ann.delete("/api/me").status_code == 204
        assert bob.get("/api/reviews").json()["count"] == 0
        assert bob.get("/api/pictures").json()["pictures"] == []
        assert bob.put("/api/me", json={"nickname": "Ann"}).status_code == 200
        bob.delete("/api/me")


def test_a_cookie_is_signed_and_kept_from_scripts(web):
    with web.client() as client:
        client.cookies.clear()
        cookie = client.get("/").headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=lax" in cookie
        payload, _, signature = cookie.partition("=")[2].partition(";")[0].rpartition(".")
        other = base64.urlsafe_b64encode(b'"' + b"a" * 32 + b'"').decode().rstrip("=")
        for bad in ("", "x", f"{other}.{signature}", f"{payload}.", payload):
            client.cookies.clear()
            cookie = {"Cookie": f"fewstep_visitor={bad}"}
            assert client.put("/api/me", json={"nickname": "x"}, headers=cookie).status_code == 422, bad
        good = {"Cookie": f"fewstep_visitor={payload}.{signature}"}
        assert client.put("/api/me", json={"nickname": ""}, headers=good).status_code == 200


def test_the_key_of_the_cookies_is_whole_or_not_there_and_never_empty(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        [key] = set(pool.map(lambda _: cookie_key(tmp_path / "data"), range(32)))
    file = tmp_path / "data" / "cookie-key"
    assert len(key) >= 32 and file.stat().st_mode & 0o777 == 0o600
    assert [path.name for path in file.parent.iterdir()] == ["cookie-key"]
    file.write_text("")
    with pytest.raises(SettingsError):
        cookie_key(tmp_path / "data")


def test_a_client_has_only_so_many_sockets(web):
    with web.client() as client, ExitStack() as stack:
        cookie = {"Cookie": f"fewstep_visitor={client.cookies['fewstep_visitor']}"}
        for _ in range(MAX_SESSIONS[1]):
            stack.enter_context(open_page(web, additional_headers=cookie)).read("state")
        with pytest.raises(ConnectionClosed), open_page(web, additional_headers=cookie) as one_more:
            one_more.read("state")
        with open_page(web) as other:
            other.read("state")


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("PUT", "/api/me", b""), ("PUT", "/api/me", b"[]"), ("PUT", "/api/me", b'{"nickname": NaN}'),
        ("PUT", "/api/me", b"[" * 5000), ("PUT", "/api/me", b'{"nickname": "x", "id": "other"}'),
        ("PUT", "/api/me", b'\xff\xfe{"nickname": "x"}'),
        ("POST", "/api/pictures", b'{"id": "../../etc/passwd"}'),
        ("POST", "/api/pictures", b'{"id": {"a": 1}}'),
        ("PUT", "/api/review", b'{"rating": 1e999, "text": ""}'),
        ("PUT", "/api/review", b'{"rating": 5, "text": {}}'), ("POST", "/api/improve", b'{"prompt": "a"}'),
        ("DELETE", "/api/pictures/..%2f..%2fcookie-key", b""),
        ("DELETE", "/api/pictures/" + "a" * 300, b""),
    ],
)  # fmt: skip
def test_bad_input_is_a_short_sentence_and_changes_nothing(web, method, path, body):
    with web.client() as client:
        before = web.state.store.summary()
        answer = client.request(method, path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in (404, 422), answer.text
        assert set(answer.json()) == {"code", "message"} and len(answer.content) < 1000
        assert web.state.store.summary() == before


def test_a_form_of_another_site_cannot_be_sent(web):
    with web.client() as client:
        plain = client.put("/api/me", content=b'{"nickname": "x"}', headers={"Content-Type": "text/plain"})
        foreign = client.put("/api/me", json={"nickname": "x"}, headers={"Origin": "http://evil.example"})
        assert (plain.status_code, foreign.status_code) == (422, 403)


@pytest.mark.parametrize(
    "path",
    [
        "/static/..%2f..%2fapp.py", "/static/../app.py", "/static/%2e%2e/app.py", "/static//etc/passwd",
        "/..%2f", "/static/",
        "/pictures/..%2fcookie-key", "/pictures/..%2f..%2fdata%2fcookie-key", "/pictures/cookie-key",
        "/pictures/%00.webp",
        "/predictions", "/shutdown", "/trainings", "/health-check", "/docs", "/openapi.json",
        "/v1/images/files/x",
    ],
)  # fmt: skip
def test_nothing_else_is_served(web, path):
    with web.client() as client:
        assert client.get(path).status_code == 404
        for method in ("POST", "PUT"):
            answer = client.request(method, path, json={"id": "../../x", "webhook": "http://127.0.0.1:9"})
            assert answer.status_code in (404, 405)


def test_what_a_client_adds_never_reaches_the_server_that_generates(web):
    """No id, no webhook, no header of a client's: the inputs are the whole of it."""
    backend = web.state.queue.workers[0].backend
    with web.client(headers={"Authorization": "Bearer x", "Prefer": "respond-async"}) as client:
        generated(web, client, steps=2)
    assert set(backend.inputs[-1]) == {
        "prompt", "steps", "guidance", "seed", "num_outputs", "aspect_ratio", "width", "height",
        "output_format", "output_quality",
    }  # fmt: skip


def test_the_operator_alone_sees_the_summary(web, tmp_path):
    with web.client() as client:
        assert client.get("/operator").status_code == 401
        assert client.get("/operator", auth=("any", "wrong")).status_code == 401
        assert client.get("/operator", headers={"Authorization": b"Basic \xff"}).status_code == 401
        summary = client.get("/operator", auth=("any", "open sesame")).text
    assert re.search(r"^pictures: \d+$", summary, re.MULTILINE) and "model: miniature" in summary
    with running_app(tmp_path, FakePool(FakeBackend())) as other, other.client() as client:
        assert client.get("/operator").status_code == 404


def test_metrics_and_health_tell_the_truth(tmp_path):
    pool = FakePool(FakeBackend())
    with running_app(tmp_path, pool) as web, web.client() as client:
        with open_page(web) as page:
            page.type("any")
            page.read("painted")
            found = {
                sample.name: sample.value
                for family in text_string_to_metric_families(client.get("/metrics").text)
                for sample in family.samples
                if "le" not in sample.labels
            }
            assert found["fewstep_paint_seconds_count"] == found["fewstep_wait_seconds_count"] == 1
            assert found["fewstep_visitors"] == found["fewstep_workers_ready"] == 1
            assert all(found[f"fewstep_{of}"] == 0 for of in ("queue_length", "running", "restarts_total"))
        assert (client.get("/healthz").status_code, client.get("/readyz").status_code) == (200, 200)
        pool.workers[0].ready = False
        assert (client.get("/healthz").status_code, client.get("/readyz").status_code) == (200, 503)


def test_prompts_are_improved_by_any_endpoint_that_speaks_openais_api(tmp_path):
    """A chat endpoint of our own, which the official client asks over HTTP."""
    texts = ['  "a red house, golden light" \n', "", None]

    def answer(*_):
        text = texts.pop(0)
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        completion = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        return 400 if text is None else 200, completion

    with answering(answer) as chat, ExitStack() as stack:
        settings = {"chat_key": "secret", "chat_url": f"{chat.url}/v1", "chat_model": "any"}
        web = stack.enter_context(running_app(tmp_path, FakePool(FakeBackend()), **settings))
        client = stack.enter_context(web.client())
        assert client.get("/api/config").json()["improve"] is True
        better = client.post("/api/improve", json={"prompt": "a red house"})
        assert better.json() == {"prompt": "a red house, golden light"}
        _, path, headers, body = chat.seen[0]
        [key] = [value for name, value in headers.items() if name.lower() == "authorization"]
        assert (path, key) == ("/v1/chat/completions", "Bearer secret")
        assert body["messages"][-1] == {"role": "user", "content": "a red house"}
        for _ in range(2):  # nothing to say, and an error
            failed = client.post("/api/improve", json={"prompt": "a red house"})
            assert (failed.status_code, failed.json()["code"]) == (502, "help_failed")
        assert client.post("/api/improve", json={"prompt": " "}).status_code == 422


def test_clients_who_come_at_once_all_get_their_page(web):
    with web.client() as client, ThreadPoolExecutor(16) as pool:
        assert set(pool.map(lambda _: client.get("/").status_code, range(200))) == {200}
