"""The Predictor behind the real coglet, on the miniature: what callers send, and what they get back."""

import base64
import hashlib
import io
import json
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from serving import PROMPT, Generator, assert_same_image, data_url, read, start

from fewstep.coglet.server import (
    COGLET_ROOT,
    CONCURRENCY,
    ROOT,
    SCHEMA,
    running_server,
)
from fewstep.errors import ServerFailed
from fewstep.images.metadata import inputs_of, read_recipe
from fewstep.images.outputs import KEEP_S

LONG = f"{PROMPT}, {PROMPT}, " * 3
FAILED = re.compile(r"Prediction failed: Async prediction failed: (\w+): (\[[a-z_]+\] .+)")


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Generator]:
    folder = tmp_path_factory.mktemp("server")
    with start(folder) as server:
        server.wait_ready()
        yield Generator(server, folder)


@pytest.fixture(scope="module")
def reference(generator: Generator) -> bytes:
    return generator.generate()[0]


def test_a_prompt_is_answered_with_an_image_and_its_metrics(generator):
    status, answer = generator.ask(steps=...)
    [url] = answer["output"]
    head, _, body = url.partition(",")
    image = Image.open(io.BytesIO(base64.b64decode(body)))
    image.load()
    assert status == 200 and head == "data:image/webp;base64"
    assert (image.format, image.size) == ("WEBP", (256, 256))
    expected = {"seed": 7, "width": 256, "height": 256, "steps": 4, "batch_size": 1}
    assert answer["metrics"].items() >= expected.items()
    assert all(answer["metrics"][f"{stage}_ms"] >= 0 for stage in ("text", "steps", "decode", "encode"))
    assert "seed 7" in answer["logs"] and "unknown_words" not in answer["metrics"]


def test_words_that_no_training_has_seen_are_named(generator):
    status, answer = generator.ask(prompt="a red helicopter by a blorb", steps=1)
    assert status == 200 and answer["metrics"]["unknown_words"] == {"helicopter": "rocket", "blorb": ""}
    assert "2 words of the prompt are unknown to this model" in answer["logs"]
    assert "blorb" not in answer["logs"]  # a log keeps nothing of what somebody typed


def test_styles_come_and_go_without_a_trace_in_the_images(generator, reference):
    requests: dict[str, dict[str, object]] = {
        "flat": {"style": "flat"},
        "ink": {"style": "ink"},
        "less of the flat": {"style": "flat", "style_scale": 0.4},
        "both": {"style": "flat", "extra_style": "ink"},
        "less of the LCM-LoRA": {"lcm_scale": 0.8},
    }
    found = {name: generator.generate(**inputs)[0] for name, inputs in requests.items()}
    assert np.array_equal(read(generator.generate(style="flat", style_scale=0)[0]), read(reference))
    assert generator.generate()[0] == reference
    assert len({reference, *found.values()}) == 1 + len(requests)
    assert generator.generate(style="flat")[0] == found["flat"]


@pytest.mark.parametrize(
    "requests",
    [
        [{"prompt": prompt} for prompt in ["a blue tree in the snow", PROMPT] * 4],
        [{"prompt": prompt} for prompt in [LONG, PROMPT] * 4],
        [{"style": style} if style else {} for style in ["", "flat", "", "ink"] * 2],
    ],
    ids=["prompts", "lengths", "styles"],
)
def test_requests_at_once_each_get_their_own_image(generator, requests):
    asked = [{"seed": i, **inputs} for i, inputs in enumerate(requests)]
    alone = [generator.pixels(**inputs)[0] for inputs in asked]
    with ThreadPoolExecutor(CONCURRENCY) as callers:
        together = list(callers.map(lambda inputs: generator.pixels(**inputs)[0], asked))
    for found, expected in zip(together, alone, strict=True):
        assert_same_image(found, expected)


@pytest.mark.parametrize(
    "style",
    [
        *("/etc/passwd", "../../etc/passwd", "file:///etc/passwd", "http://127.0.0.1:{port}/x.safetensors"),
        *("https://127.0.0.1:{port}/x.safetensors", "https://localhost:{port}/x.safetensors"),
        *("https://huggingface.co@127.0.0.1:{port}/x", "https://[::ffff:127.0.0.1]:{port}/x"),
        *("https://2130706433:{port}/x", "https://0x7f.1:{port}/x", "https://127.1:{port}/x"),
        *("https://huggingface.co\\@127.0.0.1:{port}/x", "https://169.254.169.254/latest/meta-data"),
        *("data:,x", "nothere", "x" * 2000),
    ],
)
def test_a_style_that_leads_elsewhere_is_refused_and_nothing_is_asked(generator, reference, style):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        status, answer = generator.ask(style=style.format(port=listener.getsockname()[1]))
        with pytest.raises(TimeoutError):
            listener.accept()
    assert status == 200 and answer["status"] == "failed"
    kind, told = FAILED.fullmatch(answer["error"]).groups()  # type: ignore[union-attr]
    assert kind == "InvalidRequest" and told.startswith("[invalid_request] style")
    assert "passwd" not in told and "127" not in told
    assert generator.generate()[0] == reference


