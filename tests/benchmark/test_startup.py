"""What a start takes, of the real commands."""

import pytest

from fewstep.benchmark import startup
from fewstep.errors import ServerFailed
from fewstep.settings import Settings

pytestmark = pytest.mark.slow


def test_a_server_is_started_and_the_imports_alone_are_too():
    assert startup.ready_s(Settings().weights_root) > 0
    assert startup.import_s() > 0


def test_the_first_of_each_is_not_counted(monkeypatch):
    counted = {name: iter((9.0, 3.0, 1.0, 2.0)) for name in ("predict_s", "ready_s", "import_s")}
    for name, seconds in counted.items():
        monkeypatch.setattr(startup, name, lambda *_, seconds=seconds: next(seconds))
    rows = startup.measure(Settings().weights_root, 3)
    assert [row["what"] for row in rows] == ["scripts/predict", "server to READY", "imports"]
    assert all((row["seconds"], row["least"], row["most"]) == (2, 1, 3) for row in rows)


def test_a_command_that_generates_nothing_is_no_measurement(monkeypatch, tmp_path):
    monkeypatch.setenv("FEWSTEP_WEIGHTS", str(tmp_path))
    with pytest.raises(ServerFailed, match="painted nothing"):
        startup.predict_s()
