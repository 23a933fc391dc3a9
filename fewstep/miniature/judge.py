"""The judge: a small network that looks at an image and says what it shows and whether it looks whole.

It is trained on drawings only, never on a generated image. An image is right when what it shows is what was
asked and it looks whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.miniature.world.breaking import hand_of
from fewstep.miniature.world.dataset import Images, Pixels, to_tensor
from fewstep.miniature.world.scenes import Said, Scene
from fewstep.miniature.world.things import THINGS
from fewstep.miniature.world.words import ATTRIBUTES, COLOURS
from fewstep.models.device import autocast
from fewstep.training.trainer import Schedule, Shard, optimise, step_generator

FILE = "judge/judge.safetensors"  # within the miniature's weights
INPUT_PX = 256  # images of any size are judged at this one
READ_AT_ONCE, UNREAD = 64, -100
PLACE_COUNT, REST = len(ATTRIBUTES["position"]), ("ground", "backdrop", "sky")
THING_COUNT, COLOUR_COUNT = 1 + len(THINGS), 2 + len(COLOURS)  # with nothing, and with its own colour
REST_COUNTS = [len(ATTRIBUTES[name]) for name in REST]
WIDTHS = (32, 64, 128, 160)  # channels, at 64 x 64, 32 x 32 ... 8 x 8
PATCHED, PATCH_PX = 2, 16  # the level that tells where it is broken, and its patches' side
PAIRS, LOOKS_WEIGHT = 32, 5.0  # in training
# A patch of a broken drawing is broken if it differs from the whole one's by more than this of [-1, 1], and
# the drawing if as many patches do: a star with its halves exchanged is whole.
APART, ENOUGH = 0.03, 3


@dataclass(frozen=True)
class Seen:
    """What the judge sees in N images: `labels`, (N, 9), as `Scene.labels` has them; which look `whole`,
    bool (N,); and the `features` that distances compare, (N, 16 x 160), of what is where."""

    labels: npt.NDArray[np.int64]
    whole: npt.NDArray[np.bool_]
    features: npt.NDArray[np.float64]


class Judge(nn.Module):
    """(N, 3, 256, 256) in [-1, 1] -> a row of logits for each of a scene's labels; one number (N,), above 0
    for what looks whole; and where it looks broken, (N, 1, 16, 16), above 0 for a patch that does.

    The labels are what stands on the left, in the middle and on the right, in which colours, and ground,
    backdrop and sky. Whether it looks whole it decides by the mean and the maximum of all places at every
    level, since what is broken may be so in one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        for channels, out in zip((3, *WIDTHS), WIDTHS, strict=False):
            first = channels == 3
            convs = [nn.Conv2d(3, out, 7, 4, 3)] if first else [nn.Conv2d(channels, out, 3, 2, 1)]
            convs += [] if first else [nn.Conv2d(out, out, 3, 1, 1)]
            layers = [layer for conv in convs for layer in (conv, nn.GroupNorm(8, out), nn.SiLU())]
            self.levels.append(nn.Sequential(*layers))
        seen = WIDTHS[-1] * 8 * 4
        self.place = nn.Sequential(nn.Flatten(), nn.Linear(seen, 128), nn.SiLU())
        self.place_logits = nn.Linear(128, THING_COUNT + COLOUR_COUNT)
        self.rest = nn.Sequential(nn.AdaptiveAvgPool2d((8, 4)), nn.Flatten(), nn.Linear(seen, 128), nn.SiLU())
        self.rest_logits = nn.Linear(128, sum(REST_COUNTS))
        self.broken = nn.Conv2d(WIDTHS[PATCHED], 1, 1)
        self.whole = nn.Sequential(nn.Linear(2 * (sum(WIDTHS) + 1), 128), nn.SiLU(), nn.Linear(128, 1))

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return what it sees at each level, (N, 32, 64, 64) to (N, 160, 8, 8)."""
        maps = []
        for level in self.levels:
            images = level(images)
            maps.append(images)
        return maps

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        return self._logits(self.maps(images))

    def _logits(self, maps: list[Tensor]) -> tuple[list[Tensor], Tensor, Tensor]:
        last, broken = maps[-1], self.broken(maps[PATCHED])
        windows = [self.place_logits(self.place(last[..., start : start + 4])) for start in (0, 2, 4)]
        things, colours = zip(*(row.split([THING_COUNT, COLOUR_COUNT], 1) for row in windows), strict=True)
        rest = self.rest_logits(self.rest(last)).split(REST_COUNTS, 1)
        pooled = [pool for seen in (*maps, broken) for pool in (seen.mean((2, 3)), seen.amax((2, 3)))]
        return [*things, *colours, *rest], self.whole(torch.cat(pooled, 1))[:, 0], broken

    @torch.inference_mode()
    def look(self, images: Images) -> Seen:
        """Look at uint8 (N, H, W, 3) or PIL images of one size."""
        labels, whole, features = [], [], []
        for start in range(0, len(images), READ_AT_ONCE):
            x = to_tensor(np.stack([np.asarray(image) for image in images[start : start + READ_AT_ONCE]]))
            maps = self.maps(F.interpolate(x, (INPUT_PX, INPUT_PX), mode="bilinear", antialias=True))
            rows, looks, _ = self._logits(maps)
            labels.append(torch.stack([row.argmax(1) for row in rows], 1))
            whole.append(looks > 0)
            features.append(F.adaptive_avg_pool2d(maps[-1], 4).flatten(1).double())
        return Seen(torch.cat(labels).numpy(), torch.cat(whole).numpy(), torch.cat(features).numpy())


def load_judge(weights: Path) -> Judge:
    """Load the frozen judge out of the miniature's weights, in fp32 on the CPU."""
    judge = Judge()
    judge.load_state_dict({key: value.float() for key, value in load_file(weights / FILE).items()})
    return judge.eval().requires_grad_(False)


