"""The last images of each client, in memory: what a client may keep, and nobody else can."""

import uuid
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any

MAX_IMAGES = 32  # of one client
MAX_BYTES = 256 * 10**6  # of all


@dataclass(frozen=True, slots=True)
class Recent:
    """An image as it was sent."""

    client: str
    content: bytes  # of a webp, jpg or png
    recipe: dict[str, Any]


@dataclass(eq=False)
class RecentImages:
    """Forgets the oldest of a client who has many, and the oldest of all when memory is full."""

    max_images: int = MAX_IMAGES
    max_bytes: int = MAX_BYTES
    _images: OrderedDict[str, Recent] = field(default_factory=OrderedDict)
    _of: dict[str, deque[str]] = field(default_factory=dict)  # ids of each client, in order
    _bytes: int = 0

    def add(self, client: str, content: bytes, recipe: dict[str, Any]) -> str:
        """Remember an image; its id cannot be guessed."""
        image = uuid.uuid4().hex
        self._images[image] = Recent(client, content, recipe)
        self._bytes += len(content)
        own = self._of.setdefault(client, deque())
        own.append(image)
        if len(own) > self.max_images:
            self._drop(own[0])
        while self._bytes > self.max_bytes:
            self._drop(next(iter(self._images)))
        return image

    def of(self, client: str, image: str) -> Recent | None:
        """Return the client's own image of that id."""
        recent = self._images.get(image)
        return recent if recent and recent.client == client else None

    def any(self, image: str) -> Recent | None:
        """Return the image, for whoever was given its address."""
        return self._images.get(image)

    def forget(self, client: str) -> None:
        """Drop everything of this client's."""
        while own := self._of.get(client):
            self._drop(own[0])

    def _drop(self, image: str) -> None:
        gone = self._images.pop(image)
        self._bytes -= len(gone.content)
        own = self._of[gone.client]
        own.popleft()  # the oldest of all is the oldest of its client's, too
        if not own:
            del self._of[gone.client]
