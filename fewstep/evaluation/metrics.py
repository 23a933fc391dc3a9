"""How good images are: a judge's answers, distances to real images, CLIP's score, and noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from fewstep.evaluation.generate import Generate
from fewstep.images.codec import open_image

BATCH = 25
Images: TypeAlias = Sequence[Image.Image] | npt.NDArray[np.uint8]  # the array is (N, H, W, 3)
# Figures by their names, of one image of each prompt.
Metric: TypeAlias = Callable[[Sequence[Image.Image]], dict[str, float]]


class AttributeJudge(Protocol):
    """Reads what images show, by the names of `attributes`; what scenes are is the judge's own affair."""

    attributes: tuple[str, ...]

    def score(self, images: Images, scenes: Sequence[Any]) -> npt.NDArray[np.bool_]:
        """Return which attributes of which image are right, (N, attributes)."""

    def describe(self, images: Images) -> npt.NDArray[np.float64]:
        """Return features that like images share, (N, D)."""


@dataclass(frozen=True)
class Score:
    """Shares of right answers in percent, with 95 % intervals over the prompts."""

    system: str
    attributes: dict[str, float]
    all_right: float
    interval: float  # half its width, in points
    distance: float  # Fréchet's, to real images of the same scenes, in the judge's features


class Evaluator:
    """A judge with the scenes that it is asked about: `seeds` images of each prompt, which all show a scene.

    `scenes` and `real` images of them are in the order of what is generated: all seeds of the first prompt,
    all of the second.
    """

    def __init__(
        self,
        judge: AttributeJudge,
        scenes: Sequence[Any],
        prompts: Sequence[str],
        real: Images,
        seeds: int = 1,
    ) -> None:
        self.judge, self.scenes, self.prompts, self.seeds = judge, list(scenes), list(prompts), seeds
        self._real = judge.describe(real)

    def score(self, system: str, images: Images) -> Score:
        """Judge `images`."""
        right = self.judge.score(images, self.scenes).reshape(len(self.prompts), self.seeds, -1)
        # Images of one prompt are not independent, prompts are.
        per_prompt = 100 * right.all(2).mean(1)
        return Score(
            system,
            dict(zip(self.judge.attributes, (100 * right.mean((0, 1))).tolist(), strict=True)),
            float(per_prompt.mean()),
            float(1.96 * per_prompt.std(ddof=1) / len(per_prompt) ** 0.5),
            frechet_distance(self.judge.describe(images), self._real),
        )

    def generate_and_score(self, system: str, generate: Generate) -> Score:
        """Judge images of every prompt with every seed."""
        prompts = [prompt for prompt in self.prompts for _ in range(self.seeds)]
        seeds = [1000 * i + seed for i in range(len(self.prompts)) for seed in range(self.seeds)]
        return self.score(system, generate(prompts, seeds))

    def measure(self, images: Sequence[Image.Image]) -> dict[str, float]:
        """Return the percentage with all attributes right, and the distance to real images."""
        score = self.score("", images)
        return {"all_right": score.all_right, "distance": score.distance}


class FeatureMeter:
    """Fréchet's distance to real images, in the features of a transformers vision model in `folder`,
    safetensors only; it compares for one model and number of images only."""

    def __init__(self, folder: Path, real: Sequence[Path]) -> None:
        from transformers import AutoImageProcessor, AutoModel  # which the judge's users need not wait for

        self._processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        self._model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
        self._real = self._features(open_image(path, path.name) for path in real)

    def measure(self, images: Sequence[Image.Image]) -> dict[str, float]:
        return {"feature_distance": frechet_distance(self._features(images), self._real)}

    @torch.inference_mode()
    def _features(self, images: Iterable[Image.Image]) -> npt.NDArray[np.float64]:
        rows, remaining = [], iter(images)
        while part := list(islice(remaining, BATCH)):
            inputs = self._processor(images=part, return_tensors="pt")
            rows.append(self._model(**inputs).pooler_output)
        return torch.cat(rows).double().numpy()


class ClipMeter:
    """CLIP score (arXiv 2104.08718): 100 times the cosine between prompt and image, at least 0; by the CLIP
    model in `folder`."""

    def __init__(self, folder: Path, prompts: Sequence[str]) -> None:
        from transformers import AutoProcessor, CLIPModel

        self._processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        self._model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
        self._prompts = prompts

    @torch.inference_mode()
    def measure(self, images: Sequence[Image.Image]) -> dict[str, float]:
        cosines, options = [], {"return_tensors": "pt", "padding": True, "truncation": True}
        for start in range(0, len(images), BATCH):
            part = slice(start, start + BATCH)
            inputs = self._processor(text=list(self._prompts[part]), images=list(images[part]), **options)
            output = self._model(**inputs)
            cosines.append((output.text_embeds * output.image_embeds).sum(1))
        return {"clip_score": float(100 * torch.cat(cosines).clamp(min=0).mean())}


def frechet_distance(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """Return the distance between Gaussians fitted to two sets of features, (N, D) and (M, D): what FID is in
    Inception's (arXiv 1706.08500, eq. 6)."""
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    values, vectors = np.linalg.eigh(covariances[0])
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    # The trace of (A B)^1/2, by way of a symmetric matrix with the same eigenvalues.
    shared = np.sqrt(np.linalg.eigvalsh(root @ covariances[1] @ root).clip(min=0)).sum()
    means = a.mean(0) - b.mean(0)
    return float(means @ means + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * shared)


def psnr(images: Sequence[Image.Image], expected: Sequence[Image.Image]) -> float:
    """Return the peak signal-to-noise ratio in dB, the median of the images; inf where they are the same."""
    ratios = []
    for image, other in zip(images, expected, strict=True):
        error = float(((np.asarray(image, float) - np.asarray(other, float)) ** 2).mean())
        ratios.append(10 * math.log10(255**2 / error) if error else math.inf)
    return statistics.median(ratios)
