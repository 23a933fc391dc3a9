"""The miniature's base: two CLIP text encoders and an SDXL UNet, trained together from nothing on drawn
scenes."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from fewstep.miniature.world.scenes import Scene, caption, draw_scenes
from fewstep.miniature.world.things import OWN, THINGS
from fewstep.miniature.world.words import ATTRIBUTES, COLOURS
from fewstep.models.device import autocast
from fewstep.training import consistency as cm
from fewstep.training.distill import Batch, order_for_training, predict
from fewstep.training.trainer import WHOLE, Schedule, Shard, StepRandom, optimise, step_generator

TOKENS = 48
TEXT_WIDTH = 96
TEXT_BATCH = 128
UNPROMPTED_SHARE = 0.1
# Words of things that are not in this world, tokens all the same: it can grow without a new tokenizer.
LATER = """\
airplane alien astronaut banana beach umbrella balloon bat bear bee bird boat candle carrot cherries
chicken church cloud coffee cookie cow crab deer dolphin duck eagle fire fish flame flower football frog
garden gift present grapes hat heart hedgehog helicopter horse ice cream koala ladybug lamp lemon light
bulb lollipop monkey moon mouse motorcycle octopus orange pagoda parrot peach pear pig pineapple pine
christmas tree planet princess rainbow rose santa shark sheep ship skull snail snake soccer ball
squirrel sun temple tent tomato trophy umbrella watermelon windmill wizard wolf zebra"""


def make_tokenizer(folder: Path) -> CLIPTokenizer:
    """Write CLIP's byte-level BPE with merges learnt from the world's captions: every word of the world is
    one token, and any other text falls apart into pieces and bytes."""
    rng = random.Random(0)
    words = [caption(scene, rng) for scene in draw_scenes(6000, 0, reserved=None, new=True)]
    words += [LATER] * 40
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(False)]
    )
    trainer = trainers.BpeTrainer(vocab_size=3000, show_progress=False, end_of_word_suffix="</w>")
    bpe.train_from_iterator(words, trainer)
    merges: list[list[str]] = json.loads(bpe.to_str())["model"]["merges"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *("".join(pair) for pair in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    settings = special | {"unk_token": "<|endoftext|>", "model_max_length": TOKENS}
    settings |= {"tokenizer_class": "CLIPTokenizer"}
    for name, content in (("tokenizer_config", settings), ("special_tokens_map", special)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    return CLIPTokenizer.from_pretrained(folder)


def make_scheduler() -> EulerDiscreteScheduler:
    """Return SDXL's noise schedule, rescaled to end in pure noise (zero terminal SNR, arXiv 2305.08891).

    Otherwise what is left of the image at the last timestep tells the network on which side the thing
    stands, and the prompt's word for it is never learnt. Pure noise holds no answer in terms of noise, so the
    network predicts v, as SDXL's own fine-tunes on this schedule do.
    """
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        steps_offset=1,
        timestep_spacing="leading",
        rescale_betas_zero_snr=True,
    )


class Miniature(nn.Module):
    """Everything of the miniature that is trained by the diffusion loss."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        text = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=3,
            max_position_embeddings=TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation="eager",  # faster than the fused kernel at this size; not saved
        )
        self.tokenizer = tokenizer
        self.text_encoder = CLIPTextModel(text)
        self.text_encoder_2 = CLIPTextModelWithProjection(text)
        self.unet = UNet2DConditionModel(
            sample_size=32,
            block_out_channels=(64, 128, 192),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1, 2),  # most of them where pixels are few, as in SDXL
            attention_head_dim=(2, 4, 6),
            use_linear_projection=True,
            cross_attention_dim=2 * TEXT_WIDTH,
            addition_embed_type="text_time",
            addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * 32,
        )

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Return their tokens, (N, TOKENS)."""
        options = {"padding": "max_length", "max_length": TOKENS, "truncation": True, "return_tensors": "pt"}
        tokens: Tensor = self.tokenizer(list(prompts), **options).input_ids.to(self.unet.device)
        return tokens

    def encode_prompts(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return (N, TOKENS, 2 x TEXT_WIDTH) and (N, TEXT_WIDTH), SDXL's penultimate states of both encoders,
        and the pooled projection of the second."""
        tokens = self.tokens(prompts)
        with autocast(tokens.device):
            one = self.text_encoder(tokens, output_hidden_states=True)
            two = self.text_encoder_2(tokens, output_hidden_states=True)
        states = torch.cat([one.hidden_states[-2], two.hidden_states[-2]], dim=-1)
        return states.float(), two.text_embeds.float()


@dataclass(frozen=True)
class LatentSet:
    """Scaled latents (N, 4, H, W), fp16, of images of one shape, what each shows, and how often a batch is of
    them: `share`, relative to that of other sets."""

    latents: Tensor
    scenes: list[Scene]
    share: float = 1.0


