"""The judge: a small classifier that reads a scene's six attributes back from the pixels, and its figures.

It is trained on drawings and their augmentations only, never on a generated image, and frozen before anything
that it judges is trained. Its hash stands in the miniature's manifest, so that scores of different days
compare.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.evaluation.generate import Generate
from fewstep.evaluation.metrics import frechet_distance
from fewstep.miniature.world.dataset import Images, Pixels, draw_many, to_tensor
from fewstep.miniature.world.scenes import ATTRIBUTES, Scene, complete_captions
from fewstep.models.device import autocast
from fewstep.training.trainer import Schedule, Shard, optimise, step_generator

FILE = "judge/judge.safetensors"  # within the miniature's weights
BATCH, BATCH_READ = 96, 128  # in training, and in reading
INPUT_PX = 96  # images of any size and shape are judged at 96 x 96


class Judge(nn.Module):
    """(N, 3, 96, 96) in [-1, 1] -> one row of logits per attribute."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, out, stride in ((3, 32, 2), (32, 64, 2), (64, 96, 2), (96, 128, 2), (128, 128, 1)):
            layers += [nn.Conv2d(channels, out, 3, stride, 1), nn.GroupNorm(8, out), nn.SiLU()]
        self.features = nn.Sequential(*layers)
        # Position matters (left, right; sky, ground), so the 6 x 6 map is kept, not averaged away.
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(128 * 36, 192), nn.SiLU())
        self.logits = nn.ModuleDict({name: nn.Linear(192, len(seen)) for name, seen in ATTRIBUTES.items()})

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


@dataclass(frozen=True)
class Score:
    """Shares of right answers in percent, with 95 % intervals over the prompts."""

    system: str
    attributes: dict[str, float]
    all_right: float
    interval: float  # half its width, in points
    distance: float  # Fréchet's, to drawings of the same scenes, in the judge's features


class Evaluator:
    """A judge that is shown `seeds` images of each of `prompts`: all of the first, then all of the second.
    They are a complete caption of each of some scenes, always the same one."""

    def __init__(self, judge: Judge, scenes: Sequence[Scene], seeds: int = 1) -> None:
        self.judge, self.prompts, self.seeds = judge, complete_captions(scenes), seeds
        self.scenes = [scene for scene in scenes for _ in range(seeds)]  # that the images show
        self._drawn = judge.describe(draw_many(self.scenes, 2 * 10**9, 128, 128))

    def score(self, system: str, images: Images) -> Score:
        """Judge `images`."""
        right = self.judge.score(images, self.scenes).reshape(len(self.prompts), self.seeds, -1)
        # Images of one prompt are not independent, prompts are.
        per_prompt = 100 * right.all(2).mean(1)
        return Score(
            system,
            dict(zip(ATTRIBUTES, (100 * right.mean((0, 1))).tolist(), strict=True)),
            float(per_prompt.mean()),
            float(1.96 * per_prompt.std(ddof=1) / len(per_prompt) ** 0.5),
            frechet_distance(self.judge.describe(images), self._drawn),
        )

    def generate_and_score(self, system: str, generate: Generate) -> Score:
        """Judge images of every prompt with every seed."""
        prompts = [prompt for prompt in self.prompts for _ in range(self.seeds)]
        seeds = [1000 * i + seed for i in range(len(self.prompts)) for seed in range(self.seeds)]
        return self.score(system, generate(prompts, seeds))

    def measure(self, images: Images) -> dict[str, float]:
        """Return the percentage with all attributes right, and the distance to drawings."""
        score = self.score("", images)
        return {"all_right": score.all_right, "distance": score.distance}


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
