"""Make a model of the real size with random weights: scripts/full-size sdxl

It is built, saved, loaded and run by the code of the real one, to measure memory and time on any machine:
FEWSTEP_MODEL=sdxl-random scripts/predict -i prompt=noise -i steps=1. The pictures are noise.
"""

import argparse
import logging
import sys
from collections.abc import Sequence

from fewstep.errors import FewstepError
from fewstep.models import MODELS


def main(arguments: Sequence[str] | None = None) -> int:
    """1 when it cannot be made; the reason is one sentence on stderr."""
    parser = argparse.ArgumentParser(
        prog="scripts/full-size", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [name for name, spec in MODELS.items() if spec.sources]
    parser.add_argument("name", nargs="?", choices=names, default="sdxl", help="the model (%(default)s)")
    name = parser.parse_args(arguments).name
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        from fewstep.fullsize import make_random  # imports torch, which takes seconds
        from fewstep.settings import Settings

        folder = make_random(name, Settings.from_env().weights_root)
    except FewstepError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9
    sys.stderr.write(f"weights/{name}-random is ready, {size:.2f} GB\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
