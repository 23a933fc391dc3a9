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
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("scripts/build-miniature", description=__doc__, formatter_class=layout)
    parser.add_argument("--from", dest="start", choices=STAGES, default=STAGES[0], help="first stage to run")
    for name, folder, what in (
        ("--weights", "weights/miniature", "folder to write"),
        ("--styles", "styles/miniature", "folder of the styles"),
        ("--work", "build/miniature", "where drawings, latents and checkpoints go: 3 GB"),
    ):
        parser.add_argument(name, type=Path, default=Path(folder), help=f"{what} (%(default)s)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")

    import torch  # takes seconds, which --help need not wait for

    from fewstep.miniature.build import Build, Sizes

    torch.set_num_threads(os.cpu_count() or 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    Build(arguments.weights, arguments.work, Sizes(), device, arguments.start).run(arguments.styles)


if __name__ == "__main__":
    main()
