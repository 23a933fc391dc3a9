"""How an error is sent: as the page reads it, {code, message}, or as OpenAI's clients do."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from fewstep.errors import FewstepError, InvalidRequest, MethodNotAllowed, NotFound

OPENAI = "/v1/"  # paths that OpenAI's clients ask for
RETRY_AFTER_S = 5
OPENAI_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


def error_response(
    error: FewstepError, status: int | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """Return `error` as the page reads it, with Retry-After where the same may work in a moment."""
    status = status or error.status
    content = {"code": error.code, "message": error.sentence}
    return JSONResponse(content, status, {**_retry_after(error, status), **(headers or {})})


def openai_error_response(error: FewstepError, status: int | None = None) -> JSONResponse:
    """Return `error` as OpenAI's clients read it; they retry on 429 and 503."""
    status = status or (400 if error.status == 422 else error.status)
    kind = OPENAI_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    content = {"message": error.sentence, "type": kind, "param": None, "code": error.code}
    return JSONResponse({"error": content}, status, _retry_after(error, status))


async def on_error(request: Request, error: Exception) -> JSONResponse:
    """Answer for a FewstepError that a route raised."""
    assert isinstance(error, FewstepError)
    openai = request.url.path.startswith(OPENAI)
    return openai_error_response(error) if openai else error_response(error)


async def on_http_exception(request: Request, error: Exception) -> JSONResponse:
    """Answer for what Starlette itself refuses."""
    assert isinstance(error, HTTPException)
    reasons = {
        404: NotFound("there is nothing at this address"),
        405: MethodNotAllowed("this address takes other methods"),
    }
    reason = reasons.get(error.status_code, InvalidRequest("the request cannot be read"))
    return error_response(reason, error.status_code, error.headers)


def _retry_after(error: FewstepError, status: int) -> dict[str, str]:
    seconds = getattr(error, "retry_after_s", RETRY_AFTER_S if status == 503 else None)
    return {"Retry-After": str(seconds)} if seconds else {}
