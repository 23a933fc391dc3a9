"""How a command ends: whatever keeps it from its work is one sentence on stderr and an exit status."""

import argparse
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

from fewstep.coglet.server import end_as_by_ctrl_c
from fewstep.errors import FewstepError
from fewstep.models.specs import MODELS


def say(sentence: str) -> None:
    """Write a line for the person at the terminal."""
    sys.stderr.write(f"{sentence}\n")
    sys.stderr.flush()


def status_of(work: Callable[[], None]) -> int:
    """Do `work` with our log on stderr: 0, 1 if it could not be done, 130 if it was interrupted."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line for each request
    # They speak of torchvision, and of settings that a scheduler has no use for; our own checks raise.
    for library in ("TRANSFORMERS", "DIFFUSERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    end_as_by_ctrl_c()
    try:
        work()
    except FewstepError as error:
        say(str(error))
        return 1
    except OSError as error:  # without its path, but for the reason: no space, no permission
        say(f"stopped by the system: {error.strerror or type(error).__name__}; mend that and run it again")
        return 1
    except KeyboardInterrupt:
        say("stopped; nothing half-done is in use, and running it again completes it")
        return 130
    return 0


def command_parser(command: str, description: str | None, **more: Any) -> argparse.ArgumentParser:
    """Return the parser of a command, whose help is `description` line by line."""
    layout = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(prog=command, description=description, formatter_class=layout, **more)


def model_parser(command: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of a command about one model of the hub, as its argument `name`."""
    parser = command_parser(command, description)
    names = [name for name, spec in MODELS.items() if spec.sources]
    parser.add_argument("name", nargs="?", choices=names, default="sdxl", help="the model (%(default)s)")
    return parser
