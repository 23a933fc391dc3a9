"""A server whose weights are not what the manifest says does not start."""

import shutil
from pathlib import Path

import pytest
from serving import PROMPT, start

from fewstep.coglet.server import ROOT
from fewstep.errors import ServerFailed


def remove_folder(weights: Path, largest: Path) -> str:
    shutil.rmtree(weights)
    return "weights/miniature is missing"


def remove_file(weights: Path, largest: Path) -> str:
    largest.unlink()
    return f"weights/miniature/{largest.relative_to(weights)} is missing"


def flip_byte(weights: Path, largest: Path) -> str:
    content = bytearray(largest.read_bytes())
    content[-1] ^= 1
    largest.write_bytes(content)
    return f"weights/miniature/{largest.relative_to(weights)} is damaged"


@pytest.mark.slow
@pytest.mark.parametrize("damage", [remove_folder, remove_file, flip_byte])
def test_damaged_weights_stop_the_start_with_one_sentence(damage, tmp_path):
    weights = tmp_path / "weights" / "miniature"
    shutil.copytree(ROOT / "weights" / "miniature", weights)
    expected = damage(weights, max(weights.rglob("*.safetensors"), key=lambda path: path.stat().st_size))
    with start(tmp_path, FEWSTEP_WEIGHTS=str(weights.parent)) as server:
        with pytest.raises(ServerFailed) as caught:
            server.wait_ready()
        status, _ = server.post("/predictions", {"input": {"prompt": PROMPT}}, 10)
    sentence = str(caught.value)
    assert sentence.startswith(f"[weights] {expected}") and "\n" not in sentence
    assert sentence.endswith("run: git checkout -- weights/miniature")
    assert str(tmp_path) not in sentence and status == 503
