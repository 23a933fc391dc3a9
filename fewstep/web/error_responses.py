"""How an error is sent: as the page reads it, {code, message}, or as OpenAI's clients do."""

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from fewstep.errors import FewstepError, InvalidRequest, MethodNotAllowed, NotFound

OPENAI = "/v1/"  # paths that OpenAI's clients ask for
RETRY_AFTER_S = 5
OPENAI_TYPES = {401: "authentication_error", 429: "rate_limit_error"}


def error_response(error: FewstepError, status: int | None = None, *, openai: bool = False) -> JSONResponse:
    """Return `error`, with Retry-After where the same may work in a moment: `openai`'s clients read it on 429
    and 503."""
    status = status or (400 if openai and error.status == 422 else error.status)
    content: dict[str, Any] = {"code": error.code, "message": error.sentence}
    if openai:
        kind = OPENAI_TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        content = {"error": {**content, "type": kind, "param": None}}
    seconds = getattr(error, "retry_after_s", RETRY_AFTER_S if status == 503 else None)
    retry_after = {"Retry-After": str(seconds)} if seconds else {}
    return JSONResponse(content, status, retry_after)


async def on_error(request: Request, error: Exception) -> JSONResponse:
    """Answer for a FewstepError that a route raised."""
    assert isinstance(error, FewstepError)
    return error_response(error, openai=request.url.path.startswith(OPENAI))


async def on_http_exception(request: Request, error: Exception) -> JSONResponse:
    """Answer for what Starlette itself refuses."""
    assert isinstance(error, HTTPException)
    reasons = {
        404: NotFound("there is nothing at this address"),
        405: MethodNotAllowed("this address takes other methods"),
    }
    reason = reasons.get(error.status_code, InvalidRequest("the request cannot be read"))
    response = error_response(reason, error.status_code)
    response.headers.update(error.headers or {})
    return response
