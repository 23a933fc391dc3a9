"""The Cog training door: a zip of pictures becomes an adapter that predict() takes as `style`.

`scripts/train` is the same as a plain command line. As in predict.py, everything within Input(...) is a
literal; a test holds the defaults to fewstep/training/config.py.
"""

import random
import tempfile

from cog import BaseModel, Input, Path

from fewstep.coglet.adapter import check_cog, fetched_file, log_to_stderr, mask_unexpected_errors
from fewstep.coglet.training import keep, run_training

WEIGHTS = "pytorch_lora_weights.safetensors"  # as scripts/train names what diffusers loads


class TrainingOutput(BaseModel):
    weights: Path


async def train(
    images: Path = Input(description="A zip of pictures (JPEG, PNG or WebP), each with a text file of the same name or a line in metadata.jsonl that says what it shows.", regex="^(https?://|data:)"),
    caption: str | None = Input(description="What the pictures show that have no caption of their own.", default=None, max_length=2000),
    method: str = Input(description="lcf trains on the few-step model itself, so that it stays one; style trains on its base, an ordinary LoRA.", default="lcf", choices=["lcf", "style"]),
    steps: int | None = Input(description="How many training steps; empty is 1,000 for the real models.", default=None, ge=1, le=100000),
    batch_size: int | None = Input(description="Pictures a step; empty is 4 for the real models.", default=None, ge=1, le=256),
    learning_rate: float | None = Input(description="Of AdamW; it falls to zero towards the end. Empty is 0.0001 for the real models.", default=None, ge=0.0000001, le=0.1),
    rank: int | None = Input(description="Of the LoRA: the more, the more it can hold. Empty is 16.", default=None, ge=1, le=256),
    resolution: int | None = Input(description="Side in px of the squares to train on, or of other shapes of that area; a multiple of 8. Empty is the model's own.", default=None, ge=64, le=2048),
    rehearse: int | None = Input(description="How many pictures of its own the model paints at first, not to forget them; empty is 200 for the real models, 0 is none.", default=None, ge=0, le=2000),
    seed: int | None = Input(description="The same seed trains the same adapter; empty draws one, which is logged.", default=None, ge=0, le=2147483647),
) -> TrainingOutput:
    """Train; raises a FewstepError, which callers see as `[code] sentence`."""
    log_to_stderr()
    with mask_unexpected_errors():
        check_cog()
        options = {"method": method, "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "rank": rank, "resolution": resolution, "rehearse": rehearse, "caption": caption}
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "run")
            await run_training(fetched_file("images", images), out, seed=random.getrandbits(31) if seed is None else seed, **options)
            return TrainingOutput(weights=Path(keep(out / WEIGHTS)))  # type: ignore[call-arg]  # cog makes its __init__