def right_attributes(
    labels: npt.NDArray[np.int64], scenes: Sequence[Scene], said: Sequence[Said]
) -> dict[str, npt.NDArray[np.bool_]]:
    """Return for each attribute whether the images are right in it, bool (N,), by `labels` read from them.

    What was `said` of a scene counts: position, ground, backdrop and sky where they are named; things and
    their colours always, wherever they stand, for a colour that is not said is the thing's own.
    """
    asked = np.array([scene.labels for scene in scenes])
    named = {name: np.array([name in one.attributes for one in said]) for name in ATTRIBUTES}
    things, colours = slice(0, PLACE_COUNT), slice(PLACE_COUNT, 2 * PLACE_COUNT)

    def standing(rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Each thing with its colour, in an order that places have no part in."""
        return np.sort(rows[:, things] * 100 + rows[:, colours], 1)

    right = {
        "things": (np.sort(labels[:, things], 1) == np.sort(asked[:, things], 1)).all(1),
        "colours": (standing(labels) == standing(asked)).all(1),
        "position": (labels[:, things] == asked[:, things]).all(1) | ~named["position"],
    }
    rest = zip(REST, labels.T[2 * PLACE_COUNT :], asked.T[2 * PLACE_COUNT :], strict=True)
    return right | {name: (seen == meant) | ~named[name] for name, seen, meant in rest}


def labels_in_any_hand(scenes: Sequence[Scene], seed: int) -> Tensor:
    """Return the labels of `draw_in_any_hand`'s images of `scenes` from `seed` on, (N, 9): ink has no
    colours, and whoever cannot read them must not guess."""
    labels = torch.tensor([scene.labels for scene in scenes])
    ink = torch.tensor([hand_of(seed + i)[0] == "ink" for i in range(len(scenes))])
    labels[ink, PLACE_COUNT : 2 * PLACE_COUNT] = UNREAD
    return labels


def train_judge(
    whole: Pixels, broken: Pixels, labels: Tensor, steps: int, checkpoints: Path, device: torch.device
) -> Judge:
    """Train on pairs of a `whole` drawing and a `broken` one of the same scene and seed, as decoders leave
    them: on what the whole one shows, `labels`, (N, 9), on which is which, and on where they differ. None is
    mirrored, since a thing that looks to the other side is not one that the world has."""
    torch.manual_seed(1)
    judge, labels = Judge().to(device), labels.to(device)

    def loss(step: int, share: Shard) -> Tensor:
        generator = step_generator(1, step)
        pairs = torch.randint(len(labels), (PAIRS,), generator=generator).sort().values
        x = torch.cat([to_tensor(images[pairs.numpy()]) for images in (whole, broken)])
        shown = labels[pairs.to(device)]
        apart = F.avg_pool2d((x[:PAIRS] - x[PAIRS:]).abs().mean(1, keepdim=True), PATCH_PX) > APART
        x = soften(x, generator).to(device, memory_format=torch.channels_last)
        with autocast(device):
            rows, looks, patches = judge(x)
        # What is UNREAD is -100, which cross_entropy leaves out.
        losses = [
            F.cross_entropy(row[:PAIRS].float(), target, label_smoothing=0.02)
            for row, target in zip(rows, shown.T, strict=True)
        ]
        broken_at = torch.cat([torch.zeros_like(apart), apart]).float().to(device)
        where = F.binary_cross_entropy_with_logits(patches.float(), broken_at)
        looks_whole = (broken_at.sum((1, 2, 3)) < ENOUGH).float()
        which = F.binary_cross_entropy_with_logits(looks.float(), 0.02 + 0.96 * looks_whole)
        return torch.stack(losses).sum() + LOOKS_WEIGHT * (which + where)

    schedule = Schedule(steps, lr=1.5e-3, batch=2 * PAIRS, ema_decay=0.99, muon=True, checkpoint_every=100)
    optimise("judge", judge, loss, schedule, checkpoints)
    judge.float().cpu().eval().requires_grad_(False)
    return judge


def soften(x: Tensor, generator: torch.Generator) -> Tensor:
    """Do to (N, 3, H, W) what leaves it whole: reduce it to half its size and back, or the reverse,
    bend it by a hundredth, change contrast and colours a little, add faint grain."""

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand((len(x), 1, 1, 1), generator=generator) * (high - low) + low

    def waves(channels: int, cells: int, shape: torch.Size) -> Tensor:
        drawn = torch.randn((len(x), channels, cells, cells), generator=generator)
        return F.interpolate(drawn, shape, mode="bilinear", align_corners=True)

    small = F.interpolate(F.interpolate(x, scale_factor=0.5, mode="area"), x.shape[2:], mode="bilinear")
    x = torch.lerp(x, small, uniform(-0.3, 1.0))  # below zero sharpens
    grid = F.affine_grid(torch.eye(2, 3)[None], [1, *x.shape[1:]], align_corners=False)
    bend = uniform(0, 0.012) * waves(2, 6, x.shape[2:])
    x = F.grid_sample(x, grid + bend.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)
    x.mul_(uniform(0.9, 1.1)).add_(0.04 * torch.randn((len(x), 3, 1, 1), generator=generator))
    x.add_(uniform(0, 0.05) * waves(3, 12, x.shape[2:]))
    grain = torch.randn((len(x), 1, *x.shape[2:]), generator=generator)
    return x.add_(grain.mul_(uniform(0, 0.04))).clamp_(-1, 1)
