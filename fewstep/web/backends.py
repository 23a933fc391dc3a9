"""Backends: a Cog server near or far, or a model on Replicate; each takes the inputs of predict()."""

import asyncio
import base64
import binascii
import logging
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import httpx2

from fewstep.coglet.server import HEALTH_TIMEOUT_S
from fewstep.errors import DeviceLost, GenerationError, InternalError, Stopped, error_in

logger = logging.getLogger(__name__)

FETCH_S = 30
_PARTS = ("text_ms", "steps_ms", "decode_ms", "safety_ms", "encode_ms", "weights_ms")


@dataclass(frozen=True, slots=True)
class BackendResult:
    """Files as they came, the milliseconds that the model says it took, or that the call took, and the words
    that mean nothing to it, each with one to try instead or none."""

    files: list[bytes]
    generate_ms: float
    unknown_words: Mapping[str, str] = field(default_factory=dict)


class BackendUnavailable(Exception):
    """There was no answer, or none of the model's: the same may be asked again, of another."""


class BackendBusy(Exception):
    """All of its slots are taken at this moment."""


class Backend(Protocol):
    """Generates; being cancelled ends the work there too."""

    async def generate(self, inputs: Mapping[str, Any]) -> BackendResult:
        """Raises the FewstepError that the model answered with, BackendUnavailable or BackendBusy."""


class CogBackend:
    """A Cog server at `url`; a request takes at most `timeout_s`, its own deadline included."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url = url.rstrip("/")
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=32)
        self._client = httpx2.AsyncClient(timeout=timeout_s, limits=limits, trust_env=False)

    async def generate(self, inputs: Mapping[str, Any]) -> BackendResult:
        began = time.perf_counter()
        # An id of our own: coglet makes a path of it, and whoever knows one can end a prediction.
        body = {"id": uuid.uuid4().hex, "input": dict(inputs)}
        try:
            response = await self._client.post(f"{self.url}/predictions", json=body)
            answer = response.json()
        except (httpx2.HTTPError, ValueError) as error:
            raise BackendUnavailable(type(error).__name__) from None
        if response.status_code == 409:
            raise BackendBusy
        if response.status_code == 422:
            raise InternalError("the Cog server takes other inputs than this page sends; update both")
        if response.status_code != 200 or not isinstance(answer, dict):
            raise BackendUnavailable(f"status {response.status_code}")
        return _read_answer(answer, (time.perf_counter() - began) * 1000)

    async def health(self) -> dict[str, Any]:
        """Return what the server says of itself; nothing when no answer comes within 12 s."""
        try:
            health = (await self._client.get(f"{self.url}/health-check", timeout=HEALTH_TIMEOUT_S)).json()
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError):
            return {}
        return health if isinstance(health, dict) else {}

    async def close(self) -> None:
        """Let go of its connections."""
        await self._client.aclose()


class ReplicateBackend:
    """A model on Replicate, as owner/name or owner/name:version; each image is billed to the token."""

    def __init__(self, model: str, token: str, base_url: str | None = None) -> None:
        from replicate.client import Client  # takes a moment

        self._model = model
        self._client = Client(api_token=token, base_url=base_url)
        # Its own client would send the token along to wherever the images are.
        self._files = httpx2.AsyncClient(timeout=FETCH_S, trust_env=False)

    async def generate(self, inputs: Mapping[str, Any]) -> BackendResult:
        name, _, version = self._model.partition(":")
        target: dict[str, Any] = {"version": version} if version else {"model": name}
        began = time.perf_counter()
        try:
            create = self._client.predictions.async_create(**target, input=dict(inputs))
            creating = asyncio.ensure_future(create)
            try:
                prediction = await asyncio.shield(creating)
                await prediction.async_wait()
            except asyncio.CancelledError:
                await (await creating).async_cancel()  # it is billed until then
                raise
            if isinstance(prediction.output, list):
                prediction.output = [await self._embedded(url) for url in prediction.output]
        except Exception as error:
            # It was billed, perhaps, so that it is not asked again by itself.
            logger.warning("Replicate did not generate: %s", type(error).__name__)
            sentence = "Replicate cannot be reached, or refused; look at its status page"
            raise GenerationError(sentence) from None
        answer = {name: getattr(prediction, name) for name in ("status", "output", "error", "metrics")}
        try:
            return _read_answer(answer, (time.perf_counter() - began) * 1000)
        except BackendUnavailable:
            raise GenerationError("the model failed on Replicate without a reason; ask again") from None

    async def _embedded(self, url: str) -> str:
        """An address of Replicate's as a data URL, which it is for small outputs by itself."""
        if url.startswith("data:"):
            return url
        response = await self._files.get(url)
        response.raise_for_status()
        return f"data:image/webp;base64,{base64.b64encode(response.content).decode()}"


def _read_answer(answer: Mapping[str, Any], took_ms: float) -> BackendResult:
    status, output = answer.get("status"), answer.get("output")
    if status == "canceled":
        raise BackendUnavailable("it was stopped there")  # not by us, who would have left
    if status != "succeeded":
        error = error_in(str(answer.get("error")))
        if error is None:  # coglet's own: its worker died, or cannot be reached
            raise BackendUnavailable("failed without a reason")
        if isinstance(error, Stopped | DeviceLost):  # the server is going down, or is to be replaced
            raise BackendUnavailable(error.code)
        raise error
    if not isinstance(output, list) or not output:
        raise GenerationError("the model gave no picture; ask again")
    metrics = answer.get("metrics") or {}
    known = [metrics[part] for part in _PARTS if part in metrics]
    files, unknown = [_content(url) for url in output], metrics.get("unknown_words")
    return BackendResult(
        files, sum(known) if known else took_ms, unknown if isinstance(unknown, dict) else {}
    )


def _content(url: object) -> bytes:
    head, _, content = str(url).partition(";base64,")
    if not head.startswith("data:image/"):
        raise InternalError("the Cog server uploads its pictures elsewhere; start it without --upload-url")
    try:
        return base64.b64decode(content, validate=True)
    except binascii.Error:
        raise GenerationError("the picture came damaged; ask again") from None
