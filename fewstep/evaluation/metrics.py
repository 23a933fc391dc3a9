"""How good images are: distances to real images, CLIP's score, and noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from fewstep.images.codec import open_image

BATCH = 25
# Figures by their names, of one image of each prompt.
Metric: TypeAlias = Callable[[Sequence[Image.Image]], dict[str, float]]


def feature_distance(folder: Path, real: Sequence[Path]) -> Metric:
    """Return Fréchet's distance to real images, in the features of a transformers vision model in `folder`,
    safetensors only; it compares for one model and number of images only."""
    from transformers import AutoImageProcessor, AutoModel  # which the judge's users need not wait for

    processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()

    @torch.inference_mode()
    def features(images: Iterable[Image.Image]) -> npt.NDArray[np.float64]:
        rows, remaining = [], iter(images)
        while part := list(islice(remaining, BATCH)):
            rows.append(model(**processor(images=part, return_tensors="pt")).pooler_output)
        return torch.cat(rows).double().numpy()

    expected = features(open_image(path, path.name) for path in real)
    return lambda images: {"feature_distance": frechet_distance(features(images), expected)}


def clip_score(folder: Path, prompts: Sequence[str]) -> Metric:
    """Return the CLIP score (arXiv 2104.08718) of images of `prompts`: 100 times the cosine between prompt
    and image, at least 0; by the CLIP model in `folder`, safetensors only."""
    from transformers import AutoProcessor, CLIPModel

    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()

    @torch.inference_mode()
    def measure(images: Sequence[Image.Image]) -> dict[str, float]:
        cosines, options = [], {"return_tensors": "pt", "padding": True, "truncation": True}
        for start in range(0, len(images), BATCH):
            part = slice(start, start + BATCH)
            output = model(**processor(text=list(prompts[part]), images=list(images[part]), **options))
            cosines.append((output.text_embeds * output.image_embeds).sum(1))
        return {"clip_score": float(100 * torch.cat(cosines).clamp(min=0).mean())}

    return measure


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
