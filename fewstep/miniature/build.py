"""The stages of the miniature's training, from drawings to a scored folder of weights; see
scripts/build-miniature."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file

from fewstep.miniature import STAGES
from fewstep.miniature.base import (
    BatchSampler,
    LatentSet,
    Miniature,
    make_scheduler,
    make_tokenizer,
    train_base,
    train_text,
)
from fewstep.miniature.judge import FILE, Judge, load_judge, train_judge
from fewstep.miniature.scoring import score_all, write_card
from fewstep.miniature.vae import encode, train_tiny_vae, train_vae
from fewstep.miniature.world.dataset import Pixels, cached_images, pick_scenes
from fewstep.miniature.world.restyling import STYLES, draw_restyled
from fewstep.miniature.world.scenes import Scene, all_scenes, training_scenes
from fewstep.models.sources import TINY_VAE
from fewstep.training import distill
from fewstep.training.config import preset
from fewstep.training.consistency import NoiseSchedule
from fewstep.training.export import save_lora
from fewstep.training.trainer import Schedule, optimise

logger = logging.getLogger(__name__)

SQUARE = (128, 128)
# SDXL's other training shapes, an eighth of their size: seen in every seventh batch.
OTHER_SHAPES = ((144, 112), (112, 144), (152, 104), (104, 152), (168, 96), (96, 168), (192, 80), (80, 192))
LORA = preset("miniature", "lora")


@dataclass(frozen=True)
class Sizes:
    """How much of everything. A build's own sizes stand in its manifest and its card."""

    judge_images: int = 12_000
    judge_steps: int = 800
    vae_images: int = 12_000
    vae_steps: int = 7_600
    text_steps: int = 200
    base_images: int = 20_000
    other_images: int = 400  # of each other shape
    base_steps: int = 2_900
    base_batch: int = 64
    lora_steps: int = LORA.schedule.steps
    lora_batch: int = LORA.schedule.batch
    style_images: int = 1_500  # of each
    style_steps: int = 250
    style_batch: int = 32
    tiny_vae_steps: int = 2_000
    captions: int = 500
    seeds: int = 3


