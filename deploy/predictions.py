"""Cog's prediction API before any number of machines: what is refused, who waits, and who is called back.

The routes, the answers and their order are coglet's, so that whoever speaks to one container speaks to a
cluster. Stricter than coglet is what an address on a network has to be: an id is a plain word, and webhooks go
to listed hosts only. Beyond the queue it answers 503 with Retry-After, where one coglet says 409.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx2
import jsonschema
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fewstep.coglet.adapter import COG_VERSION
from fewstep.coglet.server import SCHEMA
from fewstep.errors import Busy, FewstepError, InternalError

logger = logging.getLogger(__name__)

ID = re.compile(r"[\w-][\w.-]{0,99}", re.ASCII)
EVENTS = ("start", "output", "logs", "completed")
WEBHOOK_TRIES, WEBHOOK_S = 4, 10.0  # the pause before each doubles, from a quarter of a second
MAX_BODY = 64 * 2**20  # bytes; images come within, in base64


@dataclass(frozen=True, slots=True)
class Answer:
    """What a generator gives back: files as data URLs, metrics and log lines."""

    output: list[str]
    metrics: dict[str, Any]
    logs: str


Generate = Callable[[dict[str, Any]], Awaitable[Answer]]  # raises the FewstepError that callers see
Health = Callable[[], Awaitable[str]]  # coglet's words: STARTING, READY, BUSY, UNHEALTHY, SETUP_FAILED


@dataclass(eq=False, slots=True)
class Prediction:
    """One prediction, from its acceptance to its end."""

    id: str
    inputs: dict[str, Any]
    webhook: str | None
    events: frozenset[str]
    began: float = field(default_factory=time.monotonic)
    status: str = "processing"
    ended: dict[str, Any] = field(default_factory=dict)  # what only the end knows
    task: asyncio.Task[None] | None = None

    def shown(self) -> dict[str, Any]:
        """Return it as coglet does."""
        if self.status == "processing":
            return {"id": self.id, "input": self.inputs, "logs": "", "metrics": {}, "status": self.status}
        return {"id": self.id, "logs": "", "metrics": {}} | self.ended | {"status": self.status}


class Invalid(Exception):
    """A body that coglet would answer with 422; `detail` is a list like pydantic's."""

    def __init__(self, place: str, message: str, kind: str = "value_error") -> None:
        self.detail = [{"loc": ["body", *place.split(".")], "msg": message, "type": kind}]


