"""Generating while one types: one WebSocket per page, of whose prompts only the latest counts.

The client's messages are JSON, {"type": "paint", "n": 7, "quick": true, "request": {...}}, and images are
binary frames after a "painted" message that announces them. A prompt that waits is replaced by a newer one
and keeps its position. One that a server has is given up for a newer one only when an image was shown a
moment ago; else it is finished and shown, so that images keep coming while one types on, and no work is
thrown away.
"""

import asyncio
import json
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from PIL import Image
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from fewstep.errors import FewstepError, InvalidRequest, Stopped
from fewstep.images.codec import INPUT_MAX_BYTES, open_image, open_mask
from fewstep.models.specs import ModelSpec
from fewstep.web.backends import BackendResult
from fewstep.web.cog_inputs import PAGE_FIELDS, CogInputs, ImageReader
from fewstep.web.queue import QueuedRequest, RequestQueue
from fewstep.web.recent import RecentImages

JUST_SHOWN_S = 0.3
UNSUPPORTED = 1003
MAX_MESSAGE = 16_384  # characters of JSON
MAX_INPUT = 8 * 10**6  # bytes of an image; the page scales larger ones down
SLOTS = {"image": open_image, "mask": open_mask}
assert MAX_INPUT <= INPUT_MAX_BYTES


@dataclass(frozen=True, slots=True)
class _Prompt:
    n: int  # the page's number for it
    quick: bool
    cog: CogInputs
    came: float  # in seconds of time.monotonic()


