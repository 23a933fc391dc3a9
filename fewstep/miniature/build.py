"""The stages of the miniature's training, from drawings to a folder of weights, each of which begins from
what the one before has left there; see scripts/build-miniature."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from fewstep.errors import TrainingError
from fewstep.miniature.base import (
    BatchSampler,
    LatentSet,
    Miniature,
    make_scheduler,
    make_tokenizer,
    train_base,
    train_text,
)
from fewstep.miniature.judge import FILE, labels_in_any_hand, train_judge
from fewstep.miniature.scoring import score_weights, write_card
from fewstep.miniature.vae import encode, make_vae, sharpen_decoder, train_tiny_vae, train_vae
from fewstep.miniature.vocabulary import write_vocabulary
from fewstep.miniature.world.breaking import draw_broken, draw_in_any_hand
from fewstep.miniature.world.dataset import Draw, Pixels, cached_images
from fewstep.miniature.world.drawing import draw
from fewstep.miniature.world.restyling import STYLES
from fewstep.miniature.world.scenes import Scene, draw_scenes
from fewstep.models.sources import LCM_LORA, TINY_VAE
from fewstep.training import distill
from fewstep.training.config import preset
from fewstep.training.consistency import NoiseSchedule
from fewstep.training.export import save_lora
from fewstep.training.trainer import Schedule, optimise

logger = logging.getLogger(__name__)

SMALL, LARGE = 128, 256  # px, of squares; the miniature's own size is the large one
# SDXL's other training shapes, an eighth of their size.
OTHER_SHAPES = ((144, 112), (112, 144), (152, 104), (104, 152), (168, 96), (96, 168), (192, 80), (80, 192))
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
PARTS = ("text_encoder/model", "text_encoder_2/model", "unet/diffusion_pytorch_model")
LORA = preset("miniature", "lora")
JUDGE_SEED = 300_000_000  # of its drawings, and so of the hands that they are in


@dataclass(frozen=True)
class BaseStage:
    """One stage of the base's training: on squares of which side in px, how long, and at what rate."""

    side: int
    steps: int
    batch: int
    images: int  # squares
    others: int = 300  # of each other shape
    lr: float = 1e-3
    flat: float = 1.0  # share of the steps before the rate falls


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    vae_images: int = 5_000
    vae_steps: int = 10_000
    judge_images: int = 10_000  # whole, and as many broken
    judge_steps: int = 3_000
    text_steps: int = 700
    base: tuple[BaseStage, ...] = (
        BaseStage(SMALL, 1_600, 64, 22_000),
        BaseStage(SMALL, 800, 64, 32_000),
        BaseStage(LARGE, 1_380, 16, 9_000, 200, lr=5e-4, flat=0.72),
        BaseStage(LARGE, 3_800, 48, 20_000, 400, lr=8e-4, flat=0.21),
        BaseStage(LARGE, 1_750, 48, 12_000, 300, lr=6e-4, flat=0.3),
    )
    sharp_steps: int = 900
    lora_images: int = 4_000  # squares of each size, for the tiny VAE, too
    lora_steps: int = LORA.schedule.steps
    lora_batch: int = LORA.schedule.batch
    style_images: int = 1_500  # of each, of each size
    style_steps: int = 600
    style_batch: int = 32
    tiny_vae_steps: int = 2_000
    captions: int = 600  # to score by
    base_captions: int = 300  # those that the base's own samplers are asked for


