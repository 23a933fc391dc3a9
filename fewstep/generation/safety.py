"""Whether a finished image may be given out. What cannot be checked is not.

Two checkers, chosen by FEWSTEP_SAFETY: "clip", which comes with Stable Diffusion, and "vit", Falconsai's
classifier of 344 MB. A batch is checked where it was generated: nothing here waits for the device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.errors import SafetyError, UnsafeImage, WeightsError
from fewstep.generation.preprocessing import Preprocessing
from fewstep.models.device import is_device_error, is_out_of_memory
from fewstep.models.load import use_only_while_called
from fewstep.models.sources import SAFETY_FOLDERS

logger = logging.getLogger(__name__)

# Of a model's folder: what tells how each checker's images are prepared.
PROCESSORS = {
    "clip": "feature_extractor/preprocessor_config.json",
    "vit": "safety_classifier/preprocessor_config.json",
}
UNSAFE_LABEL = "nsfw"  # of Falconsai's two
CARE = 0.01  # by which an image that needs special care is nearer to every concept

SAFE, UNSAFE, UNCHECKED = 0, 1, 2

Decide = Callable[[Tensor], tuple[Tensor, Tensor]]


class SafetyChecker:
    """Looks at images; `decide` gives the numbers it goes by, (N, ...), and which are unsafe, bool (N,)."""

    def __init__(self, decide: Decide) -> None:
        self._decide = decide

    @torch.inference_mode()
    def verdicts(self, images: Tensor) -> Tensor:
        """uint8 RGB (N, H, W, 3) -> SAFE, UNSAFE or UNCHECKED for each, int8 (N,) on the same device.

        A lost device and a lack of memory are no failure of the checker's, and are raised.
        """
        try:
            numbers, unsafe = self._decide(images)
            finite = numbers.isfinite().flatten(1).all(1)  # every comparison calls a NaN safe
            if not finite.shape == unsafe.shape == images.shape[:1]:
                raise ValueError("the checker's answer is not one for each image")
            return unsafe.to(torch.int8).masked_fill(~finite, UNCHECKED)
        except Exception as error:  # whatever it was, the images were not checked
            if is_out_of_memory(error) or is_device_error(error):
                raise
            logger.error("the safety checker failed", exc_info=error)
            return torch.full(images.shape[:1], UNCHECKED, dtype=torch.int8, device=images.device)


def withheld(verdict: int) -> SafetyError | UnsafeImage | None:
    """Why an image of this verdict must not be given out; None where it may."""
    if verdict == SAFE:
        return None
    if verdict == UNSAFE:
        return UnsafeImage("every picture was flagged as unsafe; try another prompt or seed")
    return SafetyError("the picture could not be checked for safety and is withheld; try again later")


def load_safety_checker(
    folder: Path, kind: str, device: torch.device, dtype: torch.dtype, fix: str, *, small: bool = False
) -> SafetyChecker:
    """The checker `kind` of the model in `folder`; a `small` one is on `device` while it checks alone.

    Raises WeightsError unless all that it needs is there.
    """
    place, shown = folder / SAFETY_FOLDERS[kind], f"weights/{folder.name}/{SAFETY_FOLDERS[kind]}"
    if not (place / "model.safetensors").is_file():
        raise WeightsError(f"{shown} is missing; run: {fix} (or set FEWSTEP_SAFETY=off)")
    # Of the class that reads the file in transformers.
    defaults = {"default_to_square": False, "do_center_crop": True} if kind == "clip" else {}
    try:
        prepare = Preprocessing.read(folder / PROCESSORS[kind], device, **defaults)
    except (OSError, ValueError, LookupError, TypeError) as error:
        named = f"weights/{folder.name}/{PROCESSORS[kind]}"
        raise WeightsError(f"{named} is missing or not what the checker needs; run: {fix}") from error

    def load(kind: Any) -> Any:
        model, info = kind.from_pretrained(
            place, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
        if info["missing_keys"] or info["mismatched_keys"]:  # they would be random numbers
            raise WeightsError(f"{shown} is not the checker that its config describes; run: {fix}")
        model.to(device).eval().requires_grad_(False)
        if small:
            use_only_while_called(getattr(model, "vision_model", model), device)
        return model

    return SafetyChecker((_clip if kind == "clip" else _vit)(load, prepare))


# What each of them imports, nobody else needs.


def _clip(load: Callable[[Any], Any], prepare: Preprocessing) -> Decide:
    """CompVis' checker: the image's CLIP embedding is compared with those of 20 unnamed concepts."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    checker = load(StableDiffusionSafetyChecker)
    special = len(checker.special_care_embeds)
    concepts = F.normalize(torch.cat([checker.special_care_embeds, checker.concept_embeds]).float())
    thresholds = torch.cat([checker.special_care_embeds_weights, checker.concept_embeds_weights]).float()

    def decide(images: Tensor) -> tuple[Tensor, Tensor]:
        # What the checker's own forward does, which waits for every threshold of every image.
        pooled = checker.vision_model(prepare(images).to(checker.dtype))[1]
        embeds = checker.visual_projection(pooled).float()
        lengths = torch.linalg.vector_norm(embeds, dim=1, keepdim=True)
        # Not a matrix product, which TF32 may be allowed to round.
        cosines = (embeds[:, None] / lengths[:, None].clamp_min(1e-12) * concepts).sum(2)
        scores = cosines - thresholds
        care = _exceeds(scores[:, :special]).any(1, keepdim=True)
        unsafe = _exceeds(scores[:, special:] + CARE * care).any(1)
        return torch.cat([lengths, scores], 1), unsafe  # an infinite length would make all cosines 0

    return decide


def _exceeds(scores: Tensor) -> Tensor:
    """Which of them are above 0, by the thousandths that they are rounded to."""
    return scores.round(decimals=3) > 0


def _vit(load: Callable[[Any], Any], prepare: Preprocessing) -> Decide:
    """Falconsai's classifier."""
    from transformers import ViTForImageClassification

    classifier = load(ViTForImageClassification)
    unsafe = classifier.config.label2id[UNSAFE_LABEL]

    def decide(images: Tensor) -> tuple[Tensor, Tensor]:
        logits = classifier(prepare(images).to(classifier.dtype)).logits.float()
        return logits, logits.softmax(1)[:, unsafe] >= 0.5

    return decide
