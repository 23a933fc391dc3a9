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
BATCH, WHOLE_WEIGHT = 96, 3.0  # in training
WIDTHS = (16, 32, 64, 128, 160)  # channels, at 128 x 128, 64 x 64 ... 8 x 8
FINE = 2  # the level of 32 x 32, where edges and grain are still seen


@dataclass(frozen=True)
class Seen:
    """What the judge sees in N images: `labels`, (N, 9), as `Scene.labels` has them; which look `whole`,
    bool (N,); and the `features` that distances compare, (N, 16 x 160), of what is where."""

    labels: npt.NDArray[np.int64]
    whole: npt.NDArray[np.bool_]
    features: npt.NDArray[np.float64]


class Judge(nn.Module):
    """(N, 3, 256, 256) in [-1, 1] -> a row of logits for each of a scene's labels, and one number (N,), above
    0 for what looks whole.

    The labels are what stands on the left, in the middle and on the right, in which colours, and ground,
    backdrop and sky. Whether it looks whole it decides by the mean and the maximum of all places, since what
    is broken may be so in one, of a fine level and of the last.
    """

    def __init__(self) -> None:
        super().__init__()
        self.levels = nn.ModuleList()
        for channels, out in zip((3, *WIDTHS), WIDTHS, strict=False):
            layers: list[nn.Module] = []
            for inner, stride in ((channels, 2), (out, 1)):
                layers += [nn.Conv2d(inner, out, 3, stride, 1), nn.GroupNorm(8, out), nn.SiLU()]
            self.levels.append(nn.Sequential(*layers))
        last = WIDTHS[-1]
        self.place = nn.Sequential(nn.Flatten(), nn.Linear(last * 8 * 4, 128), nn.SiLU())
        self.place_logits = nn.Linear(128, THING_COUNT + COLOUR_COUNT)
        self.rest = nn.Sequential(
            nn.AdaptiveAvgPool2d((8, 4)), nn.Flatten(), nn.Linear(last * 8 * 4, 128), nn.SiLU()
        )
        self.rest_logits = nn.Linear(128, sum(REST_COUNTS))
        self.whole = nn.Sequential(nn.Linear(2 * (WIDTHS[FINE] + last), 128), nn.SiLU(), nn.Linear(128, 1))

    def maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return what it sees at the fine level and at the last, (N, 64, 32, 32) and (N, 160, 8, 8)."""
        maps = []
        for level in self.levels:
            images = level(images)
            maps.append(images)
        return maps[FINE], maps[-1]

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        return self._logits(*self.maps(images))

    def _logits(self, fine: Tensor, last: Tensor) -> tuple[list[Tensor], Tensor]:
        windows = [self.place_logits(self.place(last[..., start : start + 4])) for start in (0, 2, 4)]
        things, colours = zip(*(row.split([THING_COUNT, COLOUR_COUNT], 1) for row in windows), strict=True)
        rest = self.rest_logits(self.rest(last)).split(REST_COUNTS, 1)
        pooled = [pool for seen in (fine, last) for pool in (seen.mean((2, 3)), seen.amax((2, 3)))]
        return [*things, *colours, *rest], self.whole(torch.cat(pooled, 1))[:, 0]

    @torch.inference_mode()
    def look(self, images: Images) -> Seen:
        """Look at uint8 (N, H, W, 3) or PIL images of one size."""
        labels, whole, features = [], [], []
        for start in range(0, len(images), READ_AT_ONCE):
            x = to_tensor(np.stack([np.asarray(image) for image in images[start : start + READ_AT_ONCE]]))
            fine, last = self.maps(F.interpolate(x, (INPUT_PX, INPUT_PX), mode="bilinear", antialias=True))
            rows, looks = self._logits(fine, last)
            labels.append(torch.stack([row.argmax(1) for row in rows], 1))
            whole.append(looks > 0)
            features.append(F.adaptive_avg_pool2d(last, 4).flatten(1).double())
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
    """Train on `whole` drawings and `broken` ones, image by image of the same scene and seed, and on what
    both show, `labels`, (N, 9). A batch has a third of either, as decoders leave them, and a third of whole
    ones that are damaged more, from which it only learns to read."""
    torch.manual_seed(1)
    judge, labels = Judge().to(device, memory_format=torch.channels_last), labels.to(device)
    third = BATCH // 3
    looks_whole = torch.tensor([1.0] * third + [0.0] * third, device=device)

    def loss(step: int, share: Shard) -> Tensor:
        generator = step_generator(1, step)
        index = torch.randint(len(labels), (2 * third,), generator=generator).sort().values
        pair, more = index[::2], index[1::2]
        drawn, spoilt, damaged = (
            to_tensor(images[rows.numpy()]) for images, rows in ((whole, pair), (broken, pair), (whole, more))
        )
        x = torch.cat([soften(torch.cat([drawn, spoilt]), generator), augment(damaged, generator)])
        with autocast(device):
            rows, looks = judge(x.to(device, memory_format=torch.channels_last))
        read = torch.cat([torch.arange(third), torch.arange(2 * third, BATCH)]).to(device)
        targets = labels[torch.cat([pair, more]).to(device)].T
        # What is UNREAD is -100, which cross_entropy leaves out.
        losses = [
            F.cross_entropy(row[read].float(), target, label_smoothing=0.02)
            for row, target in zip(rows, targets, strict=True)
        ]
        whole_loss = F.binary_cross_entropy_with_logits(looks[: 2 * third].float(), 0.02 + 0.96 * looks_whole)
        return torch.stack(losses).sum() + WHOLE_WEIGHT * whole_loss

    schedule = Schedule(steps, lr=1.5e-3, batch=BATCH, ema_decay=0.99, muon=True, checkpoint_every=200)
    optimise("judge", judge, loss, schedule, checkpoints)
    return judge.float().cpu().eval().requires_grad_(False)


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