class Build:
    """The stages by name, each a method that trains and writes into `weights`, or into `styles`; drawings,
    latents and checkpoints are kept in `work`, where an interrupted stage goes on."""

    def __init__(self, weights: Path, styles: Path, work: Path, sizes: Sizes, device: torch.device) -> None:
        self.weights, self.styles, self.work, self.sizes, self.device = weights, styles, work, sizes, device
        base = {f"base-{i + 1}": partial(self.train_base, i) for i in range(len(sizes.base))}
        self.stages: dict[str, Callable[[], None]] = {
            "vae": self.train_vae,
            "judge": self.train_judge,
            **base,
            "decoder": self.sharpen_decoder,
            "lora": self.train_lora,
            "styles": self.train_styles,
            "tiny-vae": self.train_tiny_vae,
            "scores": self.score,
        }

    def run(self, names: Sequence[str]) -> None:
        """Run the stages in `names`, in their own order."""
        for name, stage in self.stages.items():
            if name in names:
                logger.info("stage %s", name)
                stage()

    def vae(self) -> AutoencoderKL:
        """Return the VAE that a stage has left, or a new one, in fp32."""
        folder = self.weights / "vae"
        vae = AutoencoderKL.from_pretrained(folder) if folder.exists() else make_vae()
        vae.register_to_config(_name_or_path="")  # this machine's folder is nobody else's concern
        return vae.float().to(self.device, memory_format=torch.channels_last)

    def train_vae(self) -> None:
        """Train the VAE, or take it further."""
        vae, steps = self.vae(), self.sizes.vae_steps
        schedule = Schedule(
            steps, lr=1.5e-3, batch=16, warmup=100, weight_decay=1e-4, muon=True, checkpoint_every=200
        )
        train_vae(vae, self._vae_images(), schedule, self.work / "vae")
        vae.half().save_pretrained(self.weights / "vae")

    def sharpen_decoder(self) -> None:
        """Sharpen the VAE's decoder; latents stay what they are."""
        vae, steps = self.vae(), self.sizes.sharp_steps
        schedule = Schedule(steps, lr=3e-4, batch=16, weight_decay=0.0)
        sharpen_decoder(vae, self._vae_images(), schedule, self.work / "decoder")
        vae.half().save_pretrained(self.weights / "vae")

    def _vae_images(self) -> Pixels:
        scenes = draw_scenes(self.sizes.vae_images, 1, new=True)
        return cached_images(self.work / "vae-images.npy", scenes, 20_000_000, LARGE, LARGE)

    def train_judge(self) -> None:
        """Train the judge on drawings of all the world, and freeze it."""
        sizes = self.sizes
        scenes = draw_scenes(sizes.judge_images, 30, reserved=None, new=True)
        whole, broken = (
            cached_images(self.work / f"{name}-images.npy", scenes, JUDGE_SEED, LARGE, LARGE, how)
            for name, how in (("whole", draw_in_any_hand), ("broken", draw_broken))
        )
        labels = labels_in_any_hand(scenes, JUDGE_SEED)
        judge = train_judge(whole, broken, labels, sizes.judge_steps, self.work / "judge", self.device)
        path = self.weights / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({key: value.half().contiguous() for key, value in judge.state_dict().items()}, path)

    def latents(self, number: int) -> list[LatentSet]:
        """Return scaled latents of what the base's stage `number` learns from, encoded once.

        Every stage sees new scenes. One at the large size sees those of the last small one in every fifth
        batch, so that both sizes stay known.
        """
        stages, sets = self.sizes.base, list[LatentSet]()
        small = [i for i in range(number) if stages[i].side == SMALL != stages[number].side]
        for which, share in ((number, 1.0), *((i, 0.25) for i in small[-1:])):
            stage = stages[which]
            sets += self._shapes(which + 1, stage.side, stage.images, stage.others, share)
        return sets

    def lora_latents(self) -> list[LatentSet]:
        """Return scaled latents of new scenes, as many at the small size as at the large one."""
        images = self.sizes.lora_images
        return [
            one
            for i, side in enumerate((SMALL, LARGE))
            for one in self._shapes(8 + i, side, images, max(1, images // 40), 0.5)
        ]

    def _shapes(self, number: int, side: int, squares: int, others: int, share: float) -> list[LatentSet]:
        """Return latents of squares and of each other shape, about `side` px."""
        sets = []
        for i, shape in enumerate(((SMALL, SMALL), *OTHER_SHAPES)):
            size = side // SMALL * shape[0], side // SMALL * shape[1]
            scenes = draw_scenes(others if i else squares, 100 * number + i)
            seed = 10_000_000 * number + 1_000_000 * i
            latents = self._encoded(f"{number}", scenes, seed, size)
            sets.append(LatentSet(latents, scenes, share * (0.15 / len(OTHER_SHAPES) if i else 0.85)))
        return sets

    def _encoded(
        self, name: str, scenes: list[Scene], seed: int, size: tuple[int, int], how: Draw = draw
    ) -> Tensor:
        name = f"{name}-{size[0]}x{size[1]}"
        path, images = (self.work / f"{kind}-{name}" for kind in ("latents", "images"))
        path, images = path.with_suffix(".safetensors"), images.with_suffix(".npy")
        if not path.exists():
            vae = self.vae().eval().requires_grad_(False)
            latents = encode(vae, cached_images(images, scenes, seed, *size, how))
            latents = (latents * vae.config.scaling_factor).half().contiguous()
            save_file({"latents": latents}, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
            images.unlink()
        latents = load_file(path)["latents"]
        if len(latents) != len(scenes):
            raise TrainingError(f"{path} is of other sizes; remove it")
        return latents

    def base(self) -> Miniature:
        """Return the base that a stage has left, or a new one, in fp32."""
        torch.manual_seed(3)
        tokenizer = self.weights / "tokenizer"
        if not tokenizer.exists():
            return Miniature(make_tokenizer(self.work / "tokenizer")).to(self.device)
        base = Miniature(CLIPTokenizer.from_pretrained(tokenizer)).to(self.device)
        for file in PARTS:
            state = {k: value.float() for k, value in load_file(self.weights / f"{file}.safetensors").items()}
            base.get_submodule(file.split("/")[0]).load_state_dict(state)
        return base

    def train_base(self, number: int) -> None:
        """Take the base through one of its stages, the first of which teaches it to read before."""
        stage, sets, base = self.sizes.base[number], self.latents(number), self.base()
        if number == 0:
            train_text(base, self.sizes.text_steps, self.work / "text")
        sampler = BatchSampler(base.train().requires_grad_(True), sets, stage.batch, seed=41 + number)
        schedule = Schedule(
            stage.steps,
            lr=stage.lr,
            batch=stage.batch,
            warmup=100,
            ema_decay=0.998,
            flat=stage.flat,
            muon=True,
            checkpoint_every=200,
        )
        train_base(base, sampler, schedule, self.work / f"base-{number + 1}")
        self._save_base(base)

    def _save_base(self, base: Miniature) -> None:
        """Write the diffusers folder, in fp16, with CLIP's tokenizer files as SDXL has them."""
        # A later stage's tokenizer is the first one's, whatever may have joined the world since.
        source = Path(base.tokenizer.name_or_path)
        files = {name: (source / name).read_bytes() for name in TOKENIZER_FILES}
        diffusion = StableDiffusionXLPipeline(
            vae=self.vae(),
            text_encoder=base.text_encoder,
            text_encoder_2=base.text_encoder_2,
            tokenizer=base.tokenizer,
            tokenizer_2=base.tokenizer,
            unet=base.unet,
            scheduler=make_scheduler(),
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        )
        diffusion.to(torch.float16).save_pretrained(self.weights)
        write_vocabulary(self.weights)
        for folder in (self.weights / "tokenizer", self.weights / "tokenizer_2"):
            shutil.rmtree(folder)
            folder.mkdir()
            for name, content in files.items():
                (folder / name).write_bytes(content)

    def _teacher(self) -> Miniature:
        base = self.base().eval().requires_grad_(False)
        distill.order_for_training(base.unet)
        return base

    def train_lora(self) -> None:
        """Distil the base into its LCM-LoRA."""
        base, student = self._teacher(), _student()
        torch.manual_seed(6)
        distill.add_lora(base.unet, student)
        sampler = BatchSampler(base, self.lora_latents(), self.sizes.lora_batch, seed=7)
        batches, noise_schedule = torch.no_grad()(sampler), NoiseSchedule.of(make_scheduler(), self.device)
        roles = distill.lora_roles(base.unet)
        loss = distill.consistency_training(roles, batches, noise_schedule, student, seed=5)
        schedule = replace(LORA.schedule, steps=self.sizes.lora_steps, batch=sampler.batch)
        optimise("LCM-LoRA", base.unet, loss, schedule, self.work / "lora")
        save_lora(base.unet, self.weights / LCM_LORA)

    def train_styles(self) -> None:
        """Train one LoRA over the base for each style of the drawn world."""
        noise_schedule = NoiseSchedule.of(make_scheduler(), self.device)
        steps, batch = self.sizes.style_steps, self.sizes.style_batch
        schedule = Schedule(steps, lr=1e-3, batch=batch, weight_decay=0.0, ema_decay=0.98)
        for i, (name, style) in enumerate(STYLES.items()):
            base, sets = self._teacher(), list[LatentSet]()
            torch.manual_seed(8)
            distill.add_lora(base.unet, distill.StyleStudent())
            for side in (SMALL, LARGE):
                scenes = draw_scenes(self.sizes.style_images, 2000 + 10 * i + side // SMALL)
                latents = self._encoded(f"style-{name}", scenes, 400_000_000, (side, side), style.draw)
                sets.append(LatentSet(latents, scenes, 0.5))
            sampler = BatchSampler(base, sets, batch, seed=9)
            loss = distill.style_training(base.unet, torch.no_grad()(sampler), noise_schedule, seed=6)
            optimise(name, base.unet, loss, schedule, self.work / f"style-{name}")
            save_lora(base.unet, self.styles / f"{name}.safetensors")

    def train_tiny_vae(self) -> None:
        """Distil the VAE's decoder into the tiny one."""
        vae = self.vae().eval().requires_grad_(False)
        latents = [part.latents for part in self.lora_latents()]
        steps, checkpoints = self.sizes.tiny_vae_steps, self.work / "tiny-vae"
        tiny = train_tiny_vae(vae, latents, steps, checkpoints, self.device)
        tiny.half().save_pretrained(self.weights / TINY_VAE)

    def score(self) -> None:
        """Judge all ways to sample, and write the card and the manifest."""
        sizes = asdict(self.sizes)
        write_card(self.weights, sizes, _student(), [])  # scoring loads the weights through their manifest
        scores = score_weights(self.weights, self.sizes.captions, self.sizes.base_captions)
        write_card(self.weights, sizes, _student(), scores)


def _student() -> distill.LoraStudent:
    assert isinstance(LORA.student, distill.LoraStudent)
    return LORA.student
