"""Files of tensors that are either whole or not there."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fewstep.errors import TrainingError

logger = logging.getLogger(__name__)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors` as safetensors, beside `path` at first, so that whoever is killed or out of disk
    meanwhile leaves what was there. Raises TrainingError when they cannot be written."""
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(whole, part, metadata=dict(metadata))
        with part.open("rb+") as file:  # its bytes before its name
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, SafetensorError) as error:
        logger.error("%s could not be written", path.name, exc_info=error)
        raise TrainingError(f"{path.name} could not be written; is the disk full?") from None
    finally:
        part.unlink(missing_ok=True)
