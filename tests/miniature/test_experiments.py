"""Every experiment at its smallest, end to end: the rows and columns that docs/training.md shows."""

import csv
from itertools import product

import pytest

from fewstep.miniature.experiments import EXPERIMENTS, Experiment, ExperimentSizes

pytestmark = pytest.mark.slow

TINY = ExperimentSizes(
    captions=2, new_captions=2, world=20, learnt=3, taught=4, rehearsed=2, steps=(1, 2), teacher_steps=2,
    curve=(0, 1), ablation_steps=1, k=(20,), w=(0.6,), learnt_steps=1, taught_steps=2, batch=2,
)  # fmt: skip
FUSED = "fine-tuned base, LCM-LoRA"
# The first columns, the rest being figures of all right and distance, and what stands in them.
TABLES = {
    "curve": ("trained steps", product("01", "12")),
    "ablation": ("over value steps", [(*varied, n) for varied in (("k", "20"), ("w", "0.6")) for n in "12"]),
    "universal": (
        "system steps",
        [("base, LCM-LoRA", "4"), ("fine-tuned base", "2"), (FUSED, "1"), (FUSED, "2")]
        + [(f"{FUSED}, golden-hour at 0.8", "4")],
    ),
    "finetuning": (
        "system steps",
        product(("before", "lcf", "lcf, without rehearsal", "style", "style, without rehearsal"), "4"),
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_an_experiment_ends_in_its_table(name, tmp_path):
    EXPERIMENTS[name](Experiment(tmp_path / "work", tmp_path, TINY))
    rows = list(csv.DictReader((tmp_path / f"training-{name}.csv").read_text().splitlines()))
    columns, expected = TABLES[name]
    assert [tuple(row[column] for column in columns.split()) for row in rows] == list(expected)
    figures = list(rows[0])[1 + len(columns.split()) :]
    assert [figure.split(": ")[-1] for figure in figures] == ["all_right", "distance"] * (len(figures) // 2)
    drawn = tmp_path / f"training-{name}.{'png' if len(figures) == 2 else 'webp'}"
    assert drawn.stat().st_size > 1000
