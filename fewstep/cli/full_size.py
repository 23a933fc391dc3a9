"""Make a model of the real size with random weights: scripts/full-size sdxl

It is built, saved, loaded and run by the code of the real one, to measure memory and time on any machine.
With --measure, it is then served and paints once, and a row is added to benchmarks/full-size.csv; a folder
that is there already is not made again. The pictures are noise.
"""

import sys
from collections.abc import Sequence

from fewstep.cli.run import model_parser, say, status_of


def main(arguments: Sequence[str] | None = None) -> int:
    """1 when it cannot be made or does not paint; the reason is one sentence on stderr."""
    parser = model_parser("scripts/full-size", __doc__)
    parser.add_argument("--measure", action="store_true", help="paint once, and write down what it took")
    parser.add_argument("--size", type=int, default=512, help="of the picture, in px (%(default)s)")
    parser.add_argument("--steps", type=int, default=1, help="(%(default)s)")
    chosen = parser.parse_args(arguments)

    def work() -> None:
        make(chosen.name, again=not chosen.measure)
        if chosen.measure:
            from fewstep.benchmark.measure import BENCHMARKS, line, measure
            from fewstep.evaluation.tables import append_csv

            inputs = {"width": chosen.size, "height": chosen.size, "steps": chosen.steps}
            row = measure(f"{chosen.name}-random", **inputs)
            append_csv(BENCHMARKS / "full-size.csv", row)
            say(line(row))

    return status_of(work)


def make(name: str, again: bool) -> None:
    """Make the folder of `name`; one that is there is kept unless `again`."""
    from fewstep.settings import Settings

    root = Settings.from_env().weights_root
    folder = root / f"{name}-random"
    if again or not folder.exists():
        import torch  # takes seconds

        from fewstep.benchmark.full_size import make_random

        make_random(name, root, "cuda" if torch.cuda.is_available() else "cpu")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e9
    say(f"weights/{folder.name} is ready, {size:.2f} GB")


if __name__ == "__main__":
    sys.exit(main())