@pytest.fixture(scope="module")
def photo(generator: Generator) -> Image.Image:
    return Image.fromarray(generator.pixels(seed=11)[0].astype(np.uint8))


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_it_generates_from_an_image(generator, photo, image_format):
    far = []
    for strength in (0.05, 0.8):
        [found] = generator.pixels(image=data_url(photo, image_format), prompt_strength=strength)
        far.append(np.abs(found - np.asarray(photo, dtype=np.int16)).mean())
    assert far[0] < 12 and far[0] < far[1]


def test_the_size_is_the_images_or_ones_own_in_eights_and_reported(generator, photo):
    own = {"aspect_ratio": "custom", "width": 100, "height": 70}
    for inputs, size in (({"image": data_url(photo.resize((300, 200)))}, (312, 208)), (own, (104, 72))):
        status, answer = generator.ask(**inputs)
        assert (status, answer["status"]) == (200, "succeeded")
        assert (answer["metrics"]["width"], answer["metrics"]["height"]) == size


def test_it_repaints_where_the_mask_is_white(generator, photo):
    mask = Image.new("L", photo.size, 0)
    mask.paste(255, (128, 0, 256, 256))
    images = {"image": data_url(photo), "mask": data_url(mask)}
    [found] = generator.pixels(prompt="a night sky", prompt_strength=1, **images)
    difference = np.abs(found - np.asarray(photo, dtype=np.int16))
    assert difference[:, :80].mean() < 8 < difference[:, 144:].mean()


@pytest.mark.parametrize("name", ["image", "mask"])
@pytest.mark.parametrize(
    "value", ["/etc/passwd", "file:///etc/passwd", "ftp://x/y", "data:text/html,x", "x.png", "", 5]
)
def test_what_is_no_address_of_an_image_is_refused_by_the_schema(generator, reference, name, value):
    started = generator.predictions_started()
    status, answer = generator.ask(**{"image": data_url(Image.new("RGB", (64, 64))), name: value})
    assert status == 422 and name in json.dumps(answer["detail"])
    assert generator.predictions_started() == started
    assert generator.generate()[0] == reference


@pytest.mark.parametrize(
    "content", [b"not a picture", b"GIF89a" + bytes(100), b"\x89PNG\r\n\x1a\n" + bytes(50)]
)
def test_what_is_no_image_is_refused(generator, reference, content):
    status, answer = generator.ask(image=f"data:image/png;base64,{base64.b64encode(content).decode()}")
    assert status == 200 and answer["status"] == "failed"
    assert "[invalid_request] image does not open as a picture" in answer["error"]
    assert generator.generate()[0] == reference


@pytest.mark.parametrize("output_format", ["png", "jpg", "webp"])
def test_an_image_is_generated_again_from_its_own_file(generator, output_format):
    inputs: dict[str, object] = {
        "prompt": "a pink mushroom, ünïcödé \U0001f344", "negative_prompt": "rain", "guidance": 1.7,
        "steps": 3, "aspect_ratio": "3:2", "style": "flat", "style_scale": 0.65,
        "extra_style": "golden-hour", "lcm_scale": 0.9,
    }  # fmt: skip
    [expected] = generator.pixels(**inputs)
    [content] = generator.generate(output_format=output_format, **inputs)
    black = io.BytesIO()  # nothing can come from the stored pixels
    with Image.open(io.BytesIO(content)) as stored:
        options: dict[str, Any] = {"exif": stored.getexif()}
        if output_format == "png":
            options = {"pnginfo": PngInfo()}
            for name, text in stored.text.items():  # type: ignore[attr-defined]
                options["pnginfo"].add_itxt(name, text)
        Image.new("RGB", stored.size).save(black, stored.format, **options)
    black.seek(0)
    [found] = generator.pixels(**inputs_of(read_recipe(black)))
    assert np.array_equal(found, expected)


