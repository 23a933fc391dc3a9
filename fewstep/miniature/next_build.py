"""The next miniature's training, in stages that each begin from what the last one left in
`weights/miniature-next`: python -m fewstep.miniature.next_build STAGE

It takes the place of `build` when its weights take the place of today's.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from fewstep.miniature.next_base import (
    NextBatchSampler,
    NextLatentSet,
    NextMiniature,
    make_scheduler,
    make_tokenizer,
    train_base,
    train_text,
)
from fewstep.miniature.next_judge import FILE, NextJudge, train_looks, train_reader
from fewstep.miniature.next_vae import sharpen_decoder, train_vae
from fewstep.miniature.next_world.breaking import draw_broken, draw_in_any_hand
from fewstep.miniature.next_world.drawing import draw
from fewstep.miniature.next_world.scenes import NextScene, draw_scenes
from fewstep.miniature.vae import encode
from fewstep.miniature.world.dataset import Pixels
from fewstep.training.trainer import Schedule

logger = logging.getLogger(__name__)

WEIGHTS, START = Path("weights/miniature-next"), Path("weights/miniature")
CPU = torch.device("cpu")
SQUARE = (128, 128)
# SDXL's other training shapes, an eighth of their size: seen in every seventh batch.
OTHER_SHAPES = ((144, 112), (112, 144), (152, 104), (104, 152), (168, 96), (96, 168), (192, 80), (80, 192))


Draw: TypeAlias = Callable[[NextScene, int, int, int], Image.Image]


def draw_many(scenes: list[NextScene], seed: int, width: int, height: int, how: Draw = draw) -> Pixels:
    """Return images of `scenes`, uint8 (N, height, width, 3); image i is drawn with seed `seed + i`."""
    return np.stack([np.asarray(how(scene, seed + i, width, height)) for i, scene in enumerate(scenes)])


def cached_images(
    path: Path, scenes: list[NextScene], seed: int, width: int, height: int, how: Draw = draw
) -> Pixels:
    """Return `draw_many` by all cores, kept in the .npy file `path` and memory-mapped from there."""
    if not path.exists():
        logger.info("drawing %d pictures of %d x %d", len(scenes), width, height)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npy")
        out = np.lib.format.open_memmap(part, "w+", np.uint8, (len(scenes), height, width, 3))
        starts = range(0, len(scenes), 256)
        with ProcessPoolExecutor() as pool:
            jobs = [pool.submit(draw_many, scenes[s : s + 256], seed + s, width, height, how) for s in starts]
            for start, job in zip(starts, jobs, strict=True):
                out[start : start + 256] = job.result()
        out.flush()
        part.replace(path)
    return np.load(path, mmap_mode="r")  # type: ignore[no-any-return]


def build_vae(work: Path, images: int = 5000) -> None:
    """Take the VAE further: today's at first, then what an earlier stage has left."""
    pictures = cached_images(
        work / "vae-pictures.npy", draw_scenes(images, 1, new=True), 20_000_000, 256, 256
    )
    folder = WEIGHTS / "vae" if (WEIGHTS / "vae").exists() else START / "vae"
    vae = AutoencoderKL.from_pretrained(folder).float().to(memory_format=torch.channels_last)
    schedule = Schedule(1200, lr=1.5e-3, warmup=100, batch=16, weight_decay=1e-4, checkpoint_every=200)
    train_vae(vae, pictures, schedule, work / "vae")
    vae.half().save_pretrained(WEIGHTS / "vae")


def build_sharp_decoder(work: Path, images: int = 5000) -> None:
    """Sharpen the VAE's decoder, once latents are to stay what they are."""
    pictures = cached_images(
        work / "vae-pictures.npy", draw_scenes(images, 1, new=True), 20_000_000, 256, 256
    )
    vae = AutoencoderKL.from_pretrained(WEIGHTS / "vae").float().to(memory_format=torch.channels_last)
    schedule = Schedule(900, lr=3e-4, warmup=50, batch=16, weight_decay=0.0, checkpoint_every=200)
    sharpen_decoder(vae, pictures, schedule, work / "sharp")
    vae.half().save_pretrained(WEIGHTS / "vae")


def train_judge(work: Path, steps: tuple[int, int] = (1100, 900)) -> None:
    """Train both networks of the judge on drawings of all the world, and freeze them."""
    scenes = draw_scenes(24_000, 7, reserved=None, new=True)
    read = cached_images(work / "read-pictures.npy", scenes, 300_000_000, *SQUARE)
    others = draw_scenes(5_000, 8, reserved=None, new=True)
    whole = cached_images(work / "whole-pictures.npy", others, 310_000_000, 256, 256, draw_in_any_hand)
    spoilt = draw_scenes(7_000, 9, reserved=None, new=True)
    broken = cached_images(work / "broken-pictures.npy", spoilt, 320_000_000, 256, 256, draw_broken)
    judge = NextJudge()
    judge.reader = train_reader(read, scenes, steps[0], work / "reader")
    judge.looks = train_looks(whole, broken, steps[1], work / "looks")
    path = WEIGHTS / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.half().contiguous() for key, value in judge.state_dict().items()}, path)


