"""A running Cog server of the miniature, as its tests ask it."""

import base64
import io
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fewstep.coglet.server import Server, free_port, running_server

PROMPT = "a red house in a meadow with mountains at sunset"


class Generator:
    """A running server, its files and its log."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.server = server
        self.outputs = folder / "outputs"
        self.log = folder / "log"
        self.ids: list[str] = []

    def ask(self, id: str | None = None, timeout_s: float = 100, **inputs: object) -> tuple[int, Any]:
        asked = {"prompt": PROMPT, "seed": 7, "steps": 2} | inputs
        sent = {name: value for name, value in asked.items() if value is not ...}
        body = {"id": id or self.new_id(), "input": sent}
        return self.server.post("/predictions", body, timeout_s)

    def generate(self, **inputs: object) -> list[bytes]:
        status, answer = self.ask(**inputs)
        while status == 409:  # coglet has room for a caller again only a moment after its answer
            time.sleep(0.01)
            status, answer = self.ask(**inputs)
        assert (status, answer.get("status")) == (200, "succeeded"), answer
        return [base64.b64decode(url.partition(";base64,")[2], validate=True) for url in answer["output"]]

    def pixels(self, **inputs: object) -> list[np.ndarray]:
        return [read(content) for content in self.generate(output_format="png", **inputs)]

    def predictions_started(self) -> int:
        return self.log.read_text(errors="replace").count("Starting prediction")

    def new_id(self) -> str:
        self.ids.append(f"test-{os.getpid()}-{self.server.port}-{len(self.ids)}")
        return self.ids[-1]


def read(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)), dtype=np.int16)


def assert_same_image(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal within what other kernels at another batch size change: DESIGN's bound for fp32."""
    difference = np.abs(found - expected)
    assert difference.max() <= 1 and (difference > 0).mean() <= 0.0005


def environment(folder: Path, **variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FEWSTEP_")}
    # fp32, since a CPU that multiplies bf16 would use it, and other batch sizes then differ by more.
    own = {"FEWSTEP_OUTPUTS": str(folder / "outputs"), "FEWSTEP_DTYPE": "fp32", "NO_COLOR": "1"}
    return kept | own | variables


def start(folder: Path, **variables: str) -> Any:
    log = open(folder / "log", "wb")
    return running_server(port=free_port(), log=log, environ=environment(folder, **variables))


def data_url(image: Image.Image, image_format: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, image_format)
    return f"data:image/{image_format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
