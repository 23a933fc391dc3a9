"""What all routes share: the model's facts, the queue, what is remembered, and who is asking."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from itsdangerous import BadSignature, URLSafeSerializer
from starlette.requests import HTTPConnection, Request
from starlette.responses import JSONResponse, Response

from fewstep.errors import FewstepError, InvalidRequest
from fewstep.models.specs import ModelSpec
from fewstep.settings import Settings
from fewstep.web.auth import cookie_key
from fewstep.web.cog_inputs import ImageReader
from fewstep.web.live import LiveSession
from fewstep.web.monitoring import Metrics
from fewstep.web.prompt_enhancer import PromptEnhancer
from fewstep.web.queue import RequestQueue
from fewstep.web.recent import RecentImages
from fewstep.web.store import Store
from fewstep.web.worker_pool import WorkerPool

COOKIE = "fewstep_visitor"
RETRY_AFTER_S = 5
YEAR_S = 365 * 24 * 60 * 60
GOING_AWAY = 1001
STATUS = {"invalid_request": 422, "unsafe": 422, "deadline": 503, "stopped": 503}


@dataclass(eq=False, kw_only=True)
class AppState:
    """One front door, on one event loop."""

    spec: ModelSpec
    settings: Settings
    crew: WorkerPool
    store: Store
    queue: RequestQueue
    metrics: Metrics
    help: PromptEnhancer | None = None
    helping: set[str] = field(default_factory=set)  # visitors
    reader: ImageReader = field(default_factory=ImageReader)
    recent: RecentImages = field(default_factory=RecentImages)
    sessions: set[LiveSession] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._signer = URLSafeSerializer(cookie_key(self.settings.web_data), salt="visitor")

    def visitor(self, connection: HTTPConnection) -> str | None:
        """Who is asking, by the cookie that we signed."""
        try:
            found = self._signer.loads(connection.cookies.get(COOKIE, ""))
        except BadSignature:
            return None
        return found if isinstance(found, str) else None

    def known(self, request: Request) -> str:
        """`visitor`, of whom something is to be kept. Raises InvalidRequest without a cookie."""
        visitor = self.visitor(request)
        if visitor is None:
            raise InvalidRequest("your browser sent no cookie of this page; allow cookies and load it again")
        return visitor

    def style_names(self) -> list[str]:
        """List the operator's own style LoRAs for this model, as predict() takes them."""
        folder = self.settings.styles_root / self.spec.name
        return sorted(file.stem for file in folder.glob("*.safetensors"))

    async def end(self, grace_s: float) -> None:
        """Take no more wishes, finish what is being generated, and let the pages go, which come again."""
        await self.queue.close(grace_s)
        closing = (session.close(GOING_AWAY) for session in tuple(self.sessions))
        await asyncio.gather(*closing, return_exceptions=True)

    def welcome(self, request: Request, response: Response) -> None:
        """Give the cookie to whoever has none."""
        if self.visitor(request) is None:
            signed = self._signer.dumps(uuid.uuid4().hex)
            secure = request.headers.get("x-forwarded-proto", request.url.scheme) == "https"
            response.set_cookie(
                COOKIE, str(signed), max_age=YEAR_S, httponly=True, samesite="lax", secure=secure
            )


def app_state(connection: HTTPConnection) -> AppState:
    """The one that serves `connection`."""
    front: AppState = connection.app.state.front
    return front


async def body_of(request: Request, fields: Collection[str] | None = None) -> dict[str, Any]:
    """The JSON object that was sent. Raises InvalidRequest, also for others than `fields`, if given."""
    # A form of another site can send any text, but not with this type.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise InvalidRequest("send JSON, with Content-Type: application/json")
    try:
        found = json.loads(await request.body(), parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise InvalidRequest("the body is no JSON") from None
    if not isinstance(found, dict):
        raise InvalidRequest("the body is not a JSON object")
    if fields is not None and not set(fields).issuperset(found):
        raise InvalidRequest(f"a field is unknown; send only {', '.join(sorted(fields))}")
    return found


def status_of(error: FewstepError) -> int:
    """The HTTP status of an error."""
    status: int = getattr(error, "status", STATUS.get(error.code, 500))
    return status


def told(error: FewstepError) -> JSONResponse:
    """An error as the page reads it."""
    status = status_of(error)
    return JSONResponse({"code": error.code, "message": error.sentence}, status, retry_after(error, status))


def retry_after(error: FewstepError, status: int) -> dict[str, str]:
    """The header that says when to come again, for what will pass."""
    usual = RETRY_AFTER_S if status == 503 else None
    seconds = getattr(error, "retry_after_s", usual)
    return {"Retry-After": str(seconds)} if seconds else {}


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
