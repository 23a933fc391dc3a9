"""Compare the ways to sample a model at few steps: scripts/evaluate --out FOLDER

DDIM and DPM-Solver++ on the base, once with its own timesteps and once with trailing ones, a full LCM (--lcm)
and LCM-LoRA, each at 1, 2, 4, 8, 16 and 32 steps, as in Table 1 of the LCM paper. FOLDER gets scores.csv,
README.md with tables, plot.png and grid.webp, of the first prompt. The miniature's pictures are judged; those
of other models need --prompts, and --features with --real, or --clip.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from fewstep.cli.run import say, status_of


def main(arguments: Sequence[str] | None = None) -> int:
    """1 when a model or the settings fail; the reason is one sentence on stderr."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="scripts/evaluate", description=__doc__, formatter_class=layout)
    parser.add_argument("--captions", type=int, default=300, help="how many of the miniature's (%(default)s)")
    parser.add_argument("--clip", type=Path, help="a folder of a transformers CLIP model")
    parser.add_argument("--features", type=Path, help="a folder of a transformers vision model")
    parser.add_argument("--guidance", type=float, help="of base and full LCM (3 for the miniature, else 8)")
    parser.add_argument("--lcm", type=Path, help="the unet folder of a full LCM that scripts/distill wrote")
    parser.add_argument("--lora", type=Path, help="an LCM-LoRA (the model's own)")
    parser.add_argument("--model", default="miniature", help="a model or a diffusers folder (%(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--prompts", type=Path, help="a text file with one prompt a line")
    parser.add_argument("--real", type=Path, help="a folder of real pictures")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="(1 2 4 8 16 32)")
    parser.add_argument("--teacher-steps", type=int, default=50, help="of DDIM; 0: none (%(default)s)")
    chosen = parser.parse_args(arguments)
    if chosen.captions < 2:
        parser.error("--captions must be at least 2")
    if min(chosen.steps) < 1:
        parser.error("--steps must be at least 1")
    if chosen.model != "miniature" and not chosen.prompts:
        parser.error("--prompts is needed for a model that cannot be judged")
    if bool(chosen.features) != bool(chosen.real):
        parser.error("--features and --real go together")
    if (chosen.model != "miniature" or chosen.prompts) and not (chosen.features or chosen.clip):
        parser.error("nothing measures these pictures: give --features and --real, or --clip")
    for name in ("clip", "features", "lcm", "lora", "prompts", "real"):
        if getattr(chosen, name) and not getattr(chosen, name).exists():
            parser.error(f"there is nothing at the path of --{name}")
    return status_of(lambda: _evaluate(chosen))


def _evaluate(chosen: argparse.Namespace) -> None:
    from fewstep.errors import DatasetError
    from fewstep.evaluation.compare import compare, samplers
    from fewstep.evaluation.metrics import Metric, clip_score, feature_distance
    from fewstep.miniature.scoring import TEACHER_GUIDANCE
    from fewstep.models.device import device_and_dtype
    from fewstep.models.sources import LCM_LORA
    from fewstep.models.specs import MODELS
    from fewstep.settings import Settings
    from fewstep.training.data import SUFFIXES
    from fewstep.training.networks import load_base

    settings = Settings.from_env()
    device, _ = device_and_dtype(settings)
    metrics: list[Metric] = []
    if chosen.prompts:
        lines = chosen.prompts.read_text(encoding="utf-8").splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
    else:
        from fewstep.miniature.judge import load_judge
        from fewstep.miniature.scoring import Evaluator
        from fewstep.miniature.world.scenes import unseen_scenes

        judge = load_judge(settings.weights_root / "miniature")
        evaluator = Evaluator(judge, unseen_scenes(chosen.captions))
        prompts = evaluator.prompts
        metrics.append(evaluator.measure)
    if chosen.features:
        real = sorted(path for path in chosen.real.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not real:
            raise DatasetError(f"there is no picture ({', '.join(SUFFIXES)}) below --real")
        metrics.append(feature_distance(chosen.features, real))
    if chosen.clip:
        metrics.append(clip_score(chosen.clip, prompts))
    lora = chosen.lora
    if lora is None and chosen.model in MODELS and MODELS[chosen.model].lcm_lora:
        lora = settings.weights_root / chosen.model / LCM_LORA
    usual = TEACHER_GUIDANCE if chosen.model == "miniature" else 8.0
    guidance = usual if chosen.guidance is None else chosen.guidance
    every = samplers(partial(load_base, chosen.model, settings, device), guidance, lora, chosen.lcm)
    about = f"{len(prompts)} prompts, guidance {guidance:g}."
    say(compare(every, prompts, chosen.steps, chosen.teacher_steps, metrics, chosen.out, about))


if __name__ == "__main__":
    sys.exit(main())
