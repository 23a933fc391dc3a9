"""The ASGI app: the page, its API, its WebSocket, and what operators look at; and uvicorn, set up for it."""

import asyncio
import base64
import logging
import secrets
import socket
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket

from fewstep import request as limits
from fewstep.errors import FewstepError, InternalError, NotFound, TooMany
from fewstep.models.specs import ModelSpec
from fewstep.settings import Settings
from fewstep.web.app_state import GRACE_S, AppState, app_state
from fewstep.web.auth import HEADERS, LOOPBACK, Guard
from fewstep.web.error_responses import error_response, on_error, on_http_exception
from fewstep.web.gallery import routes as gallery_routes
from fewstep.web.live import LiveSession
from fewstep.web.messages import Prompt, body_of
from fewstep.web.openai_api import routes as openai_routes
from fewstep.web.worker_pool import WorkerPool

logger = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"
REST_MS = 350  # that typing has paused when the full size is asked for
TRY_AGAIN_LATER = 1013
MAX_SESSIONS = (256, 16)  # in all, and of one client
MAX_ENHANCED = 4
MAX_MESSAGE = 16 * 10**6  # bytes, of a WebSocket
MAX_CONNECTIONS = 1024


def create_app(
    spec: ModelSpec, settings: Settings, worker_pool: WorkerPool, hosts: Collection[str] = LOOPBACK
) -> Starlette:
    """Return the app for `spec`, which `worker_pool` generates with, and which answers to `hosts` alone.

    Raises SettingsError for a data folder or a database that cannot be used.
    """
    state = AppState(spec, settings, worker_pool)
    handlers = {FewstepError: on_error, HTTPException: on_http_exception, Exception: _on_unforeseen}
    app = Starlette(
        routes=[
            Route("/", _page),
            Mount("/static", StaticFiles(directory=STATIC, check_dir=False)),
            Route("/api/config", _config),
            Route("/api/improve", _improve, methods=["POST"]),
            WebSocketRoute("/live", _live),
            *gallery_routes(),
            *openai_routes(),
            Route("/operator", _summary),
            Route("/metrics", _metrics),
            Route("/healthz", _alive),
            Route("/readyz", _ready),
        ],
        middleware=[Middleware(Guard, hosts=hosts)],
        exception_handlers=handlers,
        lifespan=state.lifespan,
    )
    app.state.app_state = state
    return app


class WebServer(uvicorn.Server):
    """Serves an app of `create_app`. When it is to end, what waits is told at once, and what is running
    is finished; uvicorn by itself would wait for both, and then cut them off."""

    def __init__(self, app: Starlette, host: str, port: int) -> None:
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            access_log=False,
            log_config=None,  # what it says goes where all else goes, and other libraries' handlers stay open
            log_level="warning",
            timeout_graceful_shutdown=int(GRACE_S),
            server_header=False,
            limit_concurrency=MAX_CONNECTIONS,
            ws_max_size=MAX_MESSAGE,
            ws_per_message_deflate=False,  # images are as small as they get
        )
        super().__init__(config)
        self._state = app.state.app_state

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish and turn away; called once, at the end of serve()."""
        await self._state.end()
        await super().shutdown(sockets)


async def _page(request: Request) -> Response:
    page = FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-cache"})
    app_state(request).welcome(request, page)
    return page


async def _config(request: Request) -> Response:
    state = app_state(request)
    spec = state.spec
    most_guidance = limits.LCM_LORA_MAX_GUIDANCE if spec.lcm_lora else limits.GUIDANCE[1]
    return JSONResponse(
        {
            "model": spec.name,
            "native_size": spec.native_size,
            "max_pixels": spec.max_pixels,
            "sizes": [
                {"name": name, "width": width, "height": height}
                for name, (width, height) in limits.named_sizes_of(spec.native_size).items()
            ],
            "steps": limits.STEPS,
            "default_steps": 4,
            "guidance": (limits.GUIDANCE[0], most_guidance),
            "default_guidance": spec.default_guidance,
            "negative_prompt_above": None if spec.embedded_guidance else 1.0,
            "outputs": limits.NUM_OUTPUTS,
            "prompt_max": limits.PROMPT_MAX_CHARS,
            "seed_max": limits.SEED_MAX,
            "styles": state.style_names(),
            "style_scale": limits.STYLE_SCALE,
            "strength": limits.STRENGTH,
            "default_strength": 0.8,
            "live": state.worker_pool.live,
            "quick": spec.quick_size is not None,
            "rest_ms": REST_MS,
            "improve": state.enhancer is not None,
            "examples": spec.examples,
        }
    )


async def _live(socket: WebSocket) -> None:
    state = app_state(socket)
    # Without cookies one can generate, but keep nothing.
    client = state.client(socket) or f"from {socket.client.host if socket.client else ''}"
    await socket.accept()
    own = sum(other.client == client for other in state.sessions)
    if len(state.sessions) >= MAX_SESSIONS[0] or own >= MAX_SESSIONS[1]:
        await socket.close(TRY_AGAIN_LATER)
        return
    shared = state.spec, state.style_names, state.queue, state.recent, state.reader
    session = LiveSession(socket, client, *shared)
    state.sessions.add(session)
    try:
        await session.run()
    finally:
        state.sessions.discard(session)


async def _improve(request: Request) -> Response:
    state = app_state(request)
    if state.enhancer is None:
        raise NotFound("this server has no helper for prompts")
    client, body = state.known_client(request), await body_of(request, Prompt)
    if client in state.enhancing or len(state.enhancing) >= MAX_ENHANCED:  # each is billed to the operator
        raise TooMany("a prompt is being improved; wait for that one", 2)
    state.enhancing.add(client)
    try:
        return JSONResponse({"prompt": await state.enhancer.improve(body.prompt)})
    finally:
        state.enhancing.discard(client)


async def _summary(request: Request) -> Response:
    state = app_state(request)
    if not state.settings.operator_key:
        raise NotFound("there is no such page")
    given = b""
    with suppress(ValueError):
        given = base64.b64decode(request.headers.get("authorization", "").removeprefix("Basic "))
    if not secrets.compare_digest(given.partition(b":")[2], state.settings.operator_key.encode()):
        asked = {"WWW-Authenticate": 'Basic realm="fewstep"'}
        return PlainTextResponse("the operator's key is the password\n", 401, asked)
    counts = await asyncio.to_thread(state.store.summary)
    now = {
        "model": state.spec.name,
        "painters_ready": sum(worker.ready for worker in state.queue.workers),
        "open_pages": len(state.sessions),
        "waiting": state.queue.waiting,
        "running": state.queue.running,
        "painted_since_start": state.queue.generates,
    }
    return PlainTextResponse("".join(f"{name}: {value}\n" for name, value in {**now, **counts}.items()))


async def _metrics(request: Request) -> Response:
    state = app_state(request)
    metrics, queue = state.metrics, state.queue
    metrics.waiting.set(queue.waiting)
    metrics.running.set(queue.running)
    metrics.clients.set(len(state.sessions))
    metrics.workers.set(sum(worker.ready for worker in queue.workers))
    return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _alive(request: Request) -> Response:
    return PlainTextResponse("alive\n")


async def _ready(request: Request) -> Response:
    ready = app_state(request).queue.ready
    return PlainTextResponse("ready\n" if ready else "not ready\n", 200 if ready else 503)


async def _on_unforeseen(request: Request, error: Exception) -> Response:
    logger.error("unforeseen error", exc_info=error)
    response = error_response(InternalError())
    response.headers.update(HEADERS)  # this one is made outside of the guard
    return response