class Build:
    """One build: every stage is a property that trains on first use, or loads what an earlier build has
    left."""

    def __init__(
        self, weights: Path, work: Path, sizes: Sizes, device: torch.device, start: str = STAGES[0]
    ) -> None:
        self.weights, self.work, self.sizes, self.device = weights, work, sizes, device
        self.kept = STAGES[: STAGES.index(start)]

    @cached_property
    def judge(self) -> Judge:
        if "judge" not in self.kept:
            path = self.weights / FILE
            scenes = pick_scenes(all_scenes(), self.sizes.judge_images, seed=0)
            images = cached_images(self.work / "judge-pictures.npy", scenes, 0, *SQUARE)
            judge = train_judge(images, scenes, self.sizes.judge_steps, self.work / "judge", self.device)
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({key: value.half().contiguous() for key, value in judge.state_dict().items()}, path)
        return load_judge(self.weights)

    @cached_property
    def vae(self) -> AutoencoderKL:
        if "vae" not in self.kept:
            scenes = pick_scenes([s for s in all_scenes() if not s.reserved], self.sizes.vae_images, seed=1)
            images = cached_images(self.work / "vae-pictures.npy", scenes, 20_000_000, *SQUARE)
            vae = train_vae(images, self.sizes.vae_steps, self.work / "vae", self.device)
            vae.half().save_pretrained(self.weights / "vae")
        vae = AutoencoderKL.from_pretrained(self.weights / "vae").to(self.device)
        return vae.eval().requires_grad_(False)

    @cached_property
    def latents(self) -> list[LatentSet]:
        """What the base and the LoRA learn from: scaled latents of drawn scenes, square ones first."""
        sets = []
        for i, shape in enumerate((SQUARE, *OTHER_SHAPES)):
            count = self.sizes.other_images if i else self.sizes.base_images
            seed = 59_000_000 + 1_000_000 * i if i else 40_000_000
            name, scenes = f"{shape[0]}x{shape[1]}", pick_scenes(training_scenes(), count, seed=2 + i)
            cache = self.work / f"base-pictures-{name}.npy"
            sets.append(self._encoded(name, scenes, partial(cached_images, cache, scenes, seed, *shape)))
        return sets

    def _encoded(self, name: str, scenes: list[Scene], draw: Callable[[], Pixels]) -> LatentSet:
        path = self.work / f"latents-{name}.safetensors"
        if not path.exists():
            latents = encode(self.vae, draw()) * self.vae.config.scaling_factor
            save_file({"latents": latents.half().contiguous()}, path.with_suffix(".part"))
            path.with_suffix(".part").replace(path)
        return LatentSet(load_file(path)["latents"], scenes)

    @cached_property
    def base(self) -> Miniature:
        torch.manual_seed(3)
        tokenizer = make_tokenizer(self.work / "tokenizer")
        base = Miniature(tokenizer).to(self.device)
        if "base" not in self.kept:
            sampler = BatchSampler(base, self.latents, self.sizes.base_batch, seed=4)
            train_text(base, self.sizes.text_steps, self.work / "text")
            train_base(base, sampler, self.sizes.base_steps, self.work / "base")
            self._save_base(base)
        for file in ("text_encoder/model", "text_encoder_2/model", "unet/diffusion_pytorch_model"):
            state = {k: value.float() for k, value in load_file(self.weights / f"{file}.safetensors").items()}
            base.get_submodule(file.split("/")[0]).load_state_dict(state)
        return base.eval().requires_grad_(False)

    def _save_base(self, base: Miniature) -> None:
        """Write the diffusers folder, in fp16, with CLIP's tokenizer files as SDXL has them."""
        diffusion = StableDiffusionXLPipeline(
            vae=self.vae,
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
        diffusion.to(torch.float32)  # its modules are ours
        for name in ("tokenizer", "tokenizer_2"):
            shutil.rmtree(self.weights / name)
            make_tokenizer(self.weights / name)

    def train_lora(self, student: distill.LoraStudent) -> None:
        """Distil the base into weights/miniature/lcm_lora.safetensors."""
        torch.manual_seed(6)
        unet = self.base.unet
        distill.order_for_training(unet)
        distill.add_lora(unet, student)
        sampler = BatchSampler(self.base, self.latents, self.sizes.lora_batch, seed=7)
        batches, noise_schedule = torch.no_grad()(sampler), NoiseSchedule.of(make_scheduler(), self.device)
        loss = distill.consistency_training(
            distill.lora_roles(unet), batches, noise_schedule, student, seed=5
        )
        schedule = replace(LORA.schedule, steps=self.sizes.lora_steps, batch=sampler.batch)
        optimise("LCM-LoRA", unet, loss, schedule, self.work / "lora")
        save_lora(unet, self.weights / "lcm_lora.safetensors")
        unet.unload_lora()

    def train_styles(self, folder: Path) -> None:
        """Train one LoRA over the base for each style of the drawn world, into `folder`."""
        noise_schedule = NoiseSchedule.of(make_scheduler(), self.device)
        steps, batch = self.sizes.style_steps, self.sizes.style_batch
        schedule = Schedule(steps, lr=1e-3, batch=batch, weight_decay=0.0, ema_decay=0.98)
        for i, name in enumerate(STYLES):
            torch.manual_seed(8)
            unet = self.base.unet
            distill.order_for_training(unet)
            distill.add_lora(unet, distill.StyleStudent())
            scenes = pick_scenes(training_scenes(), self.sizes.style_images, seed=20 + i)
            restyle = partial(draw_restyled, name, scenes, 80_000_000, *SQUARE)
            restyled = self._encoded(f"style-{name}", scenes, restyle)
            sampler = BatchSampler(self.base, [restyled], batch, seed=9)
            loss = distill.style_training(unet, torch.no_grad()(sampler), noise_schedule, seed=6)
            optimise(name, unet, loss, schedule, self.work / f"style-{name}")
            save_lora(unet, folder / f"{name}.safetensors")
            unet.unload_lora()

    def train_tiny_vae(self) -> None:
        """Distil the VAE's decoder into weights/miniature/vae_tiny."""
        latents, steps = [part.latents for part in self.latents], self.sizes.tiny_vae_steps
        tiny = train_tiny_vae(self.vae, latents, steps, self.work / "tiny-vae", self.device)
        tiny.half().save_pretrained(self.weights / TINY_VAE)

    def run(self, styles: Path) -> None:
        """Run the stages from the first on; afterwards `weights` is whole, scored, and has its card and
        manifest, and `styles` holds a LoRA for each style."""
        judge = self.judge  # first: it is frozen before anything that it judges is trained
        student = LORA.student
        assert isinstance(student, distill.LoraStudent)
        if "lora" not in self.kept:
            self.train_lora(student)
        if "styles" not in self.kept:
            self.train_styles(styles)
        if "tiny-vae" not in self.kept:
            self.train_tiny_vae()
        sizes, count = asdict(self.sizes), (self.sizes.captions, self.sizes.seeds)
        write_card(self.weights, sizes, student, [])  # scoring loads the weights through their manifest
        write_card(self.weights, sizes, student, score_all(self.weights, judge, *count))
