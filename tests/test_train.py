"""train.py as Cog runs it: its schema, and trainings through the real server in its training mode."""

import base64
import io
import json
import os
import re
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from processes import naming
from safetensors import safe_open
from uploads import image, zipped

from fewstep.coglet.server import SCHEMA, Server, code_and_sentence, free_port, running_server
from fewstep.miniature.world.dataset import write_world
from fewstep.training.config import TrainingOptions

ROOT = Path(__file__).resolve().parents[1]
INPUTS = json.loads(SCHEMA.read_text())["components"]["schemas"]["TrainingInput"]


def test_inputs_and_defaults_are_those_of_the_options() -> None:
    defaults = {name: entry["default"] for name, entry in INPUTS["properties"].items() if "default" in entry}
    others = {"watch_every", "accumulate", "guidance", "skip"}  # of the commands only
    options = {name: value for name, value in vars(TrainingOptions()).items() if name not in others}
    assert defaults == {**options, "caption": None, "seed": None}  # the door draws a seed
    assert INPUTS["required"] == ["images"]
    assert all(entry["description"] for entry in INPUTS["properties"].values())


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("temporary")
    environ = os.environ | {"TMPDIR": str(folder), "FEWSTEP_VERIFY": "size"}
    with (
        tempfile.TemporaryFile() as log,
        running_server(port=free_port(), log=log, environ=environ, mode="train") as running,
    ):
        running.wait_ready()
        running.folder = folder
        # Without moving the place in the file at which the server writes.
        running.logged = lambda: os.pread(log.fileno(), 1 << 30, 0).decode()
        yield running


def as_zip(files: dict[str, bytes]) -> str:
    content = zipped(io.BytesIO(), files).getvalue()
    return f"data:application/zip;base64,{base64.b64encode(content).decode()}"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, 4)
    return as_zip({path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".npy"})


@pytest.mark.parametrize("method", ["lcf", "style"])
def test_a_zip_of_images_becomes_an_adapter_and_nothing_else_is_left(
    server, pictures, tmp_path, method
) -> None:
    inputs = {"images": pictures, "method": method, "steps": 2, "batch_size": 2, "rank": 4, "seed": 1}
    inputs["rehearse"], before = 2, set(server.folder.iterdir())
    status, answer = server.post("/trainings", {"input": inputs})
    assert status == 200 and answer["status"] == "succeeded", answer.get("error")
    assert answer["logs"].count(f"training {method} on ") == 1
    url = answer["output"]["weights"]
    path = tmp_path / "lora.safetensors"
    path.write_bytes(base64.b64decode(url.partition(",")[2]))
    with safe_open(path, framework="pt") as file:
        told = json.loads(file.metadata()["fewstep"])
        assert (told["method"], told["rehearse"]) == (method, 2)
        assert sum(name.endswith("lora_A.weight") for name in file.keys()) > 50
    [folder] = set(server.folder.iterdir()) - before
    assert folder.name.startswith("fewstep-training-")
    assert [path.name for path in folder.iterdir()] == ["pytorch_lora_weights.safetensors"]


def wait_for_nothing_but(files: set[Path], server: Server) -> None:
    """Return when no training runs and its files are gone: a cancel is answered before it is done."""
    while naming(server.folder) or set(server.folder.iterdir()) != files:
        time.sleep(0.05)


@pytest.mark.slow
def test_each_of_five_trainings_in_a_row_logs_each_line_once(server, pictures) -> None:
    for seed in range(5):
        inputs = {"images": pictures, "steps": 1, "batch_size": 1, "rank": 1, "rehearse": 0, "seed": seed}
        _, answer = server.post("/trainings", {"input": inputs})
        assert answer["status"] == "succeeded", answer.get("error")
        lines = [line for line in answer["logs"].splitlines() if line]
        assert f"training lcf on 4 images, seed {seed}" in lines
        assert len(lines) == len(set(lines))


def test_one_trains_at_a_time_and_is_gone_when_it_is_cancelled(server, pictures) -> None:
    before = set(server.folder.iterdir())
    body = {"id": "long", "input": {"images": pictures, "steps": 10_000, "rehearse": 0}}
    with ThreadPoolExecutor() as threads:
        long = threads.submit(server.post, "/trainings", body)
        try:
            while not naming(server.folder):
                time.sleep(0.05)
            _, second = server.post("/trainings", {"input": {"images": pictures, "steps": 1}})
        finally:
            assert server.post("/trainings/long/cancel", {})[0] == 200
        assert long.result()[1]["status"] == "canceled"
    wait_for_nothing_but(before, server)
    assert code_and_sentence(str(second.get("error"))).startswith("[busy] a training is running already")


@pytest.mark.slow
def test_a_cancel_in_the_middle_of_a_step_leaves_nothing(server, pictures) -> None:
    before = set(server.folder.iterdir())
    inputs = {"images": pictures, "steps": 12_345, "batch_size": 2, "rehearse": 0}
    with ThreadPoolExecutor() as threads:
        long = threads.submit(server.post, "/trainings", {"id": "steps", "input": inputs})
        try:
            while not re.search(r"\b[1-9]\d*/12345\b", server.logged()) and not long.done():
                time.sleep(0.05)
        finally:
            assert server.post("/trainings/steps/cancel", {})[0] == 200
        status, answer = long.result()
    assert (status, answer["status"]) == (200, "canceled"), answer
    wait_for_nothing_but(before, server)


@pytest.mark.parametrize(
    ("images", "more", "told"),
    [
        (as_zip({"notes.txt": b"x"}), {}, "[dataset] there is no picture"),
        (as_zip({"../a.png": b"x"}), {}, "[dataset] the zip holds a file whose path leads out of it"),
        (as_zip({"a.png": image()}), {}, "[dataset] 1 of 1 pictures have no caption"),
        pytest.param(  # both are only seen by what has imported torch, which takes seconds
            as_zip({"a.png": b"x"}),
            {"caption": "x"},
            "[dataset] none of 1 pictures can be opened",
            marks=pytest.mark.slow,
        ),
        ("data:application/zip;base64,AAAA", {}, "[dataset] the archive cannot be read"),
        pytest.param(
            as_zip({"a.png": image()}),
            {"caption": "x", "resolution": 100},
            "[dataset] the resolution is 100",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_cannot_be_trained_on_is_told_in_one_sentence(server, images, more, told) -> None:
    before = set(server.folder.iterdir())
    status, answer = server.post("/trainings", {"input": {"images": images, "steps": 1, **more}})
    assert status == 200 and answer["status"] == "failed"
    assert code_and_sentence(answer["error"]).startswith(told)
    assert set(server.folder.iterdir()) == before


def test_what_the_schema_can_refuse_is_422(server, pictures) -> None:
    for wrong in ({}, {"images": pictures, "steps": 0}, {"images": "file:///etc/passwd"}):
        assert server.post("/trainings", {"input": wrong})[0] == 422
