"""The README.md that a trained model is given."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fewstep.training.plan import METHODS

_CARD = """\
---
base_model: {model}
library_name: diffusers
tags:
- lcm
- {kind}
---

# {title}

{image}

{use}
## How it was trained

{table}
"""

_LCM_LORA = """\
    pipe.load_lora_weights("FOLDER")
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe(prompt, num_inference_steps=4, guidance_scale=1.0)
"""
_USE = {
    "lora": _LCM_LORA,
    "full": """\
    pipe.unet = UNet2DConditionModel.from_pretrained("FOLDER", subfolder="unet")
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe(prompt, num_inference_steps=4, guidance_scale={guidance:g})
""",
    "lcf": """\
Beside the LCM-LoRA that it was trained with, at a scale of 1:

    scripts/predict -i prompt="..." -i style=NAME -i style_scale=1
""",
    "style": """\
At any number of steps, and in few beside an LCM-LoRA:

    scripts/predict -i prompt="..." -i style=NAME
""",
}


def write_card(folder: Path, told: Mapping[str, object], guidance: float) -> None:
    """Write README.md into `folder`, with its latest samples; `told` is what the run was started with."""
    method = str(told["method"])
    samples = sorted((folder / "samples").glob("*.webp"))
    title = METHODS[method]
    text = _CARD.format(
        model=told["model"],
        kind="full-lcm" if method == "full" else "lora",
        title=title[0].upper() + title[1:],
        image=f"![the same prompts and seeds as ever](samples/{samples[-1].name})" if samples else "",
        use=_USE[method].format(guidance=guidance),
        table="\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in told.items())]),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
