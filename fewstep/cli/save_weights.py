"""Make the folder that a model is served from, out of what was downloaded: scripts/save-weights sdxl

It is written beside its place and moved there when it is whole. With --from-single-file, the networks come
from a local .safetensors checkpoint, such as a fine-tune of SDXL or SD 1.5; the rest is the model's own.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from fewstep.cli.run import model_parser, say, status_of
from fewstep.models.specs import MODELS, ModelSpec


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 1 when something is missing or damaged; the reason is one sentence on stderr."""
    parser = model_parser("scripts/save-weights", __doc__)
    parser.add_argument("--from-single-file", type=Path, metavar="PATH", help="a .safetensors checkpoint")
    chosen = parser.parse_args(arguments)
    spec = MODELS[chosen.name]
    if chosen.from_single_file and not chosen.from_single_file.is_file():
        parser.error("there is no file at the path that --from-single-file names")
    if chosen.from_single_file and not spec.in_checkpoint:
        parser.error(f"{spec.name} is not made from checkpoints; sdxl and sd15 are")
    return status_of(lambda: _save(spec, chosen.from_single_file))


def _save(spec: ModelSpec, checkpoint: Path | None) -> None:
    from fewstep.models.hub import downloaded, downloads_folder
    from fewstep.models.save import save_model
    from fewstep.settings import Settings

    root = Settings.from_env().weights_root
    wanted = "" if checkpoint is None else " --for-single-file"
    sources = spec.sources if checkpoint is None else spec.sources_beside_checkpoint
    files = downloaded(sources, downloads_folder(root), f"scripts/download-weights {spec.name}{wanted}")
    folder = save_model(spec, files, root, checkpoint)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9
    say(f"weights/{spec.name} is ready, {size:.2f} GB; next: FEWSTEP_MODEL={spec.name} scripts/predict")


if __name__ == "__main__":
    sys.exit(main())
