"""What a training leaves: files that others load, and the README.md beside them.

A LoRA is written with diffusers' keys and with those of kohya's scripts, a full LCM as diffusers' `unet/`.
"""

from __future__ import annotations

import json
import logging
import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path

from diffusers import UNet2DConditionModel
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peft import get_peft_model_state_dict
from safetensors import SafetensorError
from torch import Tensor

from fewstep.errors import TrainingError
from fewstep.training.checkpoint import write_tensors

logger = logging.getLogger(__name__)

CARDS = Path(__file__).with_name("cards.toml")
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "kohya.safetensors"
METADATA_KEY = "fewstep"  # of what we write into a file's metadata


def save_network(network: UNet2DConditionModel, folder: Path, metadata: Mapping[str, object]) -> None:
    """Write the LoRA of `network` to `folder` as both files, or a network without one to `unet/`.

    Raises TrainingError when it cannot be written; what was there before stays.
    """
    if hasattr(network, "peft_config"):
        save_lora(network, folder / DIFFUSERS_FILE, metadata)
        save_lora(network, folder / KOHYA_FILE, metadata, kohya=True)
        return
    target, part = folder / "unet", folder / "unet.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        network.save_pretrained(part)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        logger.error("the UNet could not be written", exc_info=error)
        raise TrainingError("the UNet could not be written; is the disk full?") from None
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)


def save_lora(
    unet: UNet2DConditionModel, path: Path, metadata: Mapping[str, object] | None = None, kohya: bool = False
) -> None:
    """Write the LoRA of `unet` in fp16 to `path`, with `metadata` as JSON under METADATA_KEY.

    Its keys are diffusers' own, or with `kohya` those of the published LCM-LoRAs, which ComfyUI and A1111
    take. Raises TrainingError when it cannot be written.
    """
    layers = get_peft_model_state_dict(unet)
    tensors: dict[str, Tensor] = {f"unet.{name}": value for name, value in layers.items()}
    config, header = unet.peft_config["default"], {"format": "pt"}
    if kohya:
        tensors = convert_state_dict_to_kohya(tensors)
        header |= {"ss_network_module": "networks.lora", "ss_network_dim": str(config.r)}
        header["ss_network_alpha"] = str(config.lora_alpha)
    else:
        adapter = {f"unet.{name}": value for name, value in config.to_dict().items()}
        header["lora_adapter_metadata"] = json.dumps(adapter, sort_keys=True, default=sorted)
    if metadata is not None:
        header[METADATA_KEY] = json.dumps(metadata, sort_keys=True)
    # kohya's alphas, too, which come as whole numbers: its scripts write them in the dtype of the rest.
    write_tensors(path, {name: value.half() for name, value in tensors.items()}, header)


def write_card(folder: Path, metadata: Mapping[str, object], guidance: float) -> None:
    """Write README.md into `folder`, with its latest samples and a table of `metadata`."""
    cards = tomllib.loads(CARDS.read_text(encoding="utf-8"))
    method = str(metadata["method"])
    samples = sorted((folder / "samples").glob("*.webp"))
    rows = [f"| {name} | {value} |" for name, value in metadata.items()]
    text = cards["card"].format(
        model=metadata["model"],
        kind="full-lcm" if method == "full" else "lora",
        title=cards[method]["title"],
        image=f"![the same prompts and seeds as ever](samples/{samples[-1].name})" if samples else "",
        use=cards[method]["use"].format(guidance=guidance),
        table="\n".join(["| | |", "|---|---|", *rows]),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