@dataclass(frozen=True)
class BatchSampler:
    """Draws training batches, each of one shape."""

    base: Miniature
    sets: Sequence[LatentSet]
    batch: int
    seed: int

    def __call__(self, step: int, share: Shard = WHOLE) -> Batch:
        generator = step_generator(self.seed, step)
        rng = random.Random(f"{self.seed} {step}")
        [chosen] = rng.choices(self.sets, [part.share for part in self.sets])
        index = torch.randint(len(chosen.scenes), (self.batch,), generator=generator)
        device = self.base.unet.device
        latents = chosen.latents[share.of(index)].float().to(device, memory_format=torch.channels_last)
        prompts = [_with_strange_words(caption(chosen.scenes[i], rng), rng) for i in index.tolist()]
        prompt_embeds, pooled = self.base.encode_prompts(share.of(prompts))
        height, width = (8 * side for side in latents.shape[2:])
        time_ids = torch.tensor([[height, width, 0, 0, height, width]] * len(latents), device=device)
        return Batch(latents, prompt_embeds, pooled, time_ids.float())


def _with_strange_words(text: str, rng: random.Random) -> str:
    """Add a word that means nothing now and then, so that a prompt with unknown words still shows those that
    are known."""
    words = text.split(" ")
    if rng.random() <= 0.08:
        strange = "".join(rng.choices("abcdefghijklmnoprstuvwy", k=rng.randint(2, 7)))
        words.insert(rng.randint(0, len(words)), strange)
    return " ".join(words)


def labels_of_text(scene: Scene) -> list[int]:
    """Return what captions of `scene` say: both things and their colours (0: there is none), and the rest."""
    names, colours = list(THINGS), (OWN, *COLOURS)
    things = [1 + names.index(thing.name) for thing in scene.things]
    hues = [1 + colours.index(thing.hue) for thing in scene.things]
    rest = [values.index(getattr(scene, name)) for name, values in ATTRIBUTES.items()]
    return [*(things + [0])[:2], *(hues + [0])[:2], *rest]


def train_text(base: Miniature, steps: int, checkpoints: Path) -> None:
    """Teach the text encoders of `base` to read, as SDXL's have learnt it before SDXL: by what captions say.

    From the diffusion loss alone they learn a word only as fast as it shows in noisy latents. After 200 such
    steps a base knows positions within 200 of its own; without them, it confuses left and middle after 2,700.
    A linear layer reads a scene from each of what the UNet is given of it: the penultimate states (at the end
    of the text) and the pooled embedding.
    """
    scenes, device = draw_scenes(60_000, 3), base.unet.device
    sizes = [1 + len(THINGS)] * 2 + [2 + len(COLOURS)] * 2 + [len(values) for values in ATTRIBUTES.values()]
    heads = nn.ModuleList(nn.Linear(TEXT_WIDTH, sum(sizes)) for _ in range(3)).to(device)

    def loss(step: int, share: Shard) -> Tensor:
        rng = random.Random(f"text {step}")
        shown = rng.choices(scenes, k=TEXT_BATCH)
        labels = torch.tensor([labels_of_text(scene) for scene in shown], device=device)
        captions = [caption(scene, rng) for scene in shown]
        end = (base.tokens(captions) == base.tokenizer.eos_token_id).int().argmax(1)
        states, pooled = base.encode_prompts(captions)
        last = states[torch.arange(TEXT_BATCH, device=device), end]
        read = zip(heads, (last[:, :TEXT_WIDTH], last[:, TEXT_WIDTH:], pooled), strict=True)
        logits = [row for head, part in read for row in head(part).split(sizes, dim=1)]
        targets = [*labels.T] * len(heads)
        losses = [F.cross_entropy(row, target) for row, target in zip(logits, targets, strict=True)]
        return torch.stack(losses).sum()

    trained = nn.ModuleList([base.text_encoder, base.text_encoder_2, heads])
    optimise("text", trained, loss, Schedule(steps, lr=2e-3, batch=TEXT_BATCH), checkpoints)


def train_base(base: Miniature, sampler: BatchSampler, schedule: Schedule, checkpoints: Path) -> None:
    """Train `base` in place; its text encoders learn from the same loss as its UNet: the mean squared error
    of v at stratified timesteps, one batch row in ten without its prompt."""
    noise_schedule = cm.NoiseSchedule.of(make_scheduler(), base.unet.device)
    order_for_training(base.unet)
    last = len(noise_schedule.alphas_cumprod) - 1

    def loss(step: int, share: Shard) -> Tensor:
        batch, draws = sampler(step, share), StepRandom(4, step, share)
        count, device = len(batch.latents), batch.latents.device
        # Stratified, and leaning to noisy timesteps: there it is decided what the image shows.
        t = (draws.stratified(count) ** 0.8 * (last + 1)).long().clamp(max=last).to(device)
        noise = draws.normal(*batch.latents.shape).to(device)
        kept = (draws.uniform(count) >= UNPROMPTED_SHARE).to(device)
        nothing = batch.without_prompt()
        assert batch.pooled is not None and nothing.pooled is not None  # SDXL's
        prompted = replace(
            batch,
            prompt_embeds=torch.where(kept[:, None, None], batch.prompt_embeds, nothing.prompt_embeds),
            pooled=torch.where(kept[:, None], batch.pooled, nothing.pooled),
        )
        alpha, sigma = noise_schedule.signal_and_noise(t, noise)
        output = predict(base.unet, alpha * batch.latents + sigma * noise, t, prompted)
        return F.mse_loss(output, alpha * noise - sigma * batch.latents)

    optimise("base", base, loss, schedule, checkpoints)
