"""fewstep/coglet/adapter.py: what callers are told, and what only the log is."""

import asyncio
import logging
from pathlib import Path

import pytest

from fewstep.coglet import adapter as door
from fewstep.errors import InternalError, InvalidRequest, SettingsError


@pytest.mark.parametrize("error", [ValueError("/home/me hf_token"), SystemExit(3), KeyboardInterrupt()])
def test_the_unforeseen_is_told_without_details_and_logged_with_them(error, caplog):
    with pytest.raises(InternalError) as caught, door.mask_unexpected_errors():
        raise error
    assert str(caught.value).startswith("[internal] ") and "hf_token" not in str(caught.value)
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    record = next(record for record in caplog.records if record.levelno == logging.ERROR)
    assert record.exc_info is not None and record.exc_info[1] is error


@pytest.mark.parametrize("error", [InvalidRequest("steps is 9"), asyncio.CancelledError()])
def test_what_callers_may_know_passes_through(error):
    with pytest.raises(type(error)) as caught, door.mask_unexpected_errors():
        raise error
    assert caught.value is error


def test_another_version_of_coglet_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(door, "version", {"cog": door.COG_VERSION, "coglet": "0.24.0"}.__getitem__)
    with pytest.raises(SettingsError, match=r"coglet 0\.24\.0"):
        door.check_cog()


@pytest.mark.parametrize("value", ["/etc/passwd", "file:///etc/passwd", 5, b"x"])
def test_a_local_path_that_no_schema_refused_is_refused_here(value):
    with pytest.raises(
        InvalidRequest, match="^\\[invalid_request\\] image is not an address; send one"
    ) as caught:
        door.fetched_file("image", value)
    assert "passwd" not in str(caught.value)
    assert door.fetched_file("image", Path("/tmp/x")) == Path("/tmp/x")


def test_a_log_line_is_written_once_however_often_a_door_is_opened(monkeypatch):
    ours = logging.getLogger("fewstep")
    monkeypatch.setattr(ours, "handlers", [])
    for _ in range(5):
        door.log_to_stderr()
    assert len(ours.handlers) == 1
