"""fewstep/images/outputs.py: names, ages and what must never be removed."""

import contextvars
import os
import shutil
import time

import pytest

from fewstep.errors import SettingsError
from fewstep.images.outputs import KEEP_S, Outputs

prediction_id = contextvars.ContextVar[str]("_coglet_prediction_id")


def age(path, seconds=KEEP_S + 1):
    os.utime(path, (time.time() - seconds,) * 2)


def predict_as(prediction, outputs):
    def run():
        prediction_id.set(prediction)
        with outputs.prediction():
            pass

    contextvars.copy_context().run(run)


def test_files_keep_their_content_and_never_share_a_name(tmp_path):
    outputs = Outputs(tmp_path, None)
    paths = outputs.write([b"a", b"b"], "png") + outputs.write([b"c"], "png")
    assert [path.read_bytes() for path in paths] == [b"a", b"b", b"c"]
    assert len({path.name for path in paths}) == 3
    assert [path.name[-6:] for path in paths] == ["-0.png", "-1.png", "-0.png"]


def test_prepare_empties_the_root_of_our_files_only(tmp_path):
    (tmp_path / "holiday.png").write_bytes(b"not ours")
    Outputs(tmp_path, None).write([b"left behind"], "png")
    Outputs(tmp_path, None).prepare()
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.png"]


def test_a_start_removes_what_a_killed_server_left_and_nothing_of_one_that_lives(tmp_path):
    predictions = tmp_path / "predictions"
    roots = {name: tmp_path / name for name in ("gone", "killed", "living")}
    for name, root in roots.items():
        (predictions / name).mkdir(parents=True)
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


def test_a_finished_prediction_removes_what_is_old_and_keeps_what_is_not(tmp_path):
    outputs = Outputs(tmp_path, None)
    [old] = outputs.write([b"old"], "png")
    [new] = outputs.write([b"new"], "png")
    age(old)
    predict_as("another", outputs)
    assert list(tmp_path.iterdir()) == [new]


def test_coglets_folders_go_with_age_when_they_are_of_our_predictions(tmp_path):
    outputs = Outputs(tmp_path / "outputs", tmp_path / "predictions")
    for name in ("ours", "another-servers"):
        (tmp_path / "predictions" / name / "outputs").mkdir(parents=True)
    (tmp_path / "predictions" / "ours" / "outputs" / "spill.json").touch()
    predict_as("ours", outputs)
    assert (tmp_path / "predictions" / "ours").exists()
    for path in (tmp_path / "predictions").iterdir():
        age(path)
    predict_as("another", outputs)
    assert [path.name for path in (tmp_path / "predictions").iterdir()] == ["another-servers"]


@pytest.mark.parametrize("prediction", ["../precious", "{absolute}", "..", ".", "", "a/../../precious"])
def test_an_id_that_is_a_path_removes_nothing(tmp_path, prediction):
    precious = tmp_path / "precious"
    precious.mkdir()
    (tmp_path / "predictions").mkdir()
    outputs = Outputs(tmp_path / "outputs", tmp_path / "predictions")
    predict_as(prediction.format(absolute=precious), outputs)
    outputs.remove_all()
    assert precious.exists() and (tmp_path / "predictions").exists()


def test_a_prediction_that_runs_keeps_its_folder_until_the_end(tmp_path):
    outputs = Outputs(tmp_path / "outputs", tmp_path)
    folder = tmp_path / "long"
    folder.mkdir()
    age(folder)

    def run():
        prediction_id.set("long")
        with outputs.prediction():
            predict_as("short", outputs)
            assert folder.exists()
            outputs.remove_all()
            assert not folder.exists()

    contextvars.copy_context().run(run)


def test_a_link_in_place_of_a_folder_is_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "letter").touch()
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "link").symlink_to(precious)
    outputs = Outputs(tmp_path / "outputs", tmp_path / "predictions")
    predict_as("link", outputs)
    outputs.remove_all()
    assert (precious / "letter").exists()


def test_at_the_end_nothing_is_left_whatever_its_age(tmp_path):
    outputs = Outputs(tmp_path, None)
    outputs.write([b"a", b"b"], "png")
    outputs.remove_all()
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_gone_already_does_not_stop_the_removal(tmp_path):
    outputs = Outputs(tmp_path, None)
    gone, old = outputs.write([b"a", b"b"], "png")
    gone.unlink()
    age(old)
    predict_as("another", outputs)
    assert list(tmp_path.iterdir()) == []
