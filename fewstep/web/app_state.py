"""What all routes share: the model's facts, the queue, what is remembered, and who is asking."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass, field

from itsdangerous import BadSignature, URLSafeSerializer
from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

from fewstep.errors import InvalidRequest
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
YEAR_S = 365 * 24 * 60 * 60
GOING_AWAY = 1001


@dataclass(eq=False, kw_only=True)
class AppState:
    """The state of one app, on one event loop."""

    spec: ModelSpec
    settings: Settings
    worker_pool: WorkerPool
    store: Store
    queue: RequestQueue
    metrics: Metrics
    enhancer: PromptEnhancer | None = None
    enhancing: set[str] = field(default_factory=set)  # clients whose prompt is being improved
    reader: ImageReader = field(default_factory=ImageReader)
    recent: RecentImages = field(default_factory=RecentImages)
    sessions: dict[LiveSession, str] = field(default_factory=dict)  # and whose each is

    def __post_init__(self) -> None:
        self._signer = URLSafeSerializer(cookie_key(self.settings.web_data), salt="visitor")

    def client(self, connection: HTTPConnection) -> str | None:
        """Return the id of who is asking, by the cookie that we signed; None without one."""
        try:
            client = self._signer.loads(connection.cookies.get(COOKIE, ""))
        except BadSignature:
            return None
        return client if isinstance(client, str) else None

    def known_client(self, request: Request) -> str:
        """Return `client`, for whom something is to be kept. Raises InvalidRequest without a cookie."""
        client = self.client(request)
        if client is None:
            raise InvalidRequest("your browser sent no cookie of this page; allow cookies and load it again")
        return client

    def welcome(self, request: Request, response: Response) -> None:
        """Give the cookie to whoever has none."""
        if self.client(request) is None:
            signed = self._signer.dumps(uuid.uuid4().hex)
            secure = request.headers.get("x-forwarded-proto", request.url.scheme) == "https"
            response.set_cookie(
                COOKIE, str(signed), max_age=YEAR_S, httponly=True, samesite="lax", secure=secure
            )

    def style_names(self) -> list[str]:
        """List the operator's own style LoRAs for this model, as predict() takes them."""
        folder = self.settings.styles_root / self.spec.name
        return sorted(file.stem for file in folder.glob("*.safetensors"))

    async def end(self, grace_s: float) -> None:
        """Take no more requests, finish what is being generated, and let the pages go, which come again."""
        await self.queue.close(grace_s)
        closing = (session.close(GOING_AWAY) for session in tuple(self.sessions))
        await asyncio.gather(*closing, return_exceptions=True)


def app_state(connection: HTTPConnection) -> AppState:
    """Return the state of the app that serves `connection`."""
    state: AppState = connection.app.state.app_state
    return state
