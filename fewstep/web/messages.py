"""What clients send as JSON, checked before anything else sees it."""

import unicodedata
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from starlette.requests import Request

from fewstep.errors import InvalidRequest
from fewstep.request import PROMPT_MAX_CHARS

NICKNAME_MAX = 40
REVIEW_MAX = 1000
RATING = (1, 5)
BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0")  # letters and symbols that are not seen
UNSEEN = ("Cc", "Cf", "Cs", "Co")  # categories: controls, what turns the direction of text, half surrogates
M = TypeVar("M", bound=BaseModel)


def checked(model: type[M], fields: bytes | dict[str, str]) -> M:
    """Return JSON, or the fields of a form, as a `model`, whose descriptions say what each must be.

    Raises InvalidRequest, which names fields of the model and quotes nothing.
    """
    try:
        if isinstance(fields, bytes):
            return model.model_validate_json(fields)
        return model.model_validate(fields)
    except ValidationError as error:
        place, known = error.errors()[0]["loc"], model.model_fields
        if not place:
            raise InvalidRequest("the body is not a JSON object") from None
        if place[0] in known:
            raise InvalidRequest(f"{place[0]} must be {known[str(place[0])].description}") from None
        raise InvalidRequest(f"a field is unknown; send only {', '.join(sorted(known))}") from None


async def body_of(request: Request, model: type[M]) -> M:
    """Return the JSON that was sent as a `model`. Raises InvalidRequest."""
    # A form of another site can send any text, but not with this type.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise InvalidRequest("send JSON, with Content-Type: application/json")
    return checked(model, await request.body())


def _visible(name: str, most: int, allowed: str = "") -> AfterValidator:
    """Check text that others will see, and may not be fooled by; `allowed` are exceptions."""

    def check(value: str) -> str:
        text = unicodedata.normalize("NFC", value).strip()
        if len(text) > most:
            raise InvalidRequest(f"{name} has {len(text)} characters; at most {most} are allowed")
        chars = set(text) - set(allowed)
        if any(unicodedata.category(char) in UNSEEN or char in BLANK for char in chars):
            raise InvalidRequest(f"{name} holds characters that cannot be seen; leave them out")
        return text

    return AfterValidator(check)


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Nickname(_Body):
    """A client's display name; one with an invisible character would look like another's."""

    nickname: Annotated[str, _visible("nickname", NICKNAME_MAX), Field(description="text")]


class ReviewText(_Body):
    """A review; its text may have lines and joined emoji."""

    rating: int = Field(
        ge=RATING[0], le=RATING[1], description=f"a whole number from {RATING[0]} to {RATING[1]}"
    )
    text: Annotated[str, _visible("text", REVIEW_MAX, "\n\u200d"), Field(description="text")] = ""


class ImageId(_Body):
    """One of the client's last images."""

    id: str = Field(description="text")


class Prompt(_Body):
    """A prompt to be improved."""

    prompt: Annotated[
        str,
        StringConstraints(strip_whitespace=True, min_length=1, max_length=PROMPT_MAX_CHARS),
        Field(description=f"text of 1 to {PROMPT_MAX_CHARS} characters"),
    ]
