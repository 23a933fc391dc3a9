"""The judge: a small classifier that reads a scene's six attributes back from the pixels.

It is trained on drawings and their augmentations only, never on a generated image, and frozen before anything
that it judges is trained. Its hash stands in the miniature's manifest, so that scores of different days
compare.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.evaluation.metrics import Evaluator, Images
from fewstep.miniature.world.dataset import Pixels, draw_many, to_tensor
from fewstep.miniature.world.scenes import ATTRIBUTES, Scene, complete_captions
from fewstep.models.device import autocast
from fewstep.training.trainer import Schedule, Shard, optimise, step_generator

FILE = "judge/judge.safetensors"  # within the miniature's weights
BATCH, BATCH_READ = 96, 128  # in training, and in reading
INPUT_PX = 96  # images of any size and shape are judged at 96 x 96


class Judge(nn.Module):
    """(N, 3, 96, 96) in [-1, 1] -> one row of logits per attribute."""

    attributes = tuple(ATTRIBUTES)

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, out, stride in ((3, 32, 2), (32, 64, 2), (64, 96, 2), (96, 128, 2), (128, 128, 1)):
            layers += [nn.Conv2d(channels, out, 3, stride, 1), nn.GroupNorm(8, out), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        # Position matters (left, right; sky, ground), so the 6 x 6 map is kept, not averaged away.
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(128 * 36, 192), nn.SiLU())
        heads = {name: nn.Linear(192, len(values)) for name, values in ATTRIBUTES.items()}
        self.logits = nn.ModuleDict(heads)

    def forward(self, images: Tensor) -> list[Tensor]:
        hidden = self.head(self.features(images))
        return [layer(hidden) for layer in self.logits.values()]

    @torch.inference_mode()
    def read_attributes(self, images: Images) -> npt.NDArray[np.int64]:
        """Return what the judge sees: indices into `ATTRIBUTES`, (N, 6)."""
        rows = [torch.stack([row.argmax(1) for row in self(x)], 1) for x in _batches(images)]
        return torch.cat(rows).numpy()

    @torch.inference_mode()
    def describe(self, images: Images) -> npt.NDArray[np.float64]:
        """Return what the judge's last layer decides by, (N, 192): the features that a distance compares."""
        return torch.cat([self.head(self.features(x)) for x in _batches(images)]).double().numpy()

    def score(self, images: Images, scenes: Sequence[Scene]) -> npt.NDArray[np.bool_]:
        """Return which attributes of which image are right, bool (N, 6)."""
        right: npt.NDArray[np.bool_] = self.read_attributes(images) == [scene.labels for scene in scenes]
        return right


def load_judge(weights: Path) -> Judge:
    """Load the frozen judge out of the miniature's weights, in fp32 on the CPU."""
    judge = Judge()
    judge.load_state_dict({key: value.float() for key, value in load_file(weights / FILE).items()})
    return judge.eval().requires_grad_(False)


def judge_input(images: Images) -> Tensor:
    """uint8 (N, H, W, 3) or PIL images of one size -> (N, 3, 96, 96) in [-1, 1]."""
    x = to_tensor(np.stack([np.asarray(image) for image in images]))
    return F.interpolate(x, (INPUT_PX, INPUT_PX), mode="bilinear", antialias=True)


def _batches(images: Images) -> Iterator[Tensor]:
    return (judge_input(images[i : i + BATCH_READ]) for i in range(0, len(images), BATCH_READ))


def make_evaluator(judge: Judge, scenes: Sequence[Scene], seeds: int = 1) -> Evaluator:
    """Return an evaluator of `seeds` images of a complete caption of each of `scenes`, always the same one;
    their looks are compared with drawings of the same scenes."""
    shown = [scene for scene in scenes for _ in range(seeds)]
    return Evaluator(judge, shown, complete_captions(scenes), draw_many(shown, 2 * 10**9, 128, 128), seeds)


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Damage (N, 3, H, W) as decoders and samplers do: blur, noise, wrong contrast and colour, small
    shifts."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand((len(x), 1, 1, 1), generator=generator) * (high - low) + low

    soft = F.avg_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, 1)
    x = torch.lerp(x, soft, uniform(-0.3, 1.0))  # below zero sharpens
    small = F.interpolate(F.interpolate(x, scale_factor=0.5, mode="area"), x.shape[2:], mode="bilinear")
    x = torch.where(uniform(0, 1) < 0.25, small, x)
    grey = x.mean((1, 2, 3), keepdim=True)
    x = (x - grey) * uniform(0.8, 1.2) + grey + uniform(-0.08, 0.08)
    x = x + 0.05 * torch.randn((len(x), 3, 1, 1), generator=generator)
    blotches = torch.randn((len(x), 3, 12, 12), generator=generator)
    blotches = F.interpolate(blotches, x.shape[2:], mode="bilinear")
    x = x + uniform(0, 0.12) * blotches + uniform(0, 0.12) * torch.randn(x.shape, generator=generator)
    dx, dy = (int(v) for v in torch.randint(-3, 4, (2,), generator=generator))
    x = F.pad(x, (4, 4, 4, 4), mode="replicate")
    return x[:, :, 4 + dy : -4 + dy, 4 + dx : -4 + dx].clamp(-1, 1)


def train_judge(
    images: Pixels, scenes: list[Scene], steps: int, checkpoints: Path, device: torch.device
) -> Judge:
    """Train on drawn `images` of `scenes`, two thirds of each batch augmented."""
    torch.manual_seed(1)
    judge = Judge().to(device)
    labels = torch.tensor([scene.labels for scene in scenes], device=device)

    def loss(step: int, share: Shard) -> Tensor:
        generator = step_generator(1, step)
        index = torch.randint(len(scenes), (BATCH,), generator=generator).sort().values
        x = judge_input(images[index.numpy()])
        x = torch.cat([augment(x[:64], generator), x[64:]]).to(device, memory_format=torch.channels_last)
        with autocast(device):
            logits = judge(x)
        total = torch.zeros((), device=device)
        for i, row in enumerate(logits):
            total = total + F.cross_entropy(row.float(), labels[index, i], label_smoothing=0.02)
        return total

    optimise("judge", judge, loss, Schedule(steps, lr=2e-3, batch=BATCH, ema_decay=0.99), checkpoints)
    return judge.float().cpu().eval().requires_grad_(False)
