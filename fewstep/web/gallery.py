"""What visitors leave, over HTTP: who they are, the gallery, reviews."""

from __future__ import annotations

import asyncio

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from fewstep.web.app_state import COOKIE, app_state, body_of
from fewstep.web.store import PAGE, NotFound


def routes() -> list[Route]:
    """Under /api, and the kept images' files."""
    return [
        Route("/api/me", _me),
        Route("/api/me", _name, methods=["PUT"]),
        Route("/api/me", _forget, methods=["DELETE"]),
        Route("/api/pictures", _gallery),
        Route("/api/pictures", _keep, methods=["POST"]),
        Route("/api/pictures/{id}", _discard, methods=["DELETE"]),
        Route("/api/reviews", _reviews),
        Route("/api/review", _review, methods=["PUT"]),
        Route("/pictures/{name}", _kept_image),
    ]


async def _me(request: Request) -> Response:
    front = app_state(request)
    return JSONResponse(await asyncio.to_thread(front.store.me, front.visitor(request) or ""))


async def _name(request: Request) -> Response:
    front, visitor = app_state(request), app_state(request).known(request)
    fields = await body_of(request, ["nickname"])
    await asyncio.to_thread(front.store.name, visitor, fields.get("nickname"))
    return JSONResponse(await asyncio.to_thread(front.store.me, visitor))


async def _forget(request: Request) -> Response:
    front, visitor = app_state(request), app_state(request).known(request)
    await asyncio.to_thread(front.store.forget, visitor)
    front.recent.forget(visitor)
    response = Response(status_code=204)
    response.delete_cookie(COOKIE, httponly=True, samesite="lax")
    return response


async def _gallery(request: Request) -> Response:
    front = app_state(request)
    limit = request.query_params.get("limit", str(PAGE))
    page = await asyncio.to_thread(
        front.store.gallery,
        front.visitor(request) or "",
        request.query_params.get("before"),
        int(limit) if limit.isdecimal() and len(limit) < 4 else PAGE,
    )
    return JSONResponse({"pictures": page.images, "next": page.next})


async def _keep(request: Request) -> Response:
    front, visitor = app_state(request), app_state(request).known(request)
    fields = await body_of(request, ["id"])
    found = front.recent.of(visitor, str(fields.get("id")))
    if found is None:
        raise NotFound("that picture is no longer here; paint it again and keep it then")
    size = found.recipe["width"], found.recipe["height"]
    kept = await asyncio.to_thread(front.store.keep, visitor, found.content, size, found.recipe)
    return JSONResponse(kept, 201)


async def _discard(request: Request) -> Response:
    front, visitor = app_state(request), app_state(request).known(request)
    await asyncio.to_thread(front.store.discard, visitor, request.path_params["id"])
    return Response(status_code=204)


async def _kept_image(request: Request) -> Response:
    name = request.path_params["name"]
    file = app_state(request).store.file(name.removesuffix(".webp"))
    if not name.endswith(".webp") or not file.is_file():
        raise NotFound("there is no such picture")
    return FileResponse(
        file, media_type="image/webp", headers={"Cache-Control": "max-age=31536000, immutable"}
    )


async def _reviews(request: Request) -> Response:
    front = app_state(request)
    return JSONResponse(await asyncio.to_thread(front.store.reviews, front.visitor(request) or ""))


async def _review(request: Request) -> Response:
    front, visitor = app_state(request), app_state(request).known(request)
    fields = await body_of(request, ["rating", "text"])
    await asyncio.to_thread(front.store.review, visitor, fields.get("rating"), fields.get("text", ""))
    return JSONResponse(await asyncio.to_thread(front.store.reviews, visitor))
