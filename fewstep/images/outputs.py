"""The files that a prediction leaves behind: our own, until Cog has read them, and coglet's folders."""

import contextvars
import re
import shutil
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import Image

from fewstep.errors import SettingsError
from fewstep.images.codec import encode_image
from fewstep.images.metadata import Recipe, save_options

KEEP_S = 600.0
OUR_NAME = re.compile(r"[0-9a-f-]{36}-\d+\.[a-z]+")
# coglet makes a folder of whatever id a caller sends: only a plain name is surely below its root.
PLAIN_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")


class Outputs:
    """Writes outputs below `root` and removes what is older than 10 minutes, oldest first.

    `coglet_root` is where coglet keeps a folder for each prediction and never removes one. It is given only
    when our scripts started the server, and only folders of predictions that ran here are touched.
    """

    def __init__(self, root: Path, coglet_root: Path | None) -> None:
        self._root = root
        self._coglet_root = coglet_root
        # Each in order of age, so that what is old stands first.
        self._files: deque[Path] = deque()
        self._folders: deque[Path] = deque()
        self._running: set[Path] = set()

    def prepare(self) -> None:
        """Make the root and remove what an earlier server left in it; files of other names stay.

        Raises SettingsError when the root cannot be written.
        """
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in self._root.iterdir():
                if OUR_NAME.fullmatch(path.name):
                    path.unlink()
        except OSError:
            raise SettingsError("FEWSTEP_OUTPUTS names no folder that can be written; name another") from None

    def save(
        self, images: Sequence[Image.Image], recipes: Sequence[Recipe], output_format: str, quality: int
    ) -> list[Path]:
        """Encode `images`, each with its recipe, which is left out when empty, and `write` them."""
        encoded = [
            encode_image(
                image, output_format, quality, **(save_options(recipe, output_format) if recipe else {})
            )
            for image, recipe in zip(images, recipes, strict=True)
        ]
        return self.write(encoded, output_format)

    def write(self, encoded: Sequence[bytes], suffix: str) -> list[Path]:
        """Write a file `<uuid>-<i>.<suffix>` an item; Cog uploads by base name, so none may come twice."""
        name = uuid.uuid4()
        paths = [self._root / f"{name}-{i}.{suffix}" for i in range(len(encoded))]
        self._files.extend(paths)  # before they exist: a caller who leaves while they are written leaks none
        for path, content in zip(paths, encoded, strict=True):
            path.write_bytes(content)
        return paths

    @contextmanager
    def prediction(self) -> Iterator[None]:
        """Surround each prediction: however it ends, what is old is removed then."""
        folder = None
        if self._coglet_root is not None and PLAIN_ID.fullmatch(prediction := _prediction_id()):
            folder = self._coglet_root / prediction
            self._running.add(folder)
        try:
            yield
        finally:
            if folder:
                self._running.discard(folder)
                self._folders.append(folder)
            self._remove(before=time.time() - KEEP_S)

    def remove_all(self) -> None:
        """Remove all, at the end of the server, when everything has been read."""
        self._folders.extend(self._running)
        self._remove(before=float("inf"))

    def _remove(self, before: float) -> None:
        for kept in (self._files, self._folders):
            while kept and _is_gone_or_older(kept[0], before):
                path = kept.popleft()
                with suppress(OSError):  # not ours to remove: that must not fail a prediction
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_gone_or_older(path: Path, before: float) -> bool:
    try:
        return path.lstat().st_mtime < before
    except OSError:
        return True


def _prediction_id() -> str:
    """Return the id of the prediction that this code runs in, which coglet tells only to its log writer."""
    for variable, value in contextvars.copy_context().items():
        if variable.name == "_coglet_prediction_id" and isinstance(value, str):
            return value
    return ""