def test_image_i_has_seed_plus_i_modulo_31_bits_and_says_so(generator):
    contents = generator.generate(num_outputs=3, seed=2**31 - 2, output_format="png")
    recipes = [read_recipe(io.BytesIO(content)) for content in contents]
    assert [recipe["seed"] for recipe in recipes] == [2**31 - 2, 2**31 - 1, 0]
    for content, recipe in zip(contents, recipes, strict=True):
        assert_same_image(read(content), generator.pixels(**inputs_of(recipe))[0])


def test_an_image_generated_from_others_says_which(generator, photo):
    mask = Image.new("L", photo.size, 255)
    urls = {"image": data_url(photo), "mask": data_url(mask)}
    [content] = generator.generate(prompt_strength=0.4, **urls)
    recipe = read_recipe(io.BytesIO(content))
    for name, url in urls.items():
        sent = base64.b64decode(url.partition(";base64,")[2])
        assert recipe[f"{name}_sha256"] == hashlib.sha256(sent).hexdigest()
    [found] = generator.pixels(**inputs_of(recipe), **urls)
    [expected] = generator.pixels(prompt_strength=0.4, **urls)
    assert np.array_equal(found, expected)


def test_the_readmes_call_of_the_hosted_api_generates_here_with_another_base_url(generator):
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    [call] = [block for block in blocks if "api.replicate.com" in block]
    call = call.replace("https://api.replicate.com/v1", f"http://127.0.0.1:{generator.server.port}")
    done = subprocess.run(["bash", "-ec", call], capture_output=True, check=True, timeout=60)
    answer = json.loads(done.stdout)
    generator.ids.append(answer["id"])  # which coglet drew
    assert answer["status"] == "succeeded"
    assert answer["metrics"].items() >= {"steps": 4, "seed": 7}.items()
    assert answer["output"][0].startswith("data:image/webp;base64,")


@pytest.mark.parametrize(("output_format", "kind"), [("jpg", "JPEG"), ("png", "PNG")])
def test_every_format_is_what_it_says(generator, output_format, kind):
    image = Image.open(io.BytesIO(generator.generate(output_format=output_format, aspect_ratio="16:9")[0]))
    assert (image.format, image.size) == (kind, (336, 192))


def test_a_drawn_seed_is_reported_and_generates_the_same_again(generator):
    _, answer = generator.ask(seed=...)
    seed = answer["metrics"]["seed"]
    assert base64.b64decode(answer["output"][0].partition(",")[2]) == generator.generate(seed=seed)[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0), ("steps", 9), ("steps", "4"), ("steps", 2.5), ("steps", True), ("guidance", 99),
        ("guidance", -1), ("guidance", "1"), ("seed", -1), ("seed", 2**31), ("width", 100_000),
        ("width", 0), ("height", 63), ("num_outputs", 0), ("num_outputs", 5), ("aspect_ratio", "5:4"),
        ("output_format", "gif"), ("output_quality", 0), ("output_quality", 101), ("clip_skip", -1),
        ("clip_skip", 5), ("prompt", ...), ("prompt", None), ("prompt", 5), ("prompt", "x" * 1_000_000),
        ("negative_prompt", "x" * 2001),
    ],
)  # fmt: skip
def test_what_the_schema_forbids_is_422_and_never_reaches_the_model(generator, reference, name, value):
    before = generator.predictions_started()
    status, answer = generator.ask(**{name: value})
    assert status == 422
    assert [detail["loc"] for detail in answer["detail"]] == [["body", "input", name]]
    assert generator.predictions_started() == before
    assert generator.generate() == [reference]


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": " \n"}, "prompt is empty"),
        ({"prompt": "a\0b"}, "NUL"),
        ({"width": 128}, "only with aspect_ratio=custom"),
        ({"height": 128}, "only with aspect_ratio=custom"),
        ({"aspect_ratio": "custom", "width": 128}, "both width and height"),
        ({"aspect_ratio": "custom", "width": 2048, "height": 2048}, "smaller size"),
        ({"prompt": "a (red)4 house"}, "weights from 0 to 3"),
        ({"negative_prompt": "<lora:snow:1>"}, "into the input style"),
        ({"prompt": "red " * 400}, "at most 8 fit"),
        ({"clip_skip": 2}, "from 0 to 1"),
        ({"guidance": 4.5}, "from 0 to 4"),
        ({"seed": 1e300}, "31|seed"),
    ],
)
def test_what_only_request_knows_fails_with_a_code_and_a_sentence(generator, reference, inputs, sentence):
    status, answer = generator.ask(**inputs)
    if status != 422:  # 1e300 is a number beyond the maximum or no integer, as coglet's parser sees it
        kind, told = FAILED.fullmatch(answer["error"]).groups()
        assert (status, answer["status"], kind) == (200, "failed", "InvalidRequest")
        assert told.startswith("[invalid_request] ") and re.search(sentence, told)
    assert generator.generate() == [reference]


