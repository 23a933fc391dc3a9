"""Every model of the table at toy size, with random weights, laid out as its repos on the hub are."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from hub import Hub
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from fewstep.models.hub import Download, Expected
from fewstep.models.sources import HubRepo
from fewstep.models.specs import MODELS, ModelSpec
from fewstep.settings import Settings
from fewstep.training.distill import LoraStudent, add_lora

TOKENIZER = Settings().weights_root / "miniature" / "tokenizer"
WIDTHS = (32, 48)  # of the text encoders; it is by them that diffusers tells the two of a checkpoint apart
SHARED = {"layers_per_block": 1, "sample_size": 8, "norm_num_groups": 8}
BLOCKS = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4),
}
UNETS = {
    "sdxl": {
        **BLOCKS,
        "use_linear_projection": True,
        "cross_attention_dim": sum(WIDTHS),
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": WIDTHS[1] + 6 * 8,
    },
    "sd": {
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
        "cross_attention_dim": WIDTHS[0],
    },
}
# SSD-1B is SDXL with blocks taken out: unequal numbers of transformers, none in the middle.
PRUNED = {
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, [2, 1]],
    "reverse_transformer_layers_per_block": [[2, 1, 1], 1],
    "mid_block_type": "UNetMidBlock2D",
}


def make_unet(**more) -> UNet2DConditionModel:
    """A network for trainings of a second, always the same, that takes prompts of width 12."""
    torch.manual_seed(0)
    return UNet2DConditionModel(**SHARED, **BLOCKS, cross_attention_dim=12, **more)


def layers(width: int) -> dict[str, int]:
    """Sizes of a transformer."""
    sizes = {"hidden_size": width, "intermediate_size": width}
    return sizes | {"num_hidden_layers": 2, "num_attention_heads": 2}


def make_folder(spec: ModelSpec, folder: Path, dtype: torch.dtype = torch.float16, seed: int = 0) -> Path:
    """A diffusers folder of `spec`, with its LCM-LoRA and a stand-in for the safety checker."""
    torch.manual_seed(seed)
    extra = PRUNED if spec.name == "ssd-1b" else {}
    extra |= {"time_cond_proj_dim": 16} if spec.embedded_guidance else {}
    unet = UNet2DConditionModel(**{**SHARED, **UNETS[spec.family], **extra})
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        norm_num_groups=8,
        latent_channels=4,
        force_upcast=True,
    )
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    )
    unet.to(dtype).save_pretrained(folder / "unet")
    tiny.save_pretrained(folder / "vae_tiny")  # published in fp32
    vae.to(dtype).save_pretrained(folder / "vae")
    EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    ).save_pretrained(folder / "scheduler")
    encoders = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    for i, (name, kind) in enumerate(encoders.items() if spec.family == "sdxl" else [*encoders.items()][:1]):
        sizes = {"vocab_size": 49408, "max_position_embeddings": 77, "projection_dim": WIDTHS[i]}
        kind(CLIPTextConfig(**sizes, **layers(WIDTHS[i]))).to(dtype).save_pretrained(folder / name)
        as_published(folder / name / "model.safetensors")
        shutil.copytree(TOKENIZER, folder / ("tokenizer_2" if i else "tokenizer"))
    if spec.lcm_lora:
        save_lora(unet.float(), folder)
    make_checkers(folder, flags=False)
    return folder


def make_diffusers_folder(spec: ModelSpec, folder: Path) -> Path:
    """`make_folder` in fp32 as diffusers' own pipelines load it."""
    make_folder(spec, folder, torch.float32)
    parts = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    parts |= {"scheduler": ["diffusers", "EulerDiscreteScheduler"]}
    for end, kind in (("", "CLIPTextModel"), ("_2", "CLIPTextModelWithProjection")):
        if (folder / f"text_encoder{end}").exists():
            parts[f"text_encoder{end}"] = ["transformers", kind]
            parts[f"tokenizer{end}"] = ["transformers", "CLIPTokenizer"]
    name = "StableDiffusionXLPipeline" if spec.family == "sdxl" else "StableDiffusionPipeline"
    options = {"force_zeros_for_empty_prompt": True} if spec.family == "sdxl" else {}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": name, **options, **parts}))
    return folder


def make_checkers(folder: Path, flags: bool) -> None:
    """Both safety checkers with random weights, always the same; they flag everything or nothing."""
    torch.manual_seed(0)
    sizes = layers(16)
    image = {"image_size": 32, "patch_size": 8}
    checker = StableDiffusionSafetyChecker(
        CLIPConfig(vision_config={**sizes, **image}, text_config=sizes, projection_dim=8)
    )
    checker.concept_embeds_weights.data.fill_(-2.0 if flags else 2.0)  # what a cosine has to exceed
    checker.save_pretrained(folder / "safety_checker")
    path = folder / "safety_checker" / "model.safetensors"
    names = {key: key.replace("vision_model.", "vision_model.vision_model.") for key in load_file(path)}
    save_file({names[key]: value.clone() for key, value in load_file(path).items()}, path, {"format": "pt"})
    labels = {0: "normal", 1: "nsfw"}
    classifier = ViTForImageClassification(
        ViTConfig(**sizes, **image, id2label=labels, label2id={name: i for i, name in labels.items()})
    )
    classifier.classifier.bias.data = torch.tensor([0.0, 9.0 if flags else -9.0])
    classifier.save_pretrained(folder / "safety_classifier")
    square = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=square).save_pretrained(
        folder / "feature_extractor"
    )
    ViTImageProcessor(size=square).save_pretrained(folder / "safety_classifier")


def as_published(file: Path) -> None:
    """The names of the files on the hub, which transformers 5 reads but no longer writes."""
    kept = ("text_model.", "text_projection")
    state = {
        key if key.startswith(kept) else f"text_model.{key}": value for key, value in load_file(file).items()
    }
    save_file(state, file, metadata={"format": "pt"})


def save_lora(unet: UNet2DConditionModel, folder: Path) -> None:
    add_lora(unet, LoraStudent(rank=4))
    layers = get_peft_model_state_dict(unet)
    for value in layers.values():
        torch.nn.init.normal_(value, std=0.05)
    StableDiffusionXLPipeline.save_lora_weights(
        folder, unet_lora_layers=layers, weight_name="lcm_lora.safetensors", safe_serialization=True
    )


def put_on(hub: Hub, spec: ModelSpec, folder: Path) -> list[HubRepo]:
    """Put `folder` on the hub as the repos of `spec`; their rows, pinned where the real ones are."""
    rows = []
    for repo in spec.sources:
        held = hub.files.setdefault(repo.name, {})
        hub.revisions.add(repo.revision)
        files = []
        for file in repo.files:
            content = held[file.path] = (folder / file.place).read_bytes()
            size = None if file.size is None else len(content)
            sha256 = None if file.sha256 is None else hashlib.sha256(content).hexdigest()
            files.append(replace(file, size=size, sha256=sha256))
        rows.append(replace(repo, files=tuple(files)))
    return rows


def as_downloaded(spec: ModelSpec, folder: Path) -> list[Download]:
    """The files of `folder` as if they had just come from the repos of `spec`."""
    pairs = [(repo, file) for repo in spec.sources for file in repo.files]
    return [Download(repo, file, folder / file.place, Expected(0, "", "")) for repo, file in pairs]


REAL = [name for name, spec in MODELS.items() if spec.sources]
