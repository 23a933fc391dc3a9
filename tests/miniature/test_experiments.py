"""Every experiment at its smallest, end to end: its table has the rows and columns that docs/training.md shows."""

import csv
from itertools import product

import pytest

from fewstep.miniature.experiments import EXPERIMENTS, Experiment, Sizes

TINY = Sizes(
    captions=2,
    new_captions=2,
    world=40,
    learnt=3,
    taught=4,
    rehearsed=2,
    steps=(1, 2),
    teacher_steps=2,
    curve=(0, 1, 2),
    ablation_steps=1,
    learnt_steps=1,
    taught_steps=2,
    batch=2,
)
FIGURES = ["all_right", "distance"]


@pytest.mark.parametrize(
    ("name", "columns", "rows"),
    [
        ("curve", ["trained", "steps", *FIGURES], product("012", "12")),
        ("ablation", ["over", "value", "steps", *FIGURES], None),
        (
            "universal",
            [
                "system",
                "steps",
                *(f"{what}: {f}" for what in ("new backdrop", "known scenes") for f in FIGURES),
            ],
            [
                ("base, LCM-LoRA", "4"),
                ("fine-tuned base", "2"),
                ("fine-tuned base, LCM-LoRA", "1"),
                ("fine-tuned base, LCM-LoRA", "2"),
                ("fine-tuned base, LCM-LoRA, golden-hour at 0.8", "4"),
            ],
        ),
        (
            "finetuning",
            [
                "system",
                "steps",
                *(f"{what}: {f}" for what in ("new object", "known scenes") for f in FIGURES),
            ],
            [
                (name, "4")
                for name in ("before", "lcf", "lcf, without rehearsal", "style", "style, without rehearsal")
            ],
        ),
    ],
)
def test_an_experiment_ends_in_its_table(name, columns, rows, tmp_path, tmp_path_factory):
    EXPERIMENTS[name](Experiment(tmp_path / "work", tmp_path, TINY))
    written = list(csv.DictReader((tmp_path / f"training-{name}.csv").read_text().splitlines()))
    assert list(written[0]) == ["commit", *columns]
    if rows:
        assert [tuple(row[column] for column in columns[:2]) for row in written] == list(rows)
    else:
        values = [row["value"] for row in written[::2] if row["over"] == "k"]
        assert values == ["1", "5", "10", "20", "50", "100"] and len(written) == 2 * 11
    drawn = tmp_path / f"training-{name}.{'png' if name in ('curve', 'ablation') else 'webp'}"
    assert drawn.stat().st_size > 1000
