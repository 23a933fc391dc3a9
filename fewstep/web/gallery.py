"""The routes of what users leave: who they are, the gallery, reviews."""

import asyncio

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from fewstep.errors import NotFound
from fewstep.web.app_state import COOKIE, app_state
from fewstep.web.messages import ImageId, Nickname, ReviewText, body_of
from fewstep.web.store import PAGE


def routes() -> list[Route]:
    """Return those under /api, and the kept images' files."""
    return [
        Route("/api/me", _me),
        Route("/api/me", _name, methods=["PUT"]),
        Route("/api/me", _forget, methods=["DELETE"]),
        Route("/api/pictures", _gallery),
        Route("/api/pictures", _keep, methods=["POST"]),
        Route("/api/pictures/{id}", _discard, methods=["DELETE"]),
        Route("/api/reviews", _reviews),
        Route("/api/review", _review, methods=["PUT"]),
        Route("/pictures/{id}.webp", _kept_image),
    ]


# Starlette runs what is no coroutine in a thread, as what waits for the database must be.


def _me(request: Request) -> Response:
    state = app_state(request)
    return JSONResponse(state.store.me(state.client(request) or ""))


async def _name(request: Request) -> Response:
    state = app_state(request)
    user, body = state.known_client(request), await body_of(request, Nickname)
    await asyncio.to_thread(state.store.name, user, body.nickname)
    return JSONResponse(await asyncio.to_thread(state.store.me, user))


async def _forget(request: Request) -> Response:
    state = app_state(request)
    user = state.known_client(request)
    await asyncio.to_thread(state.store.forget, user)
    state.recent.forget(user)
    response = Response(status_code=204)
    response.delete_cookie(COOKIE, httponly=True, samesite="lax")
    return response


def _gallery(request: Request) -> Response:
    state, query = app_state(request), request.query_params
    limit = query.get("limit", "")
    size = int(limit) if limit.isdecimal() and len(limit) < 4 else PAGE
    return JSONResponse(state.store.gallery(state.client(request) or "", query.get("before"), size))


async def _keep(request: Request) -> Response:
    state = app_state(request)
    user, body = state.known_client(request), await body_of(request, ImageId)
    image = state.recent.of(user, body.id)
    if image is None:
        raise NotFound("that picture is no longer here; paint it again and keep it then")
    kept = await asyncio.to_thread(state.store.keep, user, image.content, image.recipe)
    return JSONResponse(kept, 201)


def _discard(request: Request) -> Response:
    state = app_state(request)
    state.store.discard(state.known_client(request), request.path_params["id"])
    return Response(status_code=204)


def _kept_image(request: Request) -> Response:
    file = app_state(request).store.file(request.path_params["id"])
    if not file.is_file():
        raise NotFound("there is no such picture")
    headers = {"Cache-Control": "max-age=31536000, immutable"}
    return FileResponse(file, media_type="image/webp", headers=headers)


def _reviews(request: Request) -> Response:
    state = app_state(request)
    return JSONResponse(state.store.reviews(state.client(request) or ""))


async def _review(request: Request) -> Response:
    state = app_state(request)
    user, body = state.known_client(request), await body_of(request, ReviewText)
    await asyncio.to_thread(state.store.review, user, body.rating, body.text)
    return JSONResponse(await asyncio.to_thread(state.store.reviews, user))
