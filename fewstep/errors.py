"""Every error that a user of fewstep is told about, as one tree.

FewstepError
├── InvalidRequest    invalid_request     the caller asked for something that cannot be had
├── WeightsError      weights             a model's files are missing, damaged or not its own
├── DownloadError     download            a file could not be had from the hub as it should be
├── SettingsError     settings            an environment variable holds something unknown
├── DatasetError      dataset             what is to be trained on is missing or unreadable
├── TrainingError     training            a training cannot begin as asked, or cannot go on
├── GenerationError   generation_failed   the model ran, and what it made is not an image
├── SafetyError       safety_check_failed a finished image could not be checked, and is withheld
├── UnsafeImage       unsafe              every image of the request was flagged
├── DeadlineExceeded  deadline            the request's time was up
├── Stopped           stopped             nobody waits for the result any more, or the server is going down
└── InternalError     internal            anything else; the details are in the log only

A sentence says what was given, what is allowed and what to do. It quotes numbers and choices, never free
text, machine paths or tokens, and it never says that something was "cancelled": coglet searches an error's
text for that word and then reports a failure as a cancel.
"""

from typing import ClassVar


class FewstepError(Exception):
    """A stable code for programs and one sentence for people; `str()` gives `[code] sentence`."""

    code: ClassVar[str] = "error"

    def __init__(self, sentence: str) -> None:
        super().__init__(sentence)
        self.sentence = sentence

    def __str__(self) -> str:
        return f"[{self.code}] {self.sentence}"


class InvalidRequest(FewstepError):
    """The caller's wish breaks a rule; the model was not touched."""

    code = "invalid_request"


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


class DeadlineExceeded(FewstepError):
    """The request was not done within its deadline."""

    code = "deadline"


class Stopped(FewstepError):
    """The work was given up: every caller had left, or the server no longer takes requests."""

    code = "stopped"


class InternalError(FewstepError):
    """Something unforeseen broke. What it was goes to the log, never to the caller."""

    code = "internal"

    def __init__(self, sentence: str = "something unforeseen went wrong; the server's log says what") -> None:
        super().__init__(sentence)