@dataclass(frozen=True)
class BaseStage:
    """One stage of the base's training: on which sides, how long, at what rate."""

    side: int  # px, of the squares; other shapes have their area
    steps: int
    batch: int
    images: int
    lr: float = 1e-3
    flat: float = 1.0
    others: int = 300  # images of each other shape


# A stage's number is the seed of its scenes, so that every stage sees new ones.
STAGES = {
    1: BaseStage(128, 1600, 64, 22_000),
}


def latent_sets(stage: BaseStage, number: int, vae: AutoencoderKL, work: Path) -> list[NextLatentSet]:
    """Return scaled latents of drawn scenes, square ones first, encoded once."""
    sets, scale = [], stage.side // 128
    for i, shape in enumerate((SQUARE, *OTHER_SHAPES)):
        width, height = (side * scale for side in shape)
        scenes = draw_scenes(stage.others if i else stage.images, 100 * number + i)
        name = f"{number}-{width}x{height}"
        path = work / f"latents-{name}.safetensors"
        if not path.exists():
            pictures = work / f"pictures-{name}.npy"
            drawn = cached_images(pictures, scenes, 10_000_000 * number + 1_000_000 * i, width, height)
            latents = encode(vae, drawn) * vae.config.scaling_factor
            save_file({"latents": latents.half().contiguous()}, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
            pictures.unlink()
        sets.append(NextLatentSet(load_file(path)["latents"], scenes))
    return sets


TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
PARTS = ("text_encoder/model", "text_encoder_2/model", "unet/diffusion_pytorch_model")


def train_stage(number: int, work: Path) -> None:
    """Go on with the base, or begin it, and leave its average in `weights/miniature-next`."""
    stage = STAGES[number]
    vae = AutoencoderKL.from_pretrained(WEIGHTS / "vae").float().eval().requires_grad_(False)
    sets = latent_sets(stage, number, vae, work)
    torch.manual_seed(3)
    if number == 1:
        base = NextMiniature(make_tokenizer(work / "tokenizer"))
        train_text(base, 700, work / "text")
    else:
        base = NextMiniature(CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer"))
        load_parts(base)
    base.train().requires_grad_(True)
    sampler = NextBatchSampler(base, sets, stage.batch, seed=40 + number)
    schedule = Schedule(
        stage.steps,
        stage.lr,
        stage.batch,
        warmup=100,
        ema_decay=0.998,
        flat=stage.flat,
        muon=True,
        checkpoint_every=200,
    )
    train_base(base, sampler, schedule, work / f"base-{number}")
    save_base(base, vae)


def load_parts(base: NextMiniature) -> None:
    """Load what the stage before has left."""
    for file in PARTS:
        state = {k: value.float() for k, value in load_file(WEIGHTS / f"{file}.safetensors").items()}
        base.get_submodule(file.split("/")[0]).load_state_dict(state)


def save_base(base: NextMiniature, vae: AutoencoderKL) -> None:
    """Write the diffusers folder, in fp16, with CLIP's tokenizer files as SDXL has them."""
    diffusion = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=base.text_encoder,
        text_encoder_2=base.text_encoder_2,
        tokenizer=base.tokenizer,
        tokenizer_2=base.tokenizer,
        unet=base.unet,
        scheduler=make_scheduler(),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    diffusion.to(torch.float16).save_pretrained(WEIGHTS)
    diffusion.to(torch.float32)  # its modules are ours
    # A stage's tokenizer is the first one's, whatever has joined the world since.
    source = Path(base.tokenizer.name_or_path)
    files = {name: (source / name).read_bytes() for name in TOKENIZER_FILES}
    for folder in ("tokenizer", "tokenizer_2"):
        shutil.rmtree(WEIGHTS / folder)
        (WEIGHTS / folder).mkdir()
        for name, content in files.items():
            (WEIGHTS / folder / name).write_bytes(content)


OTHER_STAGES: dict[str, Callable[[Path], None]] = {
    "vae": build_vae,
    "judge": train_judge,
    "sharp-decoder": build_sharp_decoder,
}


def main() -> None:
    """Run one stage, or one of the base's by its number."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=(*OTHER_STAGES, *map(str, STAGES)))
    parser.add_argument("--work", type=Path, default=Path("build/next"))
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if chosen.stage in OTHER_STAGES:
        OTHER_STAGES[chosen.stage](chosen.work)
    else:
        train_stage(int(chosen.stage), chosen.work)


if __name__ == "__main__":
    main()