def test_weights_of_words_long_prompts_and_clip_skip_each_generate_otherwise(generator, reference):
    requests = [{"prompt": f"({PROMPT})1.4"}, {"prompt": LONG}, {"clip_skip": 1}]
    assert len({reference, *(generator.generate(**inputs)[0] for inputs in requests)}) == 4


def test_a_prompt_that_would_hang_compels_parser_is_generated(generator):
    assert generator.generate(prompt="a red house " + "(" * 50)


def test_the_same_seed_gives_the_same_bytes(generator, reference):
    assert generator.generate(steps=2.0) == [reference]  # to JSON, that is an integer
    assert generator.generate(seed=8) != [reference]


def test_beyond_the_concurrency_is_409_at_once_and_nothing_is_lost(generator):
    callers = 3 * CONCURRENCY
    gate = threading.Barrier(callers)

    def ask(seed: int) -> tuple[int, Any]:
        gate.wait()
        return generator.ask(seed=seed, steps=8, num_outputs=2)

    with ThreadPoolExecutor(callers) as pool:
        answers = list(pool.map(ask, range(callers)))
    served = [(seed, answer) for seed, (status, answer) in enumerate(answers) if status == 200]
    full = [answer for status, answer in answers if status == 409]
    assert len(served) >= CONCURRENCY and len(full) >= 1 and len(served) + len(full) == callers
    assert all("capacity" in answer["error"] for answer in full)
    for seed, answer in served:
        assert answer["status"] == "succeeded" and len(answer["output"]) == 2
        assert answer["metrics"]["seed"] == seed
    assert generator.ask()[0] == 200


def test_a_cancelled_prediction_says_so_and_leaves_the_next_one_right(generator, reference):
    name = generator.new_id()
    with ThreadPoolExecutor(1) as caller:
        asked = caller.submit(generator.ask, id=name, steps=8, num_outputs=4, aspect_ratio="21:9")
        while f"prediction_id={name}" not in generator.log.read_text(errors="replace"):
            time.sleep(0.01)
        time.sleep(0.1)  # coglet calls a cancel in the first milliseconds a failure
        assert generator.server.post(f"/predictions/{name}/cancel", {}, 10)[0] == 200
        status, answer = asked.result()
    assert (status, answer["status"]) == (200, "canceled"), answer
    assert generator.generate() == [reference]


def test_files_of_old_predictions_are_removed_however_they_ended(generator):
    for i in range(int(os.environ.get("FILES_TEST_PREDICTIONS", "24"))):  # 500, when there is time
        if i % 4 == 0:  # refused
            assert generator.ask(prompt="")[1]["status"] == "failed"
        elif i % 4 == 1:  # its caller leaves, which cancels it
            with pytest.raises(TimeoutError):
                generator.ask(steps=8, num_outputs=4, timeout_s=0.03)
        else:
            assert generator.ask()[1]["status"] == "succeeded"
    generator.generate()  # queued behind what was left, so that all has ended
    for path in [*generator.outputs.iterdir(), *(COGLET_ROOT / name for name in generator.ids)]:
        if path.exists():  # a refused one has none, nor has a cancelled one always
            os.utime(path, (time.time() - KEEP_S - 1,) * 2)
    generator.ask(num_outputs=2)
    assert len(list(generator.outputs.iterdir())) == 2
    assert [name for name in generator.ids if (COGLET_ROOT / name).exists()] == generator.ids[-1:]


def test_after_all_this_the_server_is_healthy(generator):
    generator.server.wait_ready()
    assert "Traceback" not in generator.log.read_text(errors="replace")


@pytest.mark.slow
def test_a_restart_generates_the_same_bytes_and_the_end_leaves_no_files(reference, tmp_path):
    with start(tmp_path) as server:
        server.wait_ready()
        other = Generator(server, tmp_path)
        _, answer = other.ask()
        [name] = other.ids
        assert (COGLET_ROOT / name).exists() and len(list(other.outputs.iterdir())) == 1
    assert base64.b64decode(answer["output"][0].partition(",")[2]) == reference
    assert not (COGLET_ROOT / name).exists() and list(other.outputs.iterdir()) == []


def test_a_taken_port_is_named(generator):
    port = generator.server.port
    with pytest.raises(ServerFailed, match=f"port {port} .*set PORT"), running_server(port=port, environ={}):
        pass


def test_the_schema_that_coglet_reads_is_the_golden_file(generator):
    assert (ROOT / ".cog" / "openapi_schema.json").read_bytes() == SCHEMA.read_bytes()
