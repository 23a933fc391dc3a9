"""The judge: two small networks that look at an image, one reading what it shows, one whether it looks whole.

Both are trained on drawings only, never on a generated image, and frozen before anything that they judge is
trained. An image is right when what it shows is what was asked and it looks whole.
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

from fewstep.miniature.judge import augment
from fewstep.miniature.next_world.breaking import hand_of
from fewstep.miniature.next_world.scenes import NextScene, Said
from fewstep.miniature.next_world.things import THINGS
from fewstep.miniature.next_world.words import ATTRIBUTES, COLOURS
from fewstep.miniature.world.dataset import Images, Pixels, to_tensor
from fewstep.training.trainer import Schedule, Shard, optimise, step_generator

FILE = "judge/judge.safetensors"  # within the miniature's weights
READER_PX, LOOKS_PX = 128, 256  # images of any size are read at these
BATCH, UNREAD = 64, -100
PLACES, REST = len(ATTRIBUTES["position"]), ("ground", "backdrop", "sky")
THING_COUNT, COLOUR_COUNT = 1 + len(THINGS), 2 + len(COLOURS)  # with nothing, and with its own colour


def _convolutions(*plan: tuple[int, int, int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels, out, stride in plan:
        layers += [nn.Conv2d(channels, out, 3, stride, 1), nn.GroupNorm(8, out), nn.SiLU()]
    return nn.Sequential(*layers)


class Reader(nn.Module):
    """(N, 3, 128, 128) in [-1, 1] -> a row of logits for each of a scene's labels: what stands on the left,
    in the middle and on the right, in which colours, and ground, backdrop and sky."""

    def __init__(self) -> None:
        super().__init__()
        self.features = _convolutions((3, 32, 2), (32, 64, 2), (64, 96, 2), (96, 128, 2), (128, 128, 1))
        self.place = nn.Sequential(nn.Flatten(), nn.Linear(128 * 8 * 4, 192), nn.SiLU())
        self.place_logits = nn.Linear(192, THING_COUNT + COLOUR_COUNT)
        self.rest = nn.Sequential(
            nn.AdaptiveAvgPool2d((8, 4)), nn.Flatten(), nn.Linear(128 * 8 * 4, 192), nn.SiLU()
        )
        self.rest_logits = nn.Linear(192, sum(len(ATTRIBUTES[name]) for name in REST))

    def forward(self, images: Tensor) -> list[Tensor]:
        seen = self.features(images)
        windows = [self.place_logits(self.place(seen[..., start : start + 4])) for start in (0, 2, 4)]
        things, colours = zip(*(row.split([THING_COUNT, COLOUR_COUNT], 1) for row in windows), strict=True)
        rest = self.rest_logits(self.rest(seen)).split([len(ATTRIBUTES[name]) for name in REST], 1)
        return [*things, *colours, *rest]

    @torch.inference_mode()
    def read(self, images: Images) -> npt.NDArray[np.int64]:
        """Return the labels that it reads, (N, 9), as `NextScene.labels` has them."""
        rows = [torch.stack([row.argmax(1) for row in self(x)], 1) for x in batches(images, READER_PX)]
        return torch.cat(rows).numpy()


class Looks(nn.Module):
    """(N, 3, 256, 256) in [-1, 1] -> (N,): above 0 it looks whole.

    What is broken is so in some place: the logit is that of the worst places, as far as they say so.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = _convolutions(
            (3, 24, 2), (24, 48, 2), (48, 64, 2), (64, 96, 2), (96, 96, 2), (96, 96, 1)
        )
        self.head = nn.Sequential(nn.Linear(2 * 96, 96), nn.SiLU(), nn.Linear(96, 1))

    def forward(self, images: Tensor) -> Tensor:
        seen = self.features(images).flatten(2)
        logits: Tensor = self.head(torch.cat([seen.mean(2), seen.amax(2)], 1))[:, 0]
        return logits

    @torch.inference_mode()
    def look(self, images: Images) -> npt.NDArray[np.float64]:
        """Return how whole each image looks; above 0 it does."""
        return torch.cat([self(x) for x in batches(images, LOOKS_PX)]).double().numpy()

    @torch.inference_mode()
    def describe(self, images: Images) -> npt.NDArray[np.float64]:
        """Return what it sees where, (N, 16 x 96): the features that distances compare."""
        maps = [F.adaptive_avg_pool2d(self.features(x), 4).flatten(1) for x in batches(images, LOOKS_PX)]
        return torch.cat(maps).double().numpy()


def batches(images: Images, side: int) -> Iterator[Tensor]:
    """Yield uint8 (N, H, W, 3) or PIL images of one size as (B, 3, side, side) in [-1, 1]."""
    for start in range(0, len(images), BATCH):
        x = to_tensor(np.stack([np.asarray(image) for image in images[start : start + BATCH]]))
        yield F.interpolate(x, (side, side), mode="bilinear", antialias=True)


class NextJudge(nn.Module):
    """Both networks, in one file."""

    def __init__(self) -> None:
        super().__init__()
        self.reader, self.looks = Reader(), Looks()


