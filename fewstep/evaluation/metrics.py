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


def kernel_distance(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """Return the squared maximum mean discrepancy of two sets of features, (N, D) and (M, D), by the kernel
    (x.y / D + 1)^3: what KID is in Inception's (arXiv 1801.01401, section 4).

    It is unbiased: unlike Fréchet's distance it means the same for any number of images, and is about 0, a
    little above or below, for two sets of one kind.
    """

    def kernel(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        values: npt.NDArray[np.float64] = (x @ y.T / x.shape[1] + 1) ** 3
        return values

    def within(x: npt.NDArray[np.float64]) -> float:
        values, count = kernel(x, x), len(x)
        return float((values.sum() - np.trace(values)) / (count * (count - 1)))

    return within(a) + within(b) - 2 * float(kernel(a, b).mean())


def precision_recall(
    generated: npt.NDArray[np.float64], real: npt.NDArray[np.float64], k: int = 3
) -> tuple[float, float]:
    """Return the share of `generated` that lies within the reach of `real`, and the reverse: how good images
    are, and how much of the world they cover (arXiv 1904.06991). Features (N, D) and (M, D).

    The reach of a set is the union of the balls around its members out to their `k`-th neighbour in the set.
    """

    def distances(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        squares = (x**2).sum(1)[:, None] + (y**2).sum(1) - 2 * x @ y.T
        far: npt.NDArray[np.float64] = np.sqrt(squares.clip(min=0))
        return far

    def covered(x: npt.NDArray[np.float64], members: npt.NDArray[np.float64]) -> float:
        reach = np.sort(distances(members, members), 1)[:, k]  # column 0 is the member itself
        return float((distances(x, members) <= reach).any(1).mean())

    return covered(generated, real), covered(real, generated)


def wilson_interval(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95 % interval of a share of which `right` of `count` were seen (Wilson, 1927), which unlike
    the normal approximation does not shrink to nothing at 0 and 1."""
    share, spread = right / count, z**2 / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def psnr(images: Sequence[Image.Image], expected: Sequence[Image.Image]) -> float:
    """Return the peak signal-to-noise ratio in dB, the median of the images; inf where they are the same."""
    ratios = []
    for image, other in zip(images, expected, strict=True):
        error = float(((np.asarray(image, float) - np.asarray(other, float)) ** 2).mean())
        ratios.append(10 * math.log10(255**2 / error) if error else math.inf)
    return statistics.median(ratios)
