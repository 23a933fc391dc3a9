"""Tables name their commit, and sheets are of images without a gap too many."""

import csv

from PIL import Image

from fewstep.coglet.server import ROOT
from fewstep.evaluation.figures import grid
from fewstep.evaluation.tables import append_csv, commit, write_csv


def rows_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_every_row_names_the_commit_and_old_rows_keep_theirs(tmp_path):
    path = tmp_path / "new" / "x.csv"
    write_csv(path, [{"a": 1}, {"a": 2, "b": 3}])
    stamp = {"commit": commit()}
    assert rows_of(path) == [{**stamp, "a": "1", "b": ""}, {**stamp, "a": "2", "b": "3"}]
    path.write_text("a\n0\n")  # of before there were commits
    append_csv(path, {"a": 1, "c": 2})
    assert rows_of(path) == [{"commit": "", "a": "0", "c": ""}, {"commit": commit(), "a": "1", "c": "2"}]


def test_every_committed_table_names_a_commit():
    for path in (ROOT / "benchmarks").glob("*.csv"):
        assert all(len(row["commit"].rstrip("+")) >= 7 for row in rows_of(path)), path.name


def test_images_are_tiled_without_a_gap():
    whole = grid([Image.new("RGB", (256, 256), (i, 9, 9)) for i in range(1, 17)], 4, gap=0)
    assert whole.size == (1024, 1024)
    assert sorted(colour for _, (colour, _, _) in whole.getcolors()) == list(range(1, 17))
