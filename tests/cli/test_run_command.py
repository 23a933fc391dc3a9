"""However a command's work ends, its user gets one sentence and a status, and no traceback or path."""

import errno
import signal

import pytest

from fewstep.cli.run import status_of
from fewstep.errors import ServerFailed, WeightsError


@pytest.fixture(autouse=True)
def handlers():
    """`status_of` is for a process of its own, whose signals it takes over."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    "error, status, said",
    [
        (WeightsError("it is damaged"), 1, "[weights] it is damaged"),
        (ServerFailed("the port is taken"), 1, "the port is taken"),
        (OSError(errno.ENOSPC, "No space left on device", "/secret/place"), 1, "No space left on device"),
        (PermissionError(errno.EACCES, "Permission denied", "/secret/place"), 1, "Permission denied"),
        (ConnectionError("offline"), 1, "ConnectionError"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_an_end_is_one_sentence_and_a_status(capsys, error, status, said):
    def work():
        raise error

    assert status_of(work) == status
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert "Traceback" not in err and "/secret" not in err


def test_sigterm_ends_it_as_ctrl_c_does(capsys):
    assert status_of(lambda: signal.raise_signal(signal.SIGTERM)) == 130
    assert status_of(lambda: None) == 0
