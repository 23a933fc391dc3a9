"""The ASGI app: the page, its API, its WebSocket, and what operators look at."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator, Collection
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocket

from fewstep.errors import FewstepError, InternalError
from fewstep.models.specs import ModelSpec
from fewstep.request import (
    GUIDANCE,
    LCM_LORA_MAX_GUIDANCE,
    NUM_OUTPUTS,
    PROMPT_MAX_CHARS,
    SEED_MAX,
    STEPS,
    STRENGTH,
    STYLE_SCALE,
    named_sizes_of,
)
from fewstep.web.app_state import Front, body_of, front_of, told
from fewstep.web.auth import HEADERS, LOOPBACK, Guard
from fewstep.web.cog_inputs import has_quick_size
from fewstep.web.gallery import routes as community_routes
from fewstep.web.live import LiveSession
from fewstep.web.monitoring import Metrics
from fewstep.web.openai_api import routes as openai_routes
from fewstep.web.prompt_enhancer import PromptHelp
from fewstep.web.queue import PaintQueue, TooMany
from fewstep.web.serving import GRACE_S
from fewstep.web.settings import WebSettings
from fewstep.web.store import NotFound, Store
from fewstep.web.worker_pool import Crew

logger = logging.getLogger(__name__)

STATIC = Path(__file__).parent / "static"
REST_MS = 350  # that typing has paused when the full size is asked for
TRY_AGAIN_LATER = 1013
MAX_SESSIONS = (256, 16)  # in all, and of one visitor
MAX_HELPED = 4
EXAMPLES = {
    "miniature": (
        "a red house in the snow at night",
        "a blue sailboat on a lake at sunset",
        "a pink balloon over a lavender field in the fog",
        "a white castle in the desert by day, with a city behind it",
        "a green tree in a meadow with mountains under an aurora",
    ),
    "": (
        "a lighthouse on a cliff in a storm, oil painting",
        "portrait of an old fisherman, soft window light, 85mm photograph",
        "a tiny greenhouse full of ferns inside a glass bottle",
        "isometric cutaway of a cosy bookshop at night",
        "a fox asleep in autumn leaves, watercolour",
    ),
}


def create_app(
    spec: ModelSpec, settings: WebSettings, crew: Crew, hosts: Collection[str] = LOOPBACK
) -> Starlette:
    """The app for `spec`, painted by `crew`; it answers to `hosts` and to nobody who asks by another name.

    Raises SettingsError for a data folder or a database that cannot be used.
    """
    metrics = Metrics()
    queue = PaintQueue(
        limit=settings.queue_limit,
        per_visitor=settings.per_visitor,
        deadline_s=settings.deadline_s,
        watcher=metrics,
    )
    queue.workers = crew.workers
    chat = settings.chat_key, settings.chat_url, settings.chat_model
    front = Front(
        spec=spec,
        settings=settings,
        crew=crew,
        store=Store(settings.data, settings.database_url),
        queue=queue,
        metrics=metrics,
        help=PromptHelp(*chat) if settings.chat_key else None,
    )

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.loop = asyncio.get_running_loop()
        crew.start(_on_change(front), metrics.restarted)
        try:
            yield
        finally:
            await front.end(GRACE_S)
            await crew.stop()
            front.store.close()

    app = Starlette(
        routes=_routes(),
        middleware=[Middleware(Guard, hosts=hosts)],
        exception_handlers={
            FewstepError: _told,
            HTTPException: _told_plainly,
            Exception: _told_nothing,
        },
        lifespan=lifespan,
    )
    app.state.front = front
    return app


def _on_change(front: Front) -> Any:
    last = [front.queue.ready]
    telling: set[asyncio.Task[Any]] = set()

    def changed() -> None:
        front.queue.pump()
        if front.queue.ready != last[0]:
            last[0] = front.queue.ready
            for session in tuple(front.sessions):
                task = asyncio.create_task(_quietly(session))
                telling.add(task)
                task.add_done_callback(telling.discard)

    return changed


async def _quietly(session: LiveSession) -> None:
    with contextlib.suppress(Exception):  # it has just left
        await session.tell_state()


def _routes() -> list[Any]:
    return [
        Route("/", _page),
        Mount("/static", StaticFiles(directory=STATIC, check_dir=False)),
        Route("/api/config", _config),
        Route("/api/improve", _improve, methods=["POST"]),
        WebSocketRoute("/live", _live),
        *community_routes(),
        *openai_routes(),
        Route("/operator", _summary),
        Route("/metrics", _metrics),
        Route("/healthz", _alive),
        Route("/readyz", _ready),
    ]


async def _page(request: Request) -> Response:
    page = FileResponse(STATIC / "index.html", headers={"Cache-Control": "no-cache"})
    front_of(request).welcome(request, page)
    return page


async def _config(request: Request) -> Response:
    front = front_of(request)
    spec = front.spec
    return JSONResponse(
        {
            "model": spec.name,
            "native_size": spec.native_size,
            "max_pixels": spec.max_pixels,
            "sizes": [
                {"name": name, "width": width, "height": height}
                for name, (width, height) in named_sizes_of(spec.native_size).items()
            ],
            "steps": STEPS,
            "default_steps": 4,
            "guidance": (GUIDANCE[0], LCM_LORA_MAX_GUIDANCE if spec.lcm_lora else GUIDANCE[1]),
            "default_guidance": spec.default_guidance,
            "negative_prompt_above": None if spec.embedded_guidance else 1.0,
            "outputs": NUM_OUTPUTS,
            "prompt_max": PROMPT_MAX_CHARS,
            "seed_max": SEED_MAX,
            "styles": front.settings.style_names(),
            "style_scale": STYLE_SCALE,
            "strength": STRENGTH,
            "default_strength": 0.8,
            "live": front.crew.live,
            "quick": has_quick_size(spec),
            "rest_ms": REST_MS,
            "improve": front.help is not None,
            "examples": EXAMPLES.get(spec.name, EXAMPLES[""]),
        }
    )


async def _live(socket: WebSocket) -> None:
    front = front_of(socket)
    # Without cookies one can paint, but keep nothing.
    visitor = front.visitor(socket) or f"from {socket.client.host if socket.client else ''}"
    await socket.accept()
    own = sum(session.visitor == visitor for session in front.sessions)
    if len(front.sessions) >= MAX_SESSIONS[0] or own >= MAX_SESSIONS[1]:
        await socket.close(TRY_AGAIN_LATER)
        return
    session = LiveSession(
        socket,
        visitor,
        spec=front.spec,
        styles=front.settings.style_names,
        queue=front.queue,
        recent=front.recent,
        reader=front.reader,
    )
    front.sessions.add(session)
    try:
        await session.run()
    finally:
        front.sessions.discard(session)


async def _improve(request: Request) -> Response:
    front = front_of(request)
    if front.help is None:
        raise NotFound("this server has no helper for prompts")
    visitor = front.known(request)
    fields = await body_of(request, ["prompt"])
    if visitor in front.helping or len(front.helping) >= MAX_HELPED:  # each is billed to the operator
        raise TooMany("a prompt is being improved; wait for that one", 2)
    front.helping.add(visitor)
    try:
        return JSONResponse({"prompt": await front.help.improve(fields.get("prompt"))})
    finally:
        front.helping.discard(visitor)


async def _summary(request: Request) -> Response:
    front = front_of(request)
    if not front.settings.operator_key:
        raise NotFound("there is no such page")
    try:
        given = base64.b64decode(request.headers.get("authorization", "").removeprefix("Basic "))
    except ValueError:
        given = b""
    if not secrets.compare_digest(given.partition(b":")[2], front.settings.operator_key.encode()):
        asked = {"WWW-Authenticate": 'Basic realm="fewstep"'}
        return PlainTextResponse("the operator's key is the password\n", 401, asked)
    counts = await asyncio.to_thread(front.store.summary)
    now = {
        "model": front.spec.name,
        "painters_ready": sum(worker.ready for worker in front.queue.workers),
        "open_pages": len(front.sessions),
        "waiting": front.queue.waiting,
        "running": front.queue.running,
        "painted_since_start": front.queue.paints,
    }
    return PlainTextResponse("".join(f"{name}: {value}\n" for name, value in {**now, **counts}.items()))


async def _metrics(request: Request) -> Response:
    front = front_of(request)
    metrics, queue = front.metrics, front.queue
    metrics.waiting.set(queue.waiting)
    metrics.running.set(queue.running)
    metrics.visitors.set(len(front.sessions))
    metrics.workers.set(sum(worker.ready for worker in queue.workers))
    return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _alive(request: Request) -> Response:
    return PlainTextResponse("alive\n")


async def _ready(request: Request) -> Response:
    ready = front_of(request).queue.ready
    return PlainTextResponse("ready\n" if ready else "not ready\n", 200 if ready else 503)


async def _told(request: Request, error: Exception) -> Response:
    assert isinstance(error, FewstepError)
    return told(error)


async def _told_plainly(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    sentence = {404: "there is nothing at this address", 405: "this address takes other methods"}
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    message = sentence.get(error.status_code, "the request cannot be read")
    return JSONResponse({"code": code, "message": message}, error.status_code, error.headers)


async def _told_nothing(request: Request, error: Exception) -> Response:
    logger.error("unforeseen error", exc_info=error)
    answer = told(InternalError())
    for name, value in HEADERS.items():  # this one is made outside of the guard
        answer.headers[name.decode()] = value.decode()
    return answer
