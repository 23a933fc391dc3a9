"""The next miniature's training, in stages that each begin from what the last one left in
`weights/miniature-next`: python -m fewstep.miniature.next_build STAGE

It takes the place of `build` when its weights take the place of today's.
"""

from __future__ import annotations

import argparse
import logging
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
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
from fewstep.miniature.next_world.drawing import draw
from fewstep.miniature.next_world.scenes import NextScene, draw_scenes
from fewstep.miniature.vae import encode, reconstruction_loss
from fewstep.miniature.world.dataset import Pixels, to_tensor
from fewstep.models.device import autocast
from fewstep.training.trainer import Schedule, Shard, optimise, step_generator

logger = logging.getLogger(__name__)

WEIGHTS, START = Path("weights/miniature-next"), Path("weights/miniature")
CPU = torch.device("cpu")
SQUARE = (128, 128)
# SDXL's other training shapes, an eighth of their size: seen in every seventh batch.
OTHER_SHAPES = ((144, 112), (112, 144), (152, 104), (104, 152), (168, 96), (96, 168), (192, 80), (80, 192))


def draw_many(scenes: list[NextScene], seed: int, width: int, height: int) -> Pixels:
    """Return images of `scenes`, uint8 (N, height, width, 3); image i is drawn with seed `seed + i`."""
    return np.stack([np.asarray(draw(scene, seed + i, width, height)) for i, scene in enumerate(scenes)])


def cached_images(path: Path, scenes: list[NextScene], seed: int, width: int, height: int) -> Pixels:
    """Return `draw_many` by all cores, kept in the .npy file `path` and memory-mapped from there."""
    if not path.exists():
        logger.info("drawing %d pictures of %d x %d", len(scenes), width, height)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npy")
        out = np.lib.format.open_memmap(part, "w+", np.uint8, (len(scenes), height, width, 3))
        starts = range(0, len(scenes), 256)
        with ProcessPoolExecutor() as pool:
            jobs = [pool.submit(draw_many, scenes[s : s + 256], seed + s, width, height) for s in starts]
            for start, job in zip(starts, jobs, strict=True):
                out[start : start + 256] = job.result()
        out.flush()
        part.replace(path)
    return np.load(path, mmap_mode="r")  # type: ignore[no-any-return]


def train_vae(work: Path, images: int = 5000, steps: int = 1200, crop: int = 64, batch: int = 16) -> None:
    """Go on with today's VAE on crops of the new world's drawings at 256 px."""
    scenes = draw_scenes(images, 1, new=True)
    pictures = cached_images(work / "vae-pictures.npy", scenes, 20_000_000, 256, 256)
    vae = AutoencoderKL.from_pretrained(START / "vae").float().to(memory_format=torch.channels_last)
    vae.train().requires_grad_(True)

    def loss(step: int, share: Shard) -> Tensor:
        generator = step_generator(2, step)
        index = torch.randint(len(pictures), (batch,), generator=generator)
        corners = torch.randint(256 - crop + 1, (batch, 2), generator=generator)
        places = zip(index.tolist(), corners.tolist(), strict=True)
        crops = np.stack([pictures[i, y : y + crop, x : x + crop] for i, (y, x) in places])
        x = to_tensor(crops).to(memory_format=torch.channels_last)
        with autocast(CPU):
            posterior = vae.encode(x).latent_dist
            generated = vae.decode(posterior.sample()).sample
        kl: Tensor = posterior.kl().mean() / (crop // 8) ** 2  # per latent pixel
        return reconstruction_loss(generated.float(), x) + 1e-4 * kl

    schedule = Schedule(steps, lr=1.5e-3, warmup=100, batch=batch, weight_decay=1e-4, checkpoint_every=200)
    optimise("VAE", vae, loss, schedule, work / "vae")
    vae.eval().requires_grad_(False)
    vae.register_to_config(scaling_factor=float(1.0 / encode(vae, pictures[:512]).std()))
    vae.half().save_pretrained(WEIGHTS / "vae")


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
    1: BaseStage(128, 2000, 64, 22_000),
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
        stage.steps, stage.lr, stage.batch, warmup=100, ema_decay=0.998, flat=stage.flat, checkpoint_every=200
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
    for folder, (name, content) in product(("tokenizer", "tokenizer_2"), files.items()):
        (WEIGHTS / folder / name).write_bytes(content)


def main() -> None:
    """Run one stage: vae, or a number of the base's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=("vae", *map(str, STAGES)))
    parser.add_argument("--work", type=Path, default=Path("build/next"))
    chosen = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if chosen.stage == "vae":
        train_vae(chosen.work)
    else:
        train_stage(int(chosen.stage), chosen.work)


if __name__ == "__main__":
    main()