def load_judge(weights: Path) -> NextJudge:
    """Load the frozen judge out of the miniature's weights, in fp32 on the CPU."""
    judge = NextJudge()
    judge.load_state_dict({key: value.float() for key, value in load_file(weights / FILE).items()})
    return judge.eval().requires_grad_(False)


def right_attributes(
    labels: npt.NDArray[np.int64], scenes: Sequence[NextScene], said: Sequence[Said]
) -> dict[str, npt.NDArray[np.bool_]]:
    """Return for each attribute whether the images are right in it, bool (N,), by `labels` read from them.

    What was `said` of a scene counts: position, ground, backdrop and sky where they are named; things and
    their colours always, wherever they stand, for a colour that is not said is the thing's own.
    """
    asked = np.array([scene.labels for scene in scenes])
    named = {name: np.array([name in one.attributes for one in said]) for name in ATTRIBUTES}
    things, colours = slice(0, PLACES), slice(PLACES, 2 * PLACES)

    def standing(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Each thing with its colour, in an order that places have no part in."""
        return np.sort(rows[:, things] * 100 + rows[:, colours], 1)

    right = {
        "things": (np.sort(labels[:, things], 1) == np.sort(asked[:, things], 1)).all(1),
        "colours": (standing(labels) == standing(asked)).all(1),
        "position": (labels[:, things] == asked[:, things]).all(1) | ~named["position"],
    }
    rest = zip(REST, labels.T[2 * PLACES :], asked.T[2 * PLACES :], strict=True)
    return right | {name: (seen == meant) | ~named[name] for name, seen, meant in rest}


def labels_in_any_hand(scenes: Sequence[NextScene], seed: int) -> Tensor:
    """Return the labels of `draw_in_any_hand`'s images of `scenes` from `seed` on, (N, 9): ink has no
    colours, and whoever cannot read them must not guess."""
    labels = torch.tensor([scene.labels for scene in scenes])
    ink = torch.tensor([hand_of(seed + i)[0] == "ink" for i in range(len(scenes))])
    labels[ink, PLACES : 2 * PLACES] = UNREAD
    return labels


def train_reader(
    images: Pixels, labels: Tensor, steps: int, checkpoints: Path, device: torch.device
) -> Reader:
    """Train on drawn `images` and their `labels` (N, 9), two thirds of each batch damaged as decoders do."""
    torch.manual_seed(1)
    reader, labels = Reader().to(device), labels.to(device)

    def loss(step: int, share: Shard) -> Tensor:
        generator = step_generator(1, step)
        index = torch.randint(len(labels), (96,), generator=generator).sort().values
        x = F.interpolate(to_tensor(images[index.numpy()]), (READER_PX,) * 2, mode="bilinear", antialias=True)
        x = torch.cat([augment(x[:64], generator), x[64:]]).to(device, memory_format=torch.channels_last)
        rows = zip(reader(x), labels[index.to(device)].T, strict=True)
        # What is UNREAD is -100, which cross_entropy leaves out.
        return torch.stack([F.cross_entropy(row, target, label_smoothing=0.02) for row, target in rows]).sum()

    optimise("reader", reader, loss, Schedule(steps, lr=2e-3, batch=96, ema_decay=0.99), checkpoints)
    return reader.cpu().eval().requires_grad_(False)


def train_looks(whole: Pixels, broken: Pixels, steps: int, checkpoints: Path, device: torch.device) -> Looks:
    """Train on drawings that are whole, as far as decoders leave them so, and on others that are broken."""
    torch.manual_seed(2)
    looks = Looks().to(device)
    target = torch.tensor([1.0] * 24 + [0.0] * 24, device=device)

    def loss(step: int, share: Shard) -> Tensor:
        generator = step_generator(2, step)
        parts = []
        for images in (whole, broken):
            index = torch.randint(len(images), (24,), generator=generator).sort().values
            parts.append(to_tensor(images[index.numpy()]))
        x = soften(torch.cat(parts), generator).to(device, memory_format=torch.channels_last)
        return F.binary_cross_entropy_with_logits(looks(x), 0.02 + 0.96 * target)

    optimise("looks", looks, loss, Schedule(steps, lr=2e-3, batch=48, ema_decay=0.99), checkpoints)
    return looks.cpu().eval().requires_grad_(False)


def soften(x: Tensor, generator: torch.Generator) -> Tensor:
    """Do to (N, 3, H, W) what leaves it whole: reduce it to half its size and back, blur it by less than a
    pixel, change contrast and brightness a little, add a little noise, mirror it."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand((len(x), 1, 1, 1), generator=generator) * (high - low) + low

    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(x, soft, uniform(-0.3, 1.0))  # below zero sharpens
    small = F.interpolate(F.interpolate(x, scale_factor=0.5, mode="area"), x.shape[2:], mode="bilinear")
    x = torch.where(uniform(0, 1) < 0.3, small, x)
    x = x * uniform(0.9, 1.1) + uniform(-0.06, 0.06)
    x = x + uniform(0, 0.03) * torch.randn(x.shape, generator=generator)
    return torch.where(uniform(0, 1) < 0.5, x.flip(3), x).clamp(-1, 1)
