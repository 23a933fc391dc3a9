"""What files and starts cost: encoders by the settings that `encode_image` takes, and the real commands."""

import pytest

from fewstep.benchmark import costs
from fewstep.errors import ServerFailed
from fewstep.images.codec import MIME_TYPES, encode_image
from fewstep.miniature.world.drawing import draw
from fewstep.miniature.world.scenes import Scene
from fewstep.settings import Settings

pytestmark = pytest.mark.slow


def test_rows_are_of_all_settings_and_those_in_use_are_among_them():
    image = draw(Scene("castle", "red", "snow", "hills", "day", "middle"), 1)
    rows = costs.measure_encoders(image, repeats=2)
    assert len(rows) == len(costs.ENCODERS)
    assert all(0 < row["least"] <= row["ms"] <= row["most"] for row in rows)
    sizes = {row["bytes"] for row in rows}
    for kind in MIME_TYPES:
        assert len(encode_image(image, kind, 90)) in sizes


def test_a_server_is_started_and_the_imports_alone_are_too():
    assert costs.ready_s(Settings().weights_root) > 0
    assert costs.import_s() > 0


def test_the_first_of_each_is_not_counted(monkeypatch):
    counted = {name: iter((9.0, 3.0, 1.0, 2.0)) for name in ("predict_s", "ready_s", "import_s")}
    for name, seconds in counted.items():
        monkeypatch.setattr(costs, name, lambda *_, seconds=seconds: next(seconds))
    rows = costs.measure_starts(Settings().weights_root, 3)
    assert [row["what"] for row in rows] == ["scripts/predict", "server to READY", "imports"]
    assert all((row["seconds"], row["least"], row["most"]) == (2, 1, 3) for row in rows)


def test_a_command_that_generates_nothing_is_no_measurement(monkeypatch, tmp_path):
    monkeypatch.setenv("FEWSTEP_WEIGHTS", str(tmp_path))
    with pytest.raises(ServerFailed, match="painted nothing"):
        costs.predict_s()
