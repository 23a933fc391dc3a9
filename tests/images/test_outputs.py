"""fewstep/images/outputs.py: names, ages and what must never be removed."""

import contextvars
import os
import shutil
import time

import pytest

from fewstep.errors import SettingsError
from fewstep.images.outputs import KEEP_S, Outputs

prediction_id = contextvars.ContextVar[str]("_coglet_prediction_id")


@pytest.fixture
def predictions(tmp_path):
    """Where coglet keeps its folders."""
    (tmp_path / "predictions").mkdir()
    return tmp_path / "predictions"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "outputs").mkdir()
    return tmp_path / "outputs"


@pytest.fixture
def outputs(root, predictions):
    return Outputs(root, predictions)


def age(path, seconds=KEEP_S + 1):
    os.utime(path, (time.time() - seconds,) * 2)


def predict_as(prediction, outputs, meanwhile=lambda: None):
    def run():
        prediction_id.set(prediction)
        with outputs.prediction():
            meanwhile()

    contextvars.copy_context().run(run)


def test_files_keep_their_content_and_never_share_a_name(outputs):
    paths = outputs.write([b"a", b"b"], "png") + outputs.write([b"c"], "png")
    assert [path.read_bytes() for path in paths] == [b"a", b"b", b"c"]
    assert len({path.name for path in paths}) == 3
    assert [path.name[-6:] for path in paths] == ["-0.png", "-1.png", "-0.png"]


def test_prepare_empties_the_root_of_our_files_only(root):
    (root / "holiday.png").write_bytes(b"not ours")
    Outputs(root, None).write([b"left behind"], "png")
    Outputs(root, None).prepare()
    assert [path.name for path in root.iterdir()] == ["holiday.png"]


def test_a_start_removes_what_a_killed_server_left_and_nothing_of_one_that_lives(tmp_path, predictions):
    roots = {name: tmp_path / name for name in ("gone", "killed", "living")}
    for name, root in roots.items():
        (predictions / name).mkdir()
        outputs = Outputs(root, predictions)
        outputs.prepare()
        outputs.write([b"left"], "png")
        predict_as(name, outputs)
        if name != "living":
            assert outputs._lock is not None
            os.close(outputs._lock)  # which the system does for whoever is killed
    shutil.rmtree(roots["gone"])
    for root in (tmp_path / "new", roots["living"], roots["killed"]):
        Outputs(root, predictions).prepare()
    assert [path.name for path in predictions.iterdir()] == ["living"]
    assert [len(list(root.iterdir())) for root in list(roots.values())[1:]] == [0, 1]


def test_a_root_that_cannot_be_made_is_a_settings_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SettingsError, match="FEWSTEP_OUTPUTS") as caught:
        Outputs(tmp_path / "file" / "below", None).prepare()
    assert str(tmp_path) not in str(caught.value)


def test_a_finished_prediction_removes_what_is_old_and_keeps_what_is_not(outputs, root):
    gone, old, new = outputs.write([b"gone", b"old", b"new"], "png")
    gone.unlink()
    age(old)
    predict_as("another", outputs)
    assert list(root.iterdir()) == [new]


def test_a_prediction_that_ends_while_another_is_written_loses_no_file_of_it(outputs, root):
    class Encoded(list):
        def __iter__(self):
            for content in super().__iter__():
                predict_as("another", outputs)
                yield content

    outputs.write(Encoded([b"a", b"b"]), "png")
    assert len(list(root.iterdir())) == 2
    outputs.remove_all()
    assert list(root.iterdir()) == []


def test_coglets_folders_go_with_age_when_they_are_of_our_predictions(outputs, predictions):
    for name in ("ours", "another-servers"):
        (predictions / name / "outputs").mkdir(parents=True)
    (predictions / "ours" / "outputs" / "spill.json").touch()
    predict_as("ours", outputs)
    assert (predictions / "ours").exists()
    for path in predictions.iterdir():
        age(path)
    predict_as("another", outputs)
    assert [path.name for path in predictions.iterdir()] == ["another-servers"]


@pytest.mark.parametrize(
    "prediction", ["../precious", "{absolute}", "..", ".", "", "a/../../precious", "link"]
)
def test_an_id_that_is_a_path_or_a_link_removes_nothing(tmp_path, outputs, predictions, prediction):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "letter").touch()
    (predictions / "link").symlink_to(precious)
    predict_as(prediction.format(absolute=precious), outputs)
    outputs.remove_all()
    assert (precious / "letter").exists() and predictions.exists()


def test_a_prediction_that_runs_keeps_its_folder_until_the_end(outputs, predictions):
    folder = predictions / "long"
    folder.mkdir()
    age(folder)

    def meanwhile():
        predict_as("short", outputs)
        assert folder.exists()
        outputs.remove_all()
        assert not folder.exists()

    predict_as("long", outputs, meanwhile)


def test_at_the_end_nothing_is_left_whatever_its_age(outputs, root):
    outputs.write([b"a", b"b"], "png")
    outputs.remove_all()
    assert list(root.iterdir()) == []