@dataclass(eq=False)
class LiveSession:
    """One connection, from accept to its end."""

    socket: WebSocket
    client: str
    spec: ModelSpec
    styles: Callable[[], Collection[str]]
    queue: RequestQueue
    recent: RecentImages
    reader: ImageReader
    _images: dict[str, Image.Image] = field(default_factory=dict)
    _next: _Prompt | None = None  # the latest that is not in the queue yet
    _current: _Prompt | None = None  # which `_queued` is for
    _queued: QueuedRequest | None = None
    _came: asyncio.Event = field(default_factory=asyncio.Event)
    _shown: float = 0.0  # when the last image was sent
    _sending: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def run(self) -> None:
        """Serve until the client leaves."""
        await self.tell_state()
        tasks = {asyncio.create_task(self._read()), asyncio.create_task(self._generate())}
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except (WebSocketDisconnect, RuntimeError):  # the latter: of a socket that has just been closed
            pass
        finally:
            for task in tasks:
                task.cancel()
            self._take_back()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def tell_state(self) -> None:
        """Say whether there is a model to generate; at the beginning, and whenever that changes."""
        await self._send({"type": "state", "ready": self.queue.ready})

    async def close(self, code: int) -> None:
        """Close it from our side; the page comes again."""
        if self.socket.client_state is WebSocketState.CONNECTED:
            await self.socket.close(code)

    async def _read(self) -> None:
        while True:
            message = await self.socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            text = message.get("text")
            if text is None:  # bytes that nothing announced: what follows cannot be told apart either
                return await self.close(UNSUPPORTED)
            n = None
            try:
                kind, fields = _parsed(text)
                n = fields.get("n") if isinstance(fields.get("n"), int) else None
                await self._take(kind, fields)
            except FewstepError as error:
                await self._fail(n, error)

    async def _take(self, kind: str, fields: Mapping[str, Any]) -> None:
        if kind == "paint":
            await self._take_prompt(fields)
        elif kind == "input":
            await self._take_image(_slot(fields))
        elif kind == "clear":
            self._images.pop(_slot(fields), None)
        elif kind == "stop":
            self._next = None
            self._take_back()
        else:
            raise InvalidRequest("type is unknown; it must be paint, input, clear or stop")

    async def _take_image(self, slot: str) -> None:
        message = await self.socket.receive()
        content = message.get("bytes")
        if content is None:
            raise InvalidRequest(f"the {slot} did not come; send its bytes right after the message")
        self._images.pop(slot, None)
        if len(content) > MAX_INPUT:
            size = len(content) / 1e6
            raise InvalidRequest(f"{slot} has {size:.1f} MB; at most {MAX_INPUT / 1e6:g} MB are taken")
        self._images[slot] = await self.reader.read(content, slot, SLOTS[slot])

    async def _take_prompt(self, fields: Mapping[str, Any]) -> None:
        n, quick, values = fields.get("n"), fields.get("quick"), fields.get("request")
        if not isinstance(n, int) or not isinstance(quick, bool) or not isinstance(values, dict):
            raise InvalidRequest("a paint message has n, a whole number, quick, true or false, and a request")
        came, images = time.monotonic(), {}
        for slot in SLOTS:
            used = values.pop(f"use_{slot}", False) is True
            if used and slot not in self._images:  # it was refused, which the page has been told
                raise InvalidRequest(f"the {slot} is not here; choose it again, or take it out")
            images[slot] = self._images[slot] if used else None
        options: dict[str, Any] = {"known": PAGE_FIELDS, "styles": self.styles(), "quick": quick, **images}
        make = partial(CogInputs.create, self.spec, values, **options)
        # Images are scaled to size, which takes milliseconds.
        cog = await asyncio.to_thread(make) if any(images.values()) else make()
        self._supersede(_Prompt(n, quick, cog, came))

    def _supersede(self, prompt: _Prompt) -> None:
        queued = self._queued
        if queued and queued.waiting:
            self._current = prompt
            queued.inputs = prompt.cog.inputs
            if queued.position >= 0:
                queued.tell(queued.position)
            return
        self._next = prompt
        self._came.set()
        if time.monotonic() - self._shown < JUST_SHOWN_S:
            self._take_back()

    def _take_back(self) -> None:
        if self._queued:
            self.queue.cancel(self._queued)

    async def _generate(self) -> None:
        while True:
            while self._next is None:
                self._came.clear()
                await self._came.wait()
            self._current, self._next = self._next, None
            try:
                self._queued = self.queue.submit(self.client, self._current.cog.inputs, self._tell_position)
                result = await self.queue.result(self._queued)
                await self._show(self._current, self._queued, result)
            except Stopped:
                pass  # for a newer one, or because the client said so
            except FewstepError as error:
                await self._fail(self._current.n, error)
            finally:
                self._queued = None

    def _tell_position(self, position: int) -> None:
        assert self._current
        message = {"type": "waiting", "n": self._current.n, "place": position}
        task = asyncio.create_task(self._send(message))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _show(self, prompt: _Prompt, queued: QueuedRequest, result: BackendResult) -> None:
        assert queued.sent
        width, height = prompt.cog.size
        images = zip(result.files, prompt.cog.recipes, strict=False)
        message = {
            "type": "painted",
            "n": prompt.n,
            "quick": prompt.quick,
            "seed": prompt.cog.inputs["seed"],
            "width": width,
            "height": height,
            "paint_ms": round(result.generate_ms, 1),
            "wait_ms": round((queued.sent - prompt.came) * 1000, 1),
            "unknown_words": dict(result.unknown_words),
            "images": [self.recent.add(self.client, content, recipe) for content, recipe in images],
        }
        self._shown = time.monotonic()
        await self._send(message, result.files)

    async def _fail(self, n: int | None, error: FewstepError) -> None:
        message = {"type": "failed", "n": n, "code": error.code, "message": error.sentence}
        if retry := getattr(error, "retry_after_s", None):
            message["retry_after"] = retry
        await self._send(message)

    async def _send(self, message: Mapping[str, Any], images: Collection[bytes] = ()) -> None:
        async with self._sending:  # so that nothing comes between a message and its images
            await self.socket.send_text(json.dumps(message))
            for image in images:
                await self.socket.send_bytes(image)


def _parsed(text: str) -> tuple[str, dict[str, Any]]:
    if len(text) > MAX_MESSAGE:
        raise InvalidRequest(f"the message has {len(text)} characters; at most {MAX_MESSAGE} are allowed")
    try:
        fields = json.loads(text, parse_constant=int)  # raises for NaN and Infinity, which are no JSON
        return str(fields.pop("type")), fields
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise InvalidRequest("the message is not a JSON object with a type") from None


def _slot(fields: Mapping[str, Any]) -> str:
    slot = fields.get("slot")
    if slot not in tuple(SLOTS):  # which may be anything, even what has no hash
        raise InvalidRequest("slot must be image or mask")
    return str(slot)
