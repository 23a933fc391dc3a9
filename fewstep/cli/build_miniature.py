"""Train the miniature from nothing and write weights/miniature.

    scripts/build-miniature                  all stages: about 100 minutes on two cores, minutes on a GPU
    scripts/build-miniature --from lora      the earlier stages' results are taken from weights/miniature

Each stage keeps a checkpoint in the work folder, so that an interrupted build goes on where it was.
"""

import argparse
import logging
import os
from pathlib import Path

from fewstep.miniature import STAGES


def main() -> None:
    """Build on the GPU if there is one, else on all cores."""
    parser = argparse.ArgumentParser(
        prog="scripts/build-miniature",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--from", dest="start", choices=STAGES, default=STAGES[0], help="first stage to run")
    parser.add_argument(
        "--weights", type=Path, default=Path("weights/miniature"), help="folder to write (%(default)s)"
    )
    parser.add_argument(
        "--styles", type=Path, default=Path("styles/miniature"), help="folder of the styles (%(default)s)"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("build/miniature"),
        help="where drawings, latents and checkpoints go: 3 GB (%(default)s)",
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")

    import torch  # takes seconds, which --help need not wait for

    from fewstep.miniature.build import Sizes, build_miniature

    torch.set_num_threads(os.cpu_count() or 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    build_miniature(arguments.weights, arguments.styles, arguments.work, Sizes(), device, arguments.start)


if __name__ == "__main__":
    main()
