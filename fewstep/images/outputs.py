"""The files that a prediction leaves behind: our own, until Cog has read them, and coglet's folders."""

import contextvars
import fcntl
import os
import re
import shutil
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fewstep.errors import SettingsError

if TYPE_CHECKING:
    from PIL import Image

    from fewstep.images.metadata import Recipe

KEEP_S = 600.0
OUR_NAME = re.compile(r"[0-9a-f-]{36}-\d+\.[a-z]+")
# coglet makes a folder of whatever id a caller sends: only a plain name is surely below its root.
PLAIN_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
OWNER = "fewstep-owner"  # in such a folder, a link to the root of the server that it belongs to


def try_lock(folder: Path) -> int | None:
    """Lock a folder as long as this process lives, or until the descriptor is closed; None if another has it.

    Raises OSError where there is no such folder, or none that can be locked.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            return None
        raise
    return descriptor


def is_abandoned(folder: Path) -> bool:
    """Whether nobody who lives has the lock of `folder`; false where that cannot be told."""
    try:
        lock = try_lock(folder)
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    if lock is not None:
        os.close(lock)
    return lock is not None


class Outputs:
    """Writes outputs below `root` and removes what is older than 10 minutes, oldest first.

    `coglet_root` is where coglet keeps a folder for each prediction and never removes one. It is given only
    when our scripts started the server, and only folders of predictions that ran here are touched.
    """

    def __init__(self, root: Path, coglet_root: Path | None) -> None:
        self._root = root
        self._coglet_root = coglet_root
        self._kept: deque[Path] = deque()  # files and folders, in order of age
        self._running: set[Path] = set()
        self._lock: int | None = None

    def prepare(self) -> None:
        """Make the root, and remove what servers left that have ended: in it, and of coglet's folders.

        Files of other names stay, and so does all that is another living server's.
        Raises SettingsError when the root cannot be written.
        """
        try:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for folder in self._coglet_root.glob("*") if self._coglet_root else ():
                with suppress(OSError):  # such as of a folder that says no owner
                    if is_abandoned((folder / OWNER).readlink()):
                        shutil.rmtree(folder)
            with suppress(OSError):  # a file system without locks
                self._lock = try_lock(self._root)
            for path in self._root.iterdir() if self._lock is not None else ():
                if OUR_NAME.fullmatch(path.name):
                    path.unlink()
        except OSError:
            raise SettingsError("FEWSTEP_OUTPUTS names no folder that can be written; name another") from None

    def save(
        self, images: Sequence["Image.Image"], recipes: Sequence["Recipe"], output_format: str, quality: int
    ) -> list[Path]:
        """Encode `images`, each with its recipe, which is left out when empty, and `write` them."""
        # They load Pillow, which --help of scripts that start a server must do without.
        from fewstep.images.codec import encode_image
        from fewstep.images.metadata import save_options

        options = [save_options(recipe, output_format) if recipe else {} for recipe in recipes]
        pairs = zip(images, options, strict=True)
        encoded = [encode_image(image, output_format, quality, **metadata) for image, metadata in pairs]
        return self.write(encoded, output_format)

    def write(self, encoded: Sequence[bytes], suffix: str) -> list[Path]:
        """Write a file `<uuid>-<i>.<suffix>` an item; Cog uploads by base name, so none may come twice."""
        name = uuid.uuid4()
        paths = [self._root / f"{name}-{i}.{suffix}" for i in range(len(encoded))]
        for path, content in zip(paths, encoded, strict=True):
            with path.open("xb") as file:
                self._kept.append(path)  # before it is written, so that a full disk leaks none
                file.write(content)
        return paths

    @contextmanager
    def prediction(self) -> Iterator[None]:
        """Surround each prediction: however it ends, what is old is removed then."""
        folder = None
        if self._coglet_root is not None and PLAIN_ID.fullmatch(prediction := _prediction_id()):
            folder = self._coglet_root / prediction
            self._running.add(folder)
            with suppress(OSError):  # coglet may have been unable to make the folder
                (folder / OWNER).symlink_to(self._root)
        try:
            yield
        finally:
            if folder:
                self._running.discard(folder)
                self._kept.append(folder)
            self._remove(before=time.time() - KEEP_S)

    def remove_all(self) -> None:
        """Remove all, at the end of the server, when everything has been read."""
        self._kept.extend(self._running)
        self._remove(before=float("inf"))
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _remove(self, before: float) -> None:
        while self._kept:
            path = self._kept[0]
            with suppress(OSError):  # gone already, or not ours to remove: that must not fail a prediction
                if path.lstat().st_mtime >= before:
                    return
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            self._kept.popleft()


def _prediction_id() -> str:
    """Return the id of the prediction that this code runs in, which coglet tells only to its log writer."""
    for variable, value in contextvars.copy_context().items():
        if variable.name == "_coglet_prediction_id" and isinstance(value, str):
            return value
    return ""
