"""Train the miniature and write weights/miniature: scripts/build-miniature [STAGE ...]

The stages, in order: vae, judge, base-1 and so on, decoder, lora, styles, tiny-vae, scores; all of them, if
none is named, take about 15 hours of two cores without bf16, a third of that with, minutes on a GPU. Each
begins with what the one before has left in weights/miniature, and with nothing in an empty folder; it keeps
a checkpoint in the work folder, so that one that is interrupted goes on where it was. The last one writes the
manifest, without which no server loads what the others have changed.
"""

import argparse
import logging
import os
from pathlib import Path


def main() -> None:
    """Build on the GPU if there is one, else on all cores."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("scripts/build-miniature", description=__doc__, formatter_class=layout)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help="the stages to run (all)")
    for name, folder, what in (
        ("--weights", "weights/miniature", "folder to write"),
        ("--styles", "styles/miniature", "folder of the styles"),
        ("--work", "build/miniature", "where drawings, latents and checkpoints go: 15 GB"),
    ):
        parser.add_argument(name, type=Path, default=Path(folder), help=f"{what} (%(default)s)")
    arguments = parser.parse_args()
    if arguments.weights.name != "miniature":  # by this name the scores' stage loads it
        parser.error("--weights must be a folder named miniature")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")

    import torch  # takes seconds, which --help need not wait for

    from fewstep.miniature.build import Build, Sizes

    torch.set_num_threads(os.cpu_count() or 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    build = Build(arguments.weights, arguments.styles, arguments.work, Sizes(), device)
    if unknown := sorted(set(arguments.stages) - set(build.stages)):
        parser.error(f"there is no stage {', '.join(unknown)}; there are {', '.join(build.stages)}")
    build.run(arguments.stages or list(build.stages))


if __name__ == "__main__":
    main()
