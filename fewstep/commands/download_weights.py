"""Download the weights of a model from the Hugging Face hub: scripts/download-weights sdxl

Only the files that the model needs, all of them safetensors or text. Every file is verified, byte for byte,
before it takes its name; a run that was interrupted goes on where it was, and a second run fetches nothing.
HF_TOKEN, HF_ENDPOINT and HF_HOME are honoured; scripts/save-weights then makes the model's folder.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from fewstep.errors import FewstepError
from fewstep.models import MODELS, ModelSpec


def main(arguments: Sequence[str] | None = None) -> int:
    """1 when something could not be had; the reason is one sentence on stderr."""
    parser = argparse.ArgumentParser(
        prog="scripts/download-weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [name for name, spec in MODELS.items() if spec.sources]
    parser.add_argument("name", nargs="?", choices=names, default="sdxl", help="the model (%(default)s)")
    parser.add_argument(
        "--for-single-file",
        action="store_true",
        help="without the networks that a checkpoint of yours brings",
    )
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # a line for each request
    # The container sets it for serving; it would forbid what is asked for here.
    os.environ.pop("HF_HUB_OFFLINE", None)
    try:
        _download(MODELS[chosen.name], chosen.for_single_file)
    except FewstepError as error:
        _say(str(error))
        return 1
    except KeyboardInterrupt:
        _say("stopped; run the command again, and it goes on from there")
        return 130
    return 0


def _download(spec: ModelSpec, for_single_file: bool) -> None:
    from fewstep.hub import download, downloads_folder  # the client takes half a second
    from fewstep.settings import Settings

    repos = spec.sources_beside_checkpoint if for_single_file else spec.sources
    for repo, licence, link in dict.fromkeys((repo.name, repo.licence, repo.link) for repo in repos):
        _say(f"{repo}: {licence}, see {link}; to download it is to accept that")
    files = download(repos, downloads_folder(Settings.from_env().weights_root))
    pinned = sum(one.expected.pinned for one in files)
    size = sum(one.expected.size for one in files) / 1e9
    _say(
        f"{spec.name}: {len(files)} files, {size:.2f} GB, all verified: {pinned} against hashes that fewstep "
        f"pins, {len(files) - pinned} against what the hub states; next: scripts/save-weights {spec.name}"
    )


def _say(sentence: str) -> None:
    sys.stderr.write(f"{sentence}\n")


if __name__ == "__main__":
    sys.exit(main())
