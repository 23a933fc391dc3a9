"""Images and captions as a network sees them: encoded once, each into a file, given out in batches."""

from __future__ import annotations

import hashlib
import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fewstep.errors import DatasetError, InvalidRequest
from fewstep.generation.reference import native_size
from fewstep.images.codec import fit, open_image
from fewstep.models.load import Diffusion
from fewstep.request import named_sizes_of
from fewstep.training.checkpoint import write_tensors
from fewstep.training.data import Captioned
from fewstep.training.distill import Batch
from fewstep.training.trainer import WHOLE, Shard, step_generator

logger = logging.getLogger(__name__)


class Encoder:
    """Encodes images into `folder`, one file each, where a later run finds them again.

    `side` is of the squares to train on, in px; other shapes are SDXL's, of the same area.
    """

    def __init__(self, diffusion: Diffusion, folder: Path, side: int | None = None) -> None:
        self.diffusion, self.folder = diffusion, folder
        self._sizes = list(named_sizes_of(side or native_size(diffusion)).values())
        self.captions: list[str] = []  # of what was encoded last
        # Whoever trains another model into the same folder must not meet these latents.
        vae, other = diffusion.vae, getattr(diffusion, "text_encoder_2", None)
        parts = [part for part in (vae.encoder, vae.quant_conv, diffusion.text_encoder, other) if part]
        digest = hashlib.sha256()  # of the weights' bytes, which are the same on every device
        for parameter in torch.nn.ModuleList(parts).parameters():
            digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        self._model = digest.hexdigest()
        folder.mkdir(parents=True, exist_ok=True)

    def encode_all(self, images: Iterable[Captioned], limit: int | None = None) -> list[Path]:
        """Return the files of the first `limit` of `images` that can be opened; what is broken is named in
        the log and left out. Raises DatasetError when none is left."""
        encoded, count = [], 0
        self.captions = []
        for captioned in islice(images, limit):
            count += 1
            try:
                encoded.append(self._encoded(captioned))
                self.captions.append(captioned.caption)
            except InvalidRequest as error:
                logger.warning("left out: %s", error.sentence)
        if not encoded:
            raise DatasetError(f"none of {count} pictures can be opened; their names are in the log")
        return encoded

    @torch.inference_mode()
    def no_prompt(self) -> tuple[Tensor, ...] | None:
        """Return the encoded empty prompt, where it is not all zeros: see `Batch`."""
        if getattr(self.diffusion.config, "force_zeros_for_empty_prompt", False):
            return None
        return tuple(part[0].float() for part in self._prompt(""))

    def _prompt(self, text: str) -> list[Tensor]:
        """Return states (1, T, D), of SDXL also pooled (1, P); what exceeds one prompt is cut off."""
        # SDXL: states, negative, pooled, negative; SD: states, negative.
        parts = self.diffusion.encode_prompt(
            text, device=self.diffusion.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return [part for part in parts if part is not None]

    @torch.inference_mode()
    def _encoded(self, captioned: Captioned) -> Path:
        image = open_image(captioned.path, captioned.name)
        key = repr((self._model, self._sizes[0], captioned.caption, image.info["sha256"]))
        path = self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.safetensors"
        if path.exists():
            return path
        wanted = image.width / image.height
        width, height = min(self._sizes, key=lambda size: abs(math.log(size[0] / size[1] / wanted)))
        pixels = torch.from_numpy(np.array(fit(image, width, height))).permute(2, 0, 1)[None] / 127.5 - 1
        vae = self.diffusion.vae
        latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode() * vae.config.scaling_factor
        # SDXL takes the size of the original, what was cut off, and the size that is left.
        scale = max(width / image.width, height / image.height)
        left, top = round((image.width * scale - width) / 2), round((image.height * scale - height) / 2)
        names, prompt = ("latents", "prompt_embeds", "pooled"), self._prompt(captioned.caption)
        parts = zip(names, (latents, *prompt), strict=False)  # SD's prompt has no second part
        tensors = {name: value[0].half() for name, value in parts}
        if "pooled" in tensors:
            tensors["time_ids"] = torch.tensor([image.height, image.width, top, left, height, width]).float()
        write_tensors(path, tensors, {})
        return path


@dataclass
class Batches:
    """The batches of a training: of one shape each, every image once an epoch; a last batch is filled up with
    others of its shape, and if there are fewer than a batch, with the same ones.

    A batch depends on the step, the share and the seed only, so that a resumed run sees what it would
    have seen. `encoded` are files of an `Encoder`, read when their turn comes; `empty` is its `no_prompt`.
    """

    encoded: Sequence[Path]
    size: int
    seed: int
    device: torch.device
    empty: tuple[Tensor, ...] | None = None

    def __post_init__(self) -> None:
        by_shape = defaultdict(list)
        for i, path in enumerate(self.encoded):
            with safe_open(path, framework="pt") as file:
                by_shape[tuple(file.get_slice("latents").get_shape())].append(i)
        self._groups = list(by_shape.values())
        self.per_epoch = sum(math.ceil(len(group) / self.size) for group in self._groups)
        self._epoch = lru_cache(maxsize=1)(self._plan)

    def __call__(self, step: int, share: Shard = WHOLE) -> Batch:
        epoch, place = divmod(step, self.per_epoch)
        rows = [load_file(self.encoded[i]) for i in share.of(self._epoch(epoch)[place])]
        parts = {name: torch.stack([row[name] for row in rows]).float().to(self.device) for name in rows[0]}
        return Batch(**parts, empty=self.empty)

    def _plan(self, epoch: int) -> list[list[int]]:
        generator = step_generator(self.seed, epoch)
        batches = []
        for group in self._groups:
            order = [group[i] for i in torch.randperm(len(group), generator=generator).tolist()]
            for start in range(0, len(order), self.size):
                batches.append([order[i % len(order)] for i in range(start, start + self.size)])
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]
