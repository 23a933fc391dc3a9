"""What predict.py and train.py share: the pinned server, a way out for logs, errors fit for callers."""

import contextvars
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from fewstep.errors import FewstepError, InternalError, InvalidRequest, SettingsError

# They rest on how this version behaves; cog.yaml and pyproject.toml name it too.
COG_VERSION = "0.23.1"

logger = logging.getLogger(__name__)


def check_cog() -> None:
    """Raise SettingsError unless cog and coglet are of the version that fewstep is made for."""
    versions = {name: version(name) for name in ("cog", "coglet")}
    if set(versions.values()) != {COG_VERSION}:
        both = " and ".join(f"{name} {number}" for name, number in versions.items())
        fix = f"fewstep is made for {COG_VERSION} of both, so install that"
        raise SettingsError(f"{both} are installed; {fix}")


def log_to_stderr() -> None:
    """Give our messages a way out; coglet files what stderr gets under the prediction that wrote it."""
    ours = logging.getLogger("fewstep")
    if not ours.handlers:  # train() comes here again and again
        ours.addHandler(logging.StreamHandler())
    ours.setLevel(logging.INFO)


def fetched_file(name: str, value: object) -> Path:
    """Return the file that coglet fetched for the input `name`.

    An address or a data URL arrives as a Path of coglet's own; a local path, or a file: URL, is handed on as
    the str that the caller sent, where no schema refused it. Raises InvalidRequest for that.
    """
    if not isinstance(value, Path):
        raise InvalidRequest(f"{name} is not an address; send one that begins with https:// or data:image/")
    return value


@contextmanager
def mask_unexpected_errors() -> Iterator[None]:
    """Let a FewstepError through, since callers may read it; turn the unforeseen into InternalError.

    The details of the latter go to the server's log alone. Being cancelled passes through as it is.
    """
    try:
        yield
    except FewstepError:
        raise
    # SystemExit ends coglet's event loop in an async predict() and leaves an async setup() starting for ever.
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        # In an empty context, because coglet hands a prediction's own log lines to its caller.
        contextvars.Context().run(logger.error, "unforeseen error", exc_info=error)
        raise InternalError() from None
