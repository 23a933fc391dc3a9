"""A trained LoRA as files that others can load: with diffusers' keys, and with those of kohya's scripts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from peft import get_peft_model_state_dict
from torch import Tensor

from fewstep.training.tensor_files import write_tensors

TOLD = "fewstep"  # the key of our metadata


def save_lora(
    unet: UNet2DConditionModel, path: Path, told: Mapping[str, object] | None = None, *, kohya: bool = False
) -> None:
    """Write the LoRA of `unet` in fp16 to `path`, with `told` as JSON in its metadata.

    Its keys are diffusers' own, or with `kohya` those of the published LCM-LoRAs, which ComfyUI and A1111
    take. Raises TrainingError when it cannot be written.
    """
    layers = get_peft_model_state_dict(unet)
    tensors: dict[str, Tensor] = {f"unet.{name}": value.half() for name, value in layers.items()}
    metadata = {"format": "pt"}
    config = unet.peft_config["default"]
    if kohya:
        # alpha comes as a whole number, which kohya's scripts write in the dtype of the rest.
        tensors = {
            name: value.to(torch.float16) for name, value in convert_state_dict_to_kohya(tensors).items()
        }
        metadata |= {"ss_network_module": "networks.lora", "ss_network_dim": str(config.r)}
        metadata["ss_network_alpha"] = str(config.lora_alpha)
    else:
        adapter = {f"unet.{name}": value for name, value in config.to_dict().items()}
        metadata["lora_adapter_metadata"] = json.dumps(adapter, sort_keys=True, default=sorted)
    if told is not None:
        metadata[TOLD] = json.dumps(told, sort_keys=True)
    write_tensors(path, tensors, metadata)
