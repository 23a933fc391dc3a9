"""Whether a finished image may be given out. What cannot be checked is not.

Two checkers, chosen by FEWSTEP_SAFETY: "clip", which comes with Stable Diffusion, and "vit", Falconsai's
classifier of 344 MB.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from fewstep.errors import SafetyError, UnsafeImage, WeightsError

logger = logging.getLogger(__name__)

# Of a model's folder, and the label of Falconsai's that means harm.
FOLDERS = {"clip": "safety_checker", "vit": "safety_classifier"}
UNSAFE_LABEL = "nsfw"

Decide = Callable[[list[Image.Image]], tuple[Tensor, Sequence[bool]]]


class SafetyChecker:
    """Looks at finished images; `decide` gives the numbers it went by, (N, ...), and N verdicts."""

    def __init__(self, decide: Decide) -> None:
        self._decide = decide

    @torch.inference_mode()
    def checked(self, image: Image.Image) -> Image.Image | SafetyError | UnsafeImage:
        """`image`, or why it must not be given out: diffusers' own checker calls a NaN safe.

        Images go one by one, since a mate's must not decide, nor fail, another's.
        """
        try:
            numbers, [unsafe] = self._decide([image])
            sound = len(numbers) == 1 and bool(numbers.isfinite().all())
        except Exception as error:  # whatever it was, the image was not checked
            logger.error("the safety checker failed", exc_info=error)
            sound = False
        if not sound:
            return SafetyError("the picture could not be checked for safety and is withheld; try again later")
        flagged = "every picture was flagged as unsafe; try another prompt or seed"
        return UnsafeImage(flagged) if unsafe else image


def load_safety_checker(
    folder: Path, kind: str, device: torch.device, dtype: torch.dtype, fix: str
) -> SafetyChecker:
    """The checker `kind` of the model in `folder`. Raises WeightsError unless all its weights are there."""
    place = folder / FOLDERS[kind]
    shown = f"weights/{folder.name}/{FOLDERS[kind]}"
    if not (place / "model.safetensors").is_file():
        raise WeightsError(f"{shown} is missing; run: {fix} (or set FEWSTEP_SAFETY=off)")

    def load(kind: Any) -> Any:
        model, info = kind.from_pretrained(
            place, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
        if info["missing_keys"] or info["mismatched_keys"]:  # they would be random numbers
            raise WeightsError(f"{shown} is not the checker that its config describes; run: {fix}")
        return model.to(device).eval().requires_grad_(False)

    return SafetyChecker(_clip(folder, load) if kind == "clip" else _vit(place, load))


# What each of them imports, nobody else needs.


def _clip(folder: Path, load: Callable[[Any], Any]) -> Decide:
    """CompVis' checker: the image's CLIP embedding is compared with those of 20 unnamed concepts."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessor

    checker = load(StableDiffusionSafetyChecker)
    processor = CLIPImageProcessor.from_pretrained(folder / "feature_extractor", local_files_only=True)
    embeddings: list[Tensor] = []
    checker.visual_projection.register_forward_hook(lambda _, __, output: embeddings.append(output))

    def decide(images: list[Image.Image]) -> tuple[Tensor, Sequence[bool]]:
        embeddings.clear()
        pixels = processor(images, return_tensors="pt").pixel_values.to(checker.device, checker.dtype)
        _, verdicts = checker(clip_input=pixels, images=torch.zeros(len(images), 1))
        return embeddings[-1], verdicts

    return decide


def _vit(place: Path, load: Callable[[Any], Any]) -> Decide:
    """Falconsai's classifier."""
    from transformers import ViTForImageClassification, ViTImageProcessor

    classifier = load(ViTForImageClassification)
    processor = ViTImageProcessor.from_pretrained(place, local_files_only=True)
    unsafe = classifier.config.label2id[UNSAFE_LABEL]

    def decide(images: list[Image.Image]) -> tuple[Tensor, Sequence[bool]]:
        pixels = processor(images, return_tensors="pt").pixel_values.to(classifier.device, classifier.dtype)
        logits = classifier(pixels).logits.float()
        return logits, (logits.softmax(1)[:, unsafe] >= 0.5).tolist()

    return decide
