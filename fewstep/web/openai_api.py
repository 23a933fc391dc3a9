"""OpenAI's images API, as its SDKs, Open WebUI and LibreChat call it.

Liberal in what it takes: any model's name, unknown fields, sizes that the model does not make (the nearest
shape that it does is taken). Answers with base64 unless asked for addresses.
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
import re
import secrets
import time
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fewstep.errors import FewstepError, InvalidRequest, Stopped
from fewstep.images.codec import MIME_TYPES, open_alpha_mask, open_image
from fewstep.models.specs import ModelSpec
from fewstep.request import GUIDANCE, LCM_LORA_MAX_GUIDANCE, NUM_OUTPUTS, SEED_MAX, SIDE, STEPS
from fewstep.web.app_state import AppState, app_state, retry_after, status_of
from fewstep.web.backends import BackendResult
from fewstep.web.cog_inputs import Wish, make_wish
from fewstep.web.queue import QueuedRequest, RequestQueue

MAX_N = 10
QUALITY_STEPS = {"low": 2, "medium": 4, "standard": 4, "auto": 4, "high": 8, "hd": 8}
FORMATS = {"png": "png", "jpeg": "jpg", "jpg": "jpg", "webp": "webp"}
Fields = Mapping[str, Any]


class Unauthorized(FewstepError):
    """The key is missing or wrong."""

    code = "invalid_api_key"
    status = 401


def routes() -> list[Route]:
    """Under /v1."""
    return [
        Route("/v1/models", _models),
        Route("/v1/images/generations", _generations, methods=["POST"]),
        Route("/v1/images/edits", _edits, methods=["POST"]),
        Route("/v1/images/files/{id}", _file),
    ]


async def _models(request: Request) -> Response:
    front = app_state(request)
    try:
        _check_key(request, front)
    except FewstepError as error:
        return _told(error)
    model = {"id": front.spec.name, "object": "model", "created": 0, "owned_by": "fewstep"}
    return JSONResponse({"object": "list", "data": [model]})


async def _generations(request: Request) -> Response:
    front = app_state(request)
    try:
        _check_key(request, front)
        try:
            fields = json.loads(await request.body())
        except (ValueError, RecursionError):
            raise InvalidRequest("the body is no JSON") from None
        if not isinstance(fields, dict):
            raise InvalidRequest("the body is not a JSON object")
        return await _answer(request, front, fields, {})
    except FewstepError as error:
        return _told(error)


async def _edits(request: Request) -> Response:
    front = app_state(request)
    try:
        _check_key(request, front)
        async with request.form(max_files=17, max_fields=64) as form:
            fields: dict[str, Any] = {name: value for name, value in form.items() if isinstance(value, str)}
            uploads = [one for name in ("image", "image[]") for one in form.getlist(name)]
            mask = form.get("mask")
            if not uploads or not isinstance(uploads[0], UploadFile):
                raise InvalidRequest("image is missing; send the picture to be edited as a file")
            read = front.reader.read
            images = {"image": await read(await uploads[0].read(), "image", open_image)}
            if isinstance(mask, UploadFile):
                images["mask"] = await read(await mask.read(), "mask", open_alpha_mask)
        return await _answer(request, front, fields, images)
    except FewstepError as error:
        return _told(error)


async def _answer(request: Request, front: AppState, fields: Fields, images: Mapping[str, Any]) -> Response:
    count = _whole(fields, "n", 1, 1, MAX_N)
    common = _inputs(front.spec, fields, bool(images))
    seed = common.pop("seed")

    def make(i: int) -> Wish:
        most = NUM_OUTPUTS[1]
        given = {**common, "seed": (seed + i) % (SEED_MAX + 1), "num_outputs": min(most, count - i)}
        return make_wish(front.spec, given, **images)

    wishes = [await asyncio.to_thread(make, i) for i in range(0, count, NUM_OUTPUTS[1])]
    visitor = f"api {request.client.host if request.client else ''}"
    generated = await _unless_gone(request, _generate_all(front.queue, visitor, wishes))
    data = []
    for wish, one in zip(wishes, generated, strict=True):
        for content, used in zip(one.files, wish.seeds, strict=False):
            if fields.get("response_format") == "url":
                recipe = {**wish.recipe, "seed": used, "num_outputs": 1}
                found = front.recent.add(visitor, content, recipe)
                data.append({"url": str(request.url_for("_file", id=found))})
            else:
                data.append({"b64_json": base64.b64encode(content).decode()})
    width, height = wishes[0].size
    kind = common["output_format"].replace("jpg", "jpeg")
    return JSONResponse(
        {"created": int(time.time()), "data": data, "output_format": kind, "size": f"{width}x{height}"}
    )


async def _generate_all(queue: RequestQueue, visitor: str, wishes: Sequence[Wish]) -> list[BackendResult]:
    tickets: list[QueuedRequest] = []
    try:
        for wish in wishes:
            tickets.append(queue.submit(visitor, wish.inputs))
        return await asyncio.gather(*(queue.result(ticket) for ticket in tickets))
    except BaseException:  # one that failed leaves the others without a use
        for ticket in tickets:
            queue.cancel(ticket)
        raise


async def _unless_gone(
    request: Request, work: Coroutine[Any, Any, list[BackendResult]]
) -> list[BackendResult]:
    """What `work` makes; nothing is generated for a client who has left. The body must have been read."""
    result = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({result, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            result.cancel()
            raise Stopped("the client has left")
        return await result
    finally:
        leaving.cancel()


async def _file(request: Request) -> Response:
    front = app_state(request)
    found = front.recent.any(request.path_params["id"])
    if found is None:
        return _told(InvalidRequest("the picture is no longer here; ask for b64_json to keep them"), 404)
    return Response(found.content, media_type=MIME_TYPES[found.recipe["output_format"]])


def _inputs(spec: ModelSpec, fields: Fields, has_image: bool) -> dict[str, Any]:
    prompt = fields.get("prompt")
    if not isinstance(prompt, str):
        raise InvalidRequest("prompt is missing; say in a few words what to paint")
    kind = fields.get("output_format") or "png"
    if not isinstance(kind, str) or kind not in FORMATS:
        raise InvalidRequest(f"output_format must be one of {', '.join(FORMATS)}")
    compression = fields.get("output_compression")
    quality = QUALITY_STEPS.get(str(fields.get("quality") or "auto"), 4)
    steps = fields.get("num_inference_steps") or fields.get("steps") or quality
    inputs: dict[str, Any] = {
        "prompt": prompt,
        "steps": int(_clamped("num_inference_steps", steps, *STEPS)),
        "seed": _seed(fields.get("seed")),
        "output_format": FORMATS[kind],
        "output_quality": int(
            _clamped("output_compression", 90 if compression is None else compression, 1, 100)
        ),
        **_size(spec, fields.get("size"), has_image),
    }
    if fields.get("guidance_scale") is not None:
        most = LCM_LORA_MAX_GUIDANCE if spec.lcm_lora else GUIDANCE[1]
        inputs["guidance"] = _clamped("guidance_scale", fields["guidance_scale"], GUIDANCE[0], most)
    if fields.get("negative_prompt"):
        inputs["negative_prompt"] = fields["negative_prompt"]
    if has_image and fields.get("strength") is not None:
        inputs["prompt_strength"] = _clamped("strength", fields["strength"], 0, 1)
    return inputs


def _size(spec: ModelSpec, given: object, has_image: bool) -> dict[str, Any]:
    if given in (None, "", "auto"):
        return {}
    found = re.fullmatch(r"(\d{1,5})x(\d{1,5})", str(given))
    if not found or not int(found[1]) or not int(found[2]):
        raise InvalidRequest("size must be a width and a height in px, such as 1024x1024, or auto")
    width, height = int(found[1]), int(found[2])
    if max(width, height) > 4 * min(width, height):
        raise InvalidRequest("size is more than four times as long as it is wide; ask for another shape")
    # A client's list of sizes is of OpenAI's models: what is too large here is generated in the same shape.
    scale = min(1.0, math.sqrt(spec.max_pixels / (width * height)), SIDE[1] / max(width, height))
    if scale < 1:
        scale = min(scale, math.sqrt(spec.native_size**2 / (width * height)))
    wide, high = (max(SIDE[0], math.floor(side * scale / 8) * 8) for side in (width, height))
    return {"aspect_ratio": "custom", "width": wide, "height": high}


def _seed(value: object) -> int:
    if value is None or value == "" or value == -1:
        return secrets.randbits(31)
    return int(_clamped("seed", value, 0, SEED_MAX))


def _whole(fields: Fields, name: str, default: int, low: int, high: int) -> int:
    value = fields.get(name)
    text = str(default if value is None else value)
    if isinstance(value, bool) or not text.isdecimal() or len(text) > 4 or not low <= int(text) <= high:
        raise InvalidRequest(f"{name} must be a whole number from {low} to {high}")
    return int(text)


def _clamped(name: str, value: object, low: float, high: float) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]  # forms send text
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool) or math.isnan(number):
        raise InvalidRequest(f"{name} must be a number")
    return min(max(number, low), high)


def _check_key(request: Request, front: AppState) -> None:
    wanted = front.settings.api_key
    given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
    if wanted and not secrets.compare_digest(given.encode(), wanted.encode()):
        raise Unauthorized("the API key is missing or wrong; send it as Authorization: Bearer KEY")


def _told(error: FewstepError, status: int = 0) -> Response:
    """As OpenAI's clients read it; they retry on 429 and 503."""
    status = status or status_of(error)
    status = 400 if status == 422 else status
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
        status, "invalid_request_error" if status < 500 else "server_error"
    )
    content = {"error": {"message": error.sentence, "type": kind, "param": None, "code": error.code}}
    return JSONResponse(content, status, retry_after(error, status))