class InputSchema:
    """The inputs of predict(), as Cog's own schema has them."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.names = frozenset(document["components"]["schemas"]["Input"]["properties"])
        # OpenAPI 3.0 says nullable where JSON Schema has a list of types.
        schema = json.loads(json.dumps(document))
        for entry in schema["components"]["schemas"]["Input"]["properties"].values():
            if entry.get("nullable"):
                entry["type"] = [entry["type"], "null"]
        schema["$ref"] = "#/components/schemas/Input"
        self._validator = jsonschema.Draft7Validator(schema)

    def checked(self, inputs: object) -> dict[str, Any]:
        """Return the inputs that the schema knows. Raises Invalid for the first that breaks a rule."""
        if not isinstance(inputs, dict):
            raise Invalid("input.__root__", f"a {type(inputs).__name__} is not of type \"object\"")
        for error in self._validator.iter_errors(inputs):
            if error.validator == "required":
                missing = next(name for name in error.validator_value if name not in inputs)
                raise Invalid(f"input.{missing}", "Field required", "value_error.missing")
            name = str(error.absolute_path[0])
            # A message of the library's quotes the value, which may be a megabyte.
            raise Invalid(f"input.{name}", f"does not meet {error.validator}: {error.validator_value}")
        return {name: value for name, value in inputs.items() if name in self.names}


class PredictionApi:
    """The API over `generate`; predictions that run are known by their id, and forgotten at their end."""

    def __init__(self, generate: Generate, health: Health, webhook_hosts: frozenset[str]) -> None:
        self._generate, self._health, self._hosts = generate, health, webhook_hosts
        self._document = json.loads(SCHEMA.read_text(encoding="utf-8"))
        self._inputs = InputSchema(self._document)
        self._running: dict[str, Prediction] = {}
        self._calls: set[asyncio.Task[None]] = set()  # webhooks on their way
        self._client = httpx2.AsyncClient(timeout=WEBHOOK_S, trust_env=False, follow_redirects=False)
        self.app = Starlette(
            routes=[
                Route("/", self._index),
                Route("/health-check", self._health_check),
                Route("/openapi.json", self._openapi),
                Route("/predictions", self._create, methods=["POST"]),
                Route("/predictions/{id}", self._create, methods=["PUT"]),
                Route("/predictions/{id}/cancel", self._cancel, methods=["POST"]),
            ]
        )

    async def _index(self, request: Request) -> Response:
        addresses = {"docs_url": "/docs", "healthcheck_url": "/health-check", "openapi_url": "/openapi.json"}
        addresses |= {"predictions_url": "/predictions", "cog_version": COG_VERSION}
        addresses["predictions_idempotent_url"] = "/predictions/{prediction_id}"
        addresses["predictions_cancel_url"] = "/predictions/{prediction_id}/cancel"
        return JSONResponse(addresses)

    async def _health_check(self, request: Request) -> Response:
        return JSONResponse({"status": await self._health()})

    async def _openapi(self, request: Request) -> Response:
        return JSONResponse(self._document)

    async def _create(self, request: Request) -> Response:
        if int(request.headers.get("content-length") or 0) > MAX_BODY:
            return Response(f"the body has more than {MAX_BODY} bytes", 413)
        try:
            body = json.loads(await request.body())
        except (ValueError, RecursionError):
            return Response("Failed to parse the request body as JSON", 400)
        try:
            prediction = self._read(body, request.path_params.get("id"))
        except Invalid as error:
            return JSONResponse({"detail": error.detail}, 422)
        if known := self._running.get(prediction.id):
            return JSONResponse(known.shown(), 202)
        self._running[prediction.id] = prediction
        prediction.task = asyncio.create_task(self._run(prediction))
        if "respond-async" in request.headers.get("prefer", ""):
            return JSONResponse({"id": prediction.id, "status": "starting"}, 202)
        try:
            await asyncio.wait({prediction.task})
        except asyncio.CancelledError:  # the caller has left, and nobody else can ask for the result
            prediction.task.cancel()
            raise
        if isinstance(busy := prediction.ended.pop("busy", None), Busy):
            answer = {"error": str(busy), "id": prediction.id, "status": "failed"}
            return JSONResponse(answer, 503, {"Retry-After": str(busy.retry_after_s)})
        return JSONResponse(prediction.shown())

    async def _cancel(self, request: Request) -> Response:
        prediction = self._running.get(request.path_params["id"])
        if prediction is None or prediction.task is None:
            return JSONResponse({}, 404)
        prediction.task.cancel()
        return JSONResponse({})

    def _read(self, body: object, named: str | None) -> Prediction:
        """Return the prediction that `body` asks for. Raises Invalid."""
        if not isinstance(body, dict):
            raise Invalid("__root__", "the body is not of type \"object\"")
        own = body.get("id")
        if named is not None and own not in (None, named):
            raise Invalid("id", "prediction ID must match the ID supplied in the URL")
        id = named if named is not None else own if own is not None else uuid.uuid4().hex
        if not isinstance(id, str) or not ID.fullmatch(id):
            raise Invalid("id", "an ID is up to 100 letters, digits, - and _, and . but not first")
        webhook, events = body.get("webhook"), body.get("webhook_events_filter")
        if webhook is not None:
            self._check_webhook(webhook)
        if events is not None and not (isinstance(events, list) and all(one in EVENTS for one in events)):
            raise Invalid("webhook_events_filter", f"expected some of {', '.join(EVENTS)}")
        inputs = self._inputs.checked(body.get("input", {}))
        return Prediction(id, inputs, webhook, frozenset(EVENTS if events is None else events))

    def _check_webhook(self, webhook: object) -> None:
        host = None
        with suppress(ValueError, TypeError, AttributeError):
            parts = urlsplit(str(webhook)) if isinstance(webhook, str) and len(webhook) < 2000 else None
            if parts and parts.scheme in ("http", "https") and "@" not in parts.netloc:
                host = parts.hostname
        if host is None or host not in self._hosts:
            listed = ", ".join(sorted(self._hosts)) or "none"
            raise Invalid("webhook", f"a webhook is an http address at a listed host ({listed})")

    async def _run(self, prediction: Prediction) -> None:
        """Generate, and say so where it was asked; the prediction is forgotten at the end."""
        self._call(prediction, "start")
        try:
            answer = await self._generate(prediction.inputs)
            prediction.ended = {"output": answer.output, "metrics": answer.metrics, "logs": answer.logs}
            self._call(prediction, "output")
            prediction.status = "succeeded"
        except asyncio.CancelledError:
            prediction.status = "canceled"
        except FewstepError as error:
            self._fail(prediction, error)
        except Exception as error:
            logger.error("a prediction failed for no foreseen reason", exc_info=error)
            self._fail(prediction, InternalError())
        finally:
            took = {"predict_time": time.monotonic() - prediction.began}
            prediction.ended["metrics"] = prediction.ended.get("metrics", {}) | took
            self._running.pop(prediction.id, None)
            self._call(prediction, "completed")

    def _fail(self, prediction: Prediction, error: FewstepError) -> None:
        prediction.status = "failed"
        prediction.ended = {"error": f"Prediction failed: Async prediction failed: {type(error).__name__}: {error}"}
        if isinstance(error, Busy):
            prediction.ended["busy"] = error

    def _call(self, prediction: Prediction, event: str) -> None:
        if prediction.webhook is not None and event in prediction.events:
            task = asyncio.create_task(self._deliver(prediction.webhook, prediction.shown()))
            self._calls.add(task)
            task.add_done_callback(self._calls.discard)

    async def _deliver(self, webhook: str, shown: dict[str, Any]) -> None:
        shown = {name: value for name, value in shown.items() if name != "busy"}
        for attempt in range(WEBHOOK_TRIES):
            with suppress(httpx2.HTTPError, httpx2.InvalidURL):
                if (await self._client.post(webhook, json=shown)).status_code < 500:
                    return
            await asyncio.sleep(0.25 * 2**attempt)
        logger.warning("a webhook could not be delivered in %d tries", WEBHOOK_TRIES)
