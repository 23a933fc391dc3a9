"""Every error that a user of fewstep is told about, as one tree: a row each, with its code and HTTP status.

A sentence says what was given, what is allowed and what to do. It quotes numbers and choices, never free
text, machine paths or tokens, and it never says that something was "cancelled": coglet searches an error's
text for that word and then reports a failure as a cancel.
"""

import re
from typing import ClassVar

_CODE_AND_SENTENCE = re.compile(r"\[([a-z_]+)\] (.*)", re.DOTALL)


class FewstepError(Exception):
    """A stable code for programs and one sentence for people; `str()` gives `[code] sentence`."""

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500  # of an HTTP response that says so
    retry_after_s: int  # when to come again, where that is known

    def __init_subclass__(cls, code: str, status: int = 500) -> None:
        cls.code, cls.status = code, status
        _KINDS[code] = cls

    def __init__(self, sentence: str, retry_after_s: int | None = None) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"[{self.code}] {self.sentence}"


_KINDS: dict[str, type[FewstepError]] = {}


class InvalidRequest(FewstepError, code="invalid_request", status=422):
    """What the caller asked for breaks a rule; the model was not touched."""


class LoraError(FewstepError, code="lora", status=422):
    """Why a LoRA is refused, as the rest of a sentence that begins with its name; callers get InvalidRequest.

    `detail` may hold words from the file: it is for the log, and for files of the operator's own.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}{detail}")
        self.reason = reason


class Refused(FewstepError, code="refused", status=422):
    """A command cannot do what its arguments say; the terminal shows the sentence without the code."""

    def __str__(self) -> str:
        return self.sentence


class ServerFailed(FewstepError, code="server"):
    """A server did not come up, or failed; the sentence has the code of its setup() where that gave one."""

    def __str__(self) -> str:
        return self.sentence


class WeightsError(FewstepError, code="weights"):
    """A weights folder is missing, damaged, or holds what its manifest does not list."""


class DownloadError(FewstepError, code="download"):
    """The hub, the connection or the disk kept a file from arriving whole; a second run goes on."""


class SettingsError(FewstepError, code="settings"):
    """An environment variable holds a value that fewstep does not know."""


class DatasetError(FewstepError, code="dataset"):
    """The images or captions of a training are missing, unreadable or too many."""


class TrainingError(FewstepError, code="training"):
    """A run was asked for what it cannot do, its loss left the numbers, or its checkpoint cannot be kept."""


class GenerationError(FewstepError, code="generation_failed"):
    """The model ran, but its output is not an image (NaN, infinite, or missing)."""


class OutOfMemory(FewstepError, code="out_of_memory", status=503):
    """The GPU's memory does not hold what even one image of this size needs."""


class DeviceLost(FewstepError, code="device_lost", status=503):
    """The GPU failed this process for good; the server has to be started anew."""


class SafetyError(FewstepError, code="safety_check_failed"):
    """A finished image could not be checked for safety, and is withheld."""


class UnsafeImage(FewstepError, code="unsafe", status=422):
    """The safety checker flagged the image."""


class DeadlineExceeded(FewstepError, code="deadline", status=503):
    """The request was not done within its deadline."""


class Busy(FewstepError, code="busy", status=503):
    """The queue before the servers is full, or closed."""

    retry_after_s = 1


class TooMany(Busy, code="too_many_requests", status=429):
    """This client has enough waiting in the queue."""


class Stopped(FewstepError, code="stopped", status=503):
    """The work was given up: every caller had left, or the server no longer takes requests."""


class NotFound(FewstepError, code="not_found", status=404):
    """There is no such thing, or it is not this client's."""


class MethodNotAllowed(FewstepError, code="method_not_allowed", status=405):
    """The address takes other HTTP methods."""


class Taken(FewstepError, code="taken", status=409):
    """It is another's already."""


class Unauthorized(FewstepError, code="invalid_api_key", status=401):
    """The key of /v1 is missing or wrong."""


class UnknownHost(FewstepError, code="unknown_host", status=421):
    """The Host header names another server."""


class OtherSite(FewstepError, code="other_site", status=403):
    """A browser asks for the page of another site."""


class BodyTooLong(FewstepError, code="too_long", status=413):
    """The body has more bytes than its address takes."""


class BodyTooSlow(FewstepError, code="too_slow", status=408):
    """The body does not come."""


class EnhancerFailed(FewstepError, code="help_failed", status=502):
    """The chat endpoint did not answer as it should."""


class InternalError(FewstepError, code="internal"):
    """Something unforeseen broke. What it was goes to the log, never to the caller."""

    def __init__(self, sentence: str = "something unforeseen went wrong; the server's log says what") -> None:
        super().__init__(sentence)


def error_in(text: str) -> FewstepError | None:
    """Return the error that another process wrote as `[code] sentence`, whatever stands before it; a
    GenerationError for an unknown code, and None where there is no code."""
    match = _CODE_AND_SENTENCE.search(text)
    return _KINDS.get(match[1], GenerationError)(match[2]) if match else None
