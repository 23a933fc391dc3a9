"""OpenAI's images API, as its SDKs, Open WebUI and LibreChat call it.

Liberal in what it takes: any model's name, unknown fields, sizes that the model does not make (the nearest
shape that it does is taken). Answers with base64 unless asked for addresses.
"""

import asyncio
import base64
import math
import re
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field, FiniteFloat, model_validator
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fewstep.errors import InvalidRequest, Stopped, Unauthorized
from fewstep.images.codec import MIME_TYPES, open_alpha_mask, open_image
from fewstep.models.specs import ModelSpec
from fewstep.request import GUIDANCE, LCM_LORA_MAX_GUIDANCE, NUM_OUTPUTS, SEED_MAX, SIDE, STEPS
from fewstep.web.app_state import AppState, app_state
from fewstep.web.backends import BackendResult
from fewstep.web.cog_inputs import CogInputs
from fewstep.web.error_responses import error_response
from fewstep.web.messages import checked
from fewstep.web.queue import QueuedRequest, RequestQueue

MAX_N = 10
QUALITY_STEPS = {"low": 2, "medium": 4, "standard": 4, "auto": 4, "high": 8, "hd": 8}
FORMATS = {"png": "png", "jpeg": "jpg", "jpg": "jpg", "webp": "webp"}


class ImagesBody(BaseModel):
    """What a client asks of /v1/images; forms send numbers as text, and unknown fields are let pass."""

    prompt: str = Field(description="text; say in a few words what to paint")
    n: int = Field(1, ge=1, le=MAX_N, description=f"a whole number from 1 to {MAX_N}")
    size: Any = "auto"
    quality: Any = "auto"
    response_format: Any = "b64_json"
    output_format: Literal["png", "jpeg", "jpg", "webp"] = Field(
        "png", description=f"one of {', '.join(FORMATS)}"
    )
    output_compression: FiniteFloat = Field(90, description="a number")
    num_inference_steps: FiniteFloat = Field(0, description="a number")
    steps: FiniteFloat = Field(0, description="a number")
    guidance_scale: FiniteFloat | None = Field(None, description="a number")
    negative_prompt: Any = ""
    strength: FiniteFloat | None = Field(None, description="a number")
    seed: FiniteFloat = Field(-1, description="a number")  # -1 draws one

    @model_validator(mode="before")
    @classmethod
    def _without_blanks(cls, fields: Any) -> Any:
        """Leave out what clients send empty, and let no truth value pass as a number."""
        if not isinstance(fields, dict):
            return fields
        sent = {name: value for name, value in fields.items() if value not in (None, "")}
        return {name: str(value) if isinstance(value, bool) else value for name, value in sent.items()}

    def inputs(self, spec: ModelSpec, has_image: bool) -> dict[str, Any]:
        """Return predict()'s inputs. Numbers out of range are taken for the nearest that is in it."""
        steps = self.num_inference_steps or self.steps or QUALITY_STEPS.get(str(self.quality), 4)
        inputs: dict[str, Any] = {
            "prompt": self.prompt,
            "steps": int(_within(STEPS, steps)),
            "seed": secrets.randbits(31) if self.seed == -1 else int(_within((0, SEED_MAX), self.seed)),
            "output_format": FORMATS[self.output_format],
            "output_quality": int(_within((1, 100), self.output_compression)),
            **_size(spec, str(self.size)),
        }
        if self.guidance_scale is not None:
            most = LCM_LORA_MAX_GUIDANCE if spec.lcm_lora else GUIDANCE[1]
            inputs["guidance"] = _within((GUIDANCE[0], most), self.guidance_scale)
        if self.negative_prompt:
            inputs["negative_prompt"] = self.negative_prompt
        if has_image and self.strength is not None:
            inputs["prompt_strength"] = _within((0, 1), self.strength)
        return inputs


def routes() -> list[Route]:
    """Return those under /v1."""
    return [
        Route("/v1/models", _models),
        Route("/v1/images/generations", _generations, methods=["POST"]),
        Route("/v1/images/edits", _edits, methods=["POST"]),
        Route("/v1/images/files/{id}", _file),
    ]


async def _models(request: Request) -> Response:
    state = _opened(request)
    model = {"id": state.spec.name, "object": "model", "created": 0, "owned_by": "fewstep"}
    return JSONResponse({"object": "list", "data": [model]})


async def _generations(request: Request) -> Response:
    state = _opened(request)
    return await _generate(request, state, checked(ImagesBody, await request.body()), {})


