"""OpenAI's images API: by the official client, and as Open WebUI and LibreChat send it."""

import base64
import io

import httpx2
import numpy as np
import openai
import pytest
from conftest import FakeBackend, FakePool, decoded, encoded, running_app
from PIL import Image
from test_live import difference, read

PROMPT = "a red car in the snow at night"


@pytest.fixture(scope="module")
def fake_web(tmp_path_factory):
    with running_app(tmp_path_factory.mktemp("api"), FakePool(FakeBackend()), api_key="right") as web:
        yield web


@pytest.fixture
def backend(fake_web):
    return fake_web.state.queue.workers[0].backend


def ask(fake_web, key="right", **fields):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    url = f"{fake_web.url}/v1/images/generations"
    return httpx2.post(url, json={"prompt": "a", **fields}, headers=headers, trust_env=False, timeout=60)


@pytest.mark.slow
def test_the_official_client_generates(web):
    client = openai.OpenAI(base_url=f"{web.url}/v1", api_key="any", max_retries=0)
    seeded = {"prompt": PROMPT, "extra_body": {"seed": 3}}
    answer = client.images.generate(model="gpt-image-1", n=2, size="auto", **seeded)
    images = [decoded(one.b64_json) for one in answer.data]
    assert [image.format for image in images] == ["PNG", "PNG"]
    assert read(images[0]) >= {"red", "car", "snow", "night"}
    assert (np.asarray(images[0]) != np.asarray(images[1])).any()
    again = client.images.generate(model="any", output_format="png", **seeded)
    assert abs(np.asarray(decoded(again.data[0].b64_json), int) - np.asarray(images[0], int)).max() <= 2
    assert client.models.list().data[0].id == "miniature"


def test_the_official_client_edits_where_the_mask_is_transparent(web):
    client = openai.OpenAI(base_url=f"{web.url}/v1", api_key="any", max_retries=0)
    plain = client.images.generate(prompt=PROMPT, extra_body={"seed": 3}).data[0].b64_json
    alpha = np.full((256, 256), 255, np.uint8)
    alpha[:, :128] = 0
    mask = Image.fromarray(np.dstack([np.zeros((256, 256, 3), np.uint8), alpha]), "RGBA")
    edited = client.images.edit(
        image=("a.png", base64.b64decode(plain)),
        mask=("m.png", encoded(mask)),
        prompt="a blue sailboat on a lake at sunset",
        extra_body={"seed": 9, "strength": 1},
    )
    away = difference(decoded(plain), decoded(edited.data[0].b64_json))
    assert away[:, 144:].mean() < 4 < 20 < away[:, :112].mean()


WEBUI = {"model": "dall-e-3", "n": 1, "size": "1024x1024", "response_format": "b64_json"}
LIBRECHAT = {"model": "gpt-image-1", "background": "auto", "quality": "auto", "output_format": "webp"}


@pytest.mark.parametrize(("sent", "kind"), [(WEBUI, "PNG"), ({**LIBRECHAT, "size": "auto"}, "WEBP")])
def test_a_request_as_open_webui_and_as_librechat_sends_it(web, sent, kind):
    image = decoded(ask(web, prompt=PROMPT, **sent).json()["data"][0]["b64_json"])
    assert (image.format, image.size) == (kind, (256, 256))  # the miniature's, in the same shape


def test_an_address_is_given_to_whoever_asks_for_one(fake_web):
    answer = ask(fake_web, response_format="url")
    url = answer.json()["data"][0]["url"]
    assert url.startswith(fake_web.url)
    file = httpx2.get(url, trust_env=False)
    assert file.status_code == 200 and Image.open(io.BytesIO(file.content)).size == (16, 16)


@pytest.mark.parametrize(
    ("fields", "inputs"),
    [
        ({}, {"steps": 4, "width": 256, "height": 256, "output_format": "png"}),
        ({"quality": "low"}, {"steps": 2}),
        ({"quality": "hd"}, {"steps": 8}),
        ({"quality": "unheard of"}, {"steps": 4}),
        ({"num_inference_steps": 50}, {"steps": 8}),
        ({"guidance_scale": 7.5, "negative_prompt": "blue"}, {"guidance": 4.0, "negative_prompt": "blue"}),
        ({"size": "1792x1024"}, {"width": 336, "height": 192}),
        ({"size": "100x100"}, {"width": 96, "height": 96}),
        ({"size": "160x130"}, {"width": 160, "height": 128}),
        ({"output_format": "jpeg", "output_compression": 50}, {"output_format": "jpg", "output_quality": 50}),
        (
            {"model": "x", "user": "y", "style": "vivid", "background": "auto", "moderation": "low"},
            {"num_outputs": 1},
        ),
        ({"seed": "7"}, {"seed": 7}),
        ({"n": "2"}, {"num_outputs": 2}),
    ],
)
def test_what_clients_send_is_read_as_they_mean_it(fake_web, backend, fields, inputs):
    assert ask(fake_web, **fields).status_code == 200
    assert {name: backend.inputs[-1][name] for name in inputs} == inputs


def test_ten_images_have_seeds_that_count_up(fake_web, backend):
    backend.inputs.clear()
    assert len(ask(fake_web, n=10, seed=2**31 - 3).json()["data"]) == 10
    parts = sorted((one["seed"], one["num_outputs"]) for one in backend.inputs)
    assert parts == [(1, 4), (5, 2), (2**31 - 3, 4)]


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": None}, {"prompt": ""}, {"prompt": "x" * 2001}, {"size": "big"}, {"size": "0x0"},
        {"size": "100x1000"}, {"n": 0}, {"n": 11}, {"n": True}, {"n": 1.5}, {"n": "9" * 30},
        {"output_format": "gif"}, {"seed": "x"}, {"guidance_scale": {}}, {"num_inference_steps": "NaN"},
        {"output_compression": {"a": 1}},
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_an_error_as_openais(fake_web, fields):
    answer = ask(fake_web, **fields)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"


def test_a_wrong_key_is_refused(fake_web):
    for key in ("", "wrong", "right "[:-2]):
        answer = ask(fake_web, key=key)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{fake_web.url}/v1", api_key="wrong").models.list()


@pytest.mark.parametrize("content", [b"", b"not a picture", b"<svg/>"])
def test_an_edit_of_what_is_no_image_is_refused(fake_web, content):
    sent = {"data": {"prompt": "a"}, "headers": {"Authorization": "Bearer right"}, "trust_env": False}
    for files in ({"image": ("a.png", content)}, None):
        answer = httpx2.post(f"{fake_web.url}/v1/images/edits", files=files, **sent)
        assert answer.status_code == 400
