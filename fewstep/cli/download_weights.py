"""Download the weights of a model from the Hugging Face hub: scripts/download-weights sdxl

Only the files that the model needs, all of them safetensors or text. Every file is verified, byte for byte,
before it takes its name; a run that was interrupted goes on where it was, and a second run fetches nothing.
HF_TOKEN, HF_ENDPOINT and HF_HOME are honoured; scripts/save-weights then makes the model's folder.
"""

import os
import sys
from collections.abc import Sequence

from fewstep.cli.run import model_parser, say, status_of
from fewstep.models.specs import MODELS, ModelSpec


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 1 when something could not be had; the reason is one sentence on stderr."""
    parser = model_parser("scripts/download-weights", __doc__)
    without = "without the networks that a checkpoint of yours brings"
    parser.add_argument("--for-single-file", action="store_true", help=without)
    chosen = parser.parse_args(arguments)
    spec = MODELS[chosen.name]
    if chosen.for_single_file and not spec.in_checkpoint:
        parser.error(f"{spec.name} is not made from checkpoints; sdxl and sd15 are")
    # The container sets them for serving; they would forbid what is asked for here.
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ.pop(name, None)
    return status_of(lambda: _download(spec, chosen.for_single_file))


def _download(spec: ModelSpec, for_single_file: bool) -> None:
    from fewstep.models.hub import download, downloads_folder  # the client takes half a second
    from fewstep.settings import Settings

    repos = spec.sources_beside_checkpoint if for_single_file else spec.sources
    for repo, licence, link in dict.fromkeys((repo.name, repo.licence, repo.link) for repo in repos):
        say(f"{repo}: {licence}, see {link}; to download it is to accept that")
    files = download(repos, downloads_folder(Settings.from_env().weights_root))
    pinned = sum(file.file.sha256 is not None for file in files)
    size = sum(file.expected.size for file in files) / 1e9
    then = f"scripts/save-weights {spec.name}" + (" --from-single-file PATH" if for_single_file else "")
    say(
        f"{spec.name}: {len(files)} files, {size:.2f} GB, all verified: {pinned} against hashes that fewstep "
        f"pins, {len(files) - pinned} against what the hub states; next: {then}"
    )


if __name__ == "__main__":
    sys.exit(main())