async def _edits(request: Request) -> Response:
    state = _opened(request)
    async with request.form(max_files=17, max_fields=64) as form:
        fields = {name: value for name, value in form.items() if isinstance(value, str)}
        uploads, mask = [*form.getlist("image"), *form.getlist("image[]")], form.get("mask")
        if not uploads or not isinstance(uploads[0], UploadFile):
            raise InvalidRequest("image is missing; send the picture to be edited as a file")
        read = state.reader.read
        images = {"image": await read(await uploads[0].read(), "image", open_image)}
        if isinstance(mask, UploadFile):
            images["mask"] = await read(await mask.read(), "mask", open_alpha_mask)
    return await _generate(request, state, checked(ImagesBody, fields), images)


async def _file(request: Request) -> Response:
    image = app_state(request).recent.any(request.path_params["id"])
    if image is None:
        gone = InvalidRequest("the picture is no longer here; ask for b64_json to keep them")
        return error_response(gone, 404, openai=True)
    return Response(image.content, media_type=MIME_TYPES[image.recipe["output_format"]])


async def _generate(
    request: Request, state: AppState, body: ImagesBody, images: Mapping[str, Any]
) -> Response:
    common, most = body.inputs(state.spec, bool(images)), NUM_OUTPUTS[1]
    asked = []
    for i in range(0, body.n, most):
        part = {"seed": (common["seed"] + i) % (SEED_MAX + 1), "num_outputs": min(most, body.n - i)}
        asked.append(await asyncio.to_thread(CogInputs.create, state.spec, common | part, **images))
    client = f"api {request.client.host if request.client else ''}"
    results = await _results(request, state.queue, client, asked)
    data = []
    for inputs, result in zip(asked, results, strict=True):
        for content, recipe in zip(result.files, inputs.recipes, strict=False):
            if body.response_format == "url":
                image = state.recent.add(client, content, recipe)
                data.append({"url": str(request.url_for("_file", id=image))})
            else:
                data.append({"b64_json": base64.b64encode(content).decode()})
    width, height = asked[0].size
    kind = common["output_format"].replace("jpg", "jpeg")
    answer = {"created": int(time.time()), "data": data, "output_format": kind, "size": f"{width}x{height}"}
    return JSONResponse(answer)


async def _results(
    request: Request, queue: RequestQueue, client: str, asked: Sequence[CogInputs]
) -> list[BackendResult]:
    """Have all generated, unless the client leaves or one fails, which leaves the others without a use."""
    queued: list[QueuedRequest] = []
    leaving = asyncio.ensure_future(request.receive())  # what comes after the body, which has been read
    try:
        for cog in asked:
            queued.append(queue.submit(client, cog.inputs))
        results = asyncio.gather(*(queue.result(one) for one in queued))
        ends: tuple[asyncio.Future[Any], ...] = results, leaving
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if not results.done():
            results.cancel()
            raise Stopped("the client has left")
        return await results
    finally:
        leaving.cancel()
        for one in queued:
            queue.cancel(one)


def _size(spec: ModelSpec, size: str) -> dict[str, Any]:
    if size == "auto":
        return {}
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", size)
    width, height = (int(match[1]), int(match[2])) if match else (0, 0)
    if not width or not height:
        raise InvalidRequest("size must be a width and a height in px, such as 1024x1024, or auto")
    if max(width, height) > 4 * min(width, height):
        raise InvalidRequest("size is more than four times as long as it is wide; ask for another shape")
    # A client's list of sizes is of OpenAI's models: what is too large here is generated in the same shape.
    scale = min(1.0, math.sqrt(spec.max_pixels / (width * height)), SIDE[1] / max(width, height))
    if scale < 1:
        scale = min(scale, math.sqrt(spec.native_size**2 / (width * height)))
    width, height = (max(SIDE[0], math.floor(side * scale / 8) * 8) for side in (width, height))
    return {"aspect_ratio": "custom", "width": width, "height": height}


def _within(limits: tuple[float, float], value: float) -> float:
    return min(max(value, limits[0]), limits[1])


def _opened(request: Request) -> AppState:
    """Return the app's state to whoever has the key. Raises Unauthorized."""
    state = app_state(request)
    key = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
    if state.settings.api_key and not secrets.compare_digest(key.encode(), state.settings.api_key.encode()):
        raise Unauthorized("the API key is missing or wrong; send it as Authorization: Bearer KEY")
    return state
