"""Every error that a user of fewstep is told about, as one tree, with the code and the HTTP status of each.

FewstepError
├── InvalidRequest    invalid_request     422  the caller asked for something that cannot be had
├── LoraError         lora                422  a LoRA file is refused; callers are told as InvalidRequest
├── Refused           refused             422  a command line asks for something that cannot be had
├── WeightsError      weights             500  a model's files are missing, damaged or not its own
├── DownloadError     download            500  a file could not be had from the hub as it should be
├── SettingsError     settings            500  an environment variable holds something unknown
├── DatasetError      dataset             500  what is to be trained on is missing or unreadable
├── TrainingError     training            500  a training cannot begin as asked, or cannot go on
├── GenerationError   generation_failed   500  the model ran, and what it made is not an image
├── SafetyError       safety_check_failed 500  a finished image could not be checked, and is withheld
├── UnsafeImage       unsafe              422  every image of the request was flagged
├── DeadlineExceeded  deadline            503  the request's time was up
├── Busy              busy                503  the queue before the servers is full, or closed
│   └── TooMany       too_many_requests   429  this client has enough in the queue
├── Stopped           stopped             503  nobody waits for the result any more, or the server ends
├── NotFound          not_found           404  there is no such thing, or it is another's
├── MethodNotAllowed  method_not_allowed  405  the address takes other HTTP methods
├── Taken             taken               409  it is another's already
├── Unauthorized      invalid_api_key     401  the key of /v1 is missing or wrong
├── UnknownHost       unknown_host        421  the Host header names another server
├── OtherSite         other_site          403  a browser asks for the page of another site
├── BodyTooLong       too_long            413  the body has more bytes than its address takes
├── BodyTooSlow       too_slow            408  the body does not come
├── EnhancerFailed    help_failed         502  the chat endpoint did not answer as it should
└── InternalError     internal            500  anything else; the details are in the log only

A sentence says what was given, what is allowed and what to do. It quotes numbers and choices, never free
text, machine paths or tokens, and it never says that something was "cancelled": coglet searches an error's
text for that word and then reports a failure as a cancel.
"""

from typing import ClassVar


class FewstepError(Exception):
    """A stable code for programs and one sentence for people; `str()` gives `[code] sentence`."""

    code: ClassVar[str] = "error"
    status: ClassVar[int] = 500  # of an HTTP response that says so

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)
        self.sentence = sentence

    def __str__(self) -> str:
        return f"[{self.code}] {self.sentence}"


class InvalidRequest(FewstepError):
    """What the caller asked for breaks a rule; the model was not touched."""

    code = "invalid_request"
    status = 422


class LoraError(FewstepError):
    """Why a LoRA is refused, as the rest of a sentence that begins with its name.

    `detail` may hold words from the file: it is for the log, and for files of the operator's own.
    """

    code = "lora"
    status = 422

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}{detail}")
        self.reason = reason


class Refused(FewstepError):
    """A command cannot do what its arguments say; the terminal shows the sentence without the code."""

    code = "refused"
    status = 422


class WeightsError(FewstepError):
    """A weights folder is missing, damaged, or holds what its manifest does not list."""

    code = "weights"


class DownloadError(FewstepError):
    """The hub, the connection or the disk kept a file from arriving whole; a second run goes on."""

    code = "download"


class SettingsError(FewstepError):
    """A setting holds a value that fewstep does not know."""

    code = "settings"


class DatasetError(FewstepError):
    """The images or captions of a training are missing, unreadable or too many."""

    code = "dataset"


class TrainingError(FewstepError):
    """A run was asked for what it cannot do, its loss left the numbers, or its checkpoint cannot be kept."""

    code = "training"


class GenerationError(FewstepError):
    """The model ran, but its output is not an image (NaN, infinite, or missing)."""

    code = "generation_failed"


class SafetyError(FewstepError):
    """A finished image could not be checked for safety."""

    code = "safety_check_failed"


class UnsafeImage(FewstepError):
    """The safety checker flagged the image."""

    code = "unsafe"
    status = 422


class DeadlineExceeded(FewstepError):
    """The request was not done within its deadline."""

    code = "deadline"
    status = 503
    retry_after_s: int  # when to come again, where that is known

    def __init__(self, sentence: str, retry_after_s: int | None = None) -> None:
        super().__init__(sentence)
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s


class Busy(FewstepError):
    """The queue before the servers is full, or closed; `retry_after_s` says when to come again."""

    code = "busy"
    status = 503

    def __init__(self, sentence: str, retry_after_s: int = 1) -> None:
        super().__init__(sentence)
        self.retry_after_s = retry_after_s


class TooMany(Busy):
    """This client has enough waiting."""

    code = "too_many_requests"
    status = 429


class Stopped(FewstepError):
    """The work was given up: every caller had left, or the server no longer takes requests."""

    code = "stopped"
    status = 503


class NotFound(FewstepError):
    """There is no such thing, or it is not this client's."""

    code = "not_found"
    status = 404


class MethodNotAllowed(FewstepError):
    """The address takes other HTTP methods."""

    code = "method_not_allowed"
    status = 405


class Taken(FewstepError):
    """It is another's already."""

    code = "taken"
    status = 409


class Unauthorized(FewstepError):
    """The API key is missing or wrong."""

    code = "invalid_api_key"
    status = 401


class UnknownHost(FewstepError):
    """The Host header names another server."""

    code = "unknown_host"
    status = 421


class OtherSite(FewstepError):
    """A browser asks for the page of another site."""

    code = "other_site"
    status = 403


class BodyTooLong(FewstepError):
    """The body has more bytes than its address takes."""

    code = "too_long"
    status = 413


class BodyTooSlow(FewstepError):
    """The body does not come."""

    code = "too_slow"
    status = 408


class EnhancerFailed(FewstepError):
    """The chat endpoint did not answer as it should."""

    code = "help_failed"
    status = 502


class InternalError(FewstepError):
    """Something unforeseen broke. What it was goes to the log, never to the caller."""

    code = "internal"

    def __init__(self, sentence: str = "something unforeseen went wrong; the server's log says what") -> None:
        super().__init__(sentence)


def error_from(code: str, sentence: str) -> FewstepError:
    """Return the error of `code`, as it comes from another process; GenerationError for an unknown code."""
    kinds = [kind for kind in globals().values() if isinstance(kind, type) and issubclass(kind, FewstepError)]
    return next((kind for kind in kinds if kind.code == code), GenerationError)(sentence)
