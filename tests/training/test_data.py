"""Images and captions as users have them: folders, zips, shards, and what is wrong with them."""

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from uploads import image, shard, zipped

from fewstep.errors import DatasetError
from fewstep.training import data
from fewstep.training.data import find, read_shards, unpack


def test_captions_are_read_from_a_list_or_from_beside(tmp_path):
    (tmp_path / "more").mkdir()
    for name in ("b.png", "a.jpg", "more/c.webp", "d.PNG", ".hidden.png"):
        (tmp_path / name).write_bytes(image(suffix=name[-3:].lower().replace("ebp", "webp")))
    rows = [{"file_name": "a.jpg", "text": "a red house"}, {"file_name": "b.png", "text": " two  "}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "more" / "c.txt").write_text("\ufeffthree\n", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("not a caption")
    found = find(tmp_path, caption="any")
    captions = {"a.jpg": "a red house", "b.png": "two", "d.PNG": "any", "c.webp": "three"}
    assert [(one.path.name, one.caption) for one in found] == [*captions.items()]
    with pytest.raises(DatasetError, match="1 of 4 pictures have no caption"):
        find(tmp_path)


NO_LINES = ["{", "[]", '{"file_name": "a.png"}', '"x"', '{"file_name": 3, "text": "x"}']


@pytest.mark.parametrize("line", [*NO_LINES, '{"file_name": "a.png", "text": null}'])
def test_a_list_that_is_none_is_refused_by_its_line(tmp_path, line):
    (tmp_path / "a.png").write_bytes(image())
    (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "a.png", "text": "x"}}\n{line}\n')
    with pytest.raises(DatasetError, match="line 2 of metadata.jsonl is not like"):
        find(tmp_path)


def test_a_line_of_the_list_ends_where_json_lines_end(tmp_path):
    (tmp_path / "a.png").write_bytes(image())
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "one\u2028two\u0085three"}\n')
    assert find(tmp_path)[0].caption == "one\u2028two\u0085three"


@pytest.mark.parametrize("name", ["a.txt", "metadata.jsonl"])
def test_a_caption_of_megabytes_is_refused(tmp_path, name):
    (tmp_path / "a.png").write_bytes(image())
    with (tmp_path / name).open("wb") as file:
        file.truncate(50_000_000)
    with pytest.raises(DatasetError, match="so it holds no captions"):
        find(tmp_path)


def test_no_image_at_all_is_said(tmp_path):
    (tmp_path / "a.gif").write_bytes(b"GIF89a")
    with pytest.raises(DatasetError, match="there is no picture"):
        find(tmp_path)


def test_a_zip_is_unpacked_as_it_is(tmp_path):
    files = {"a/b.png": image(), "a/b.txt": b"x", "empty/": b""}
    unpack(zipped(tmp_path / "x.zip", files), tmp_path / "out")
    assert (tmp_path / "out" / "a" / "b.png").read_bytes() == files["a/b.png"]
    assert [one.caption for one in find(tmp_path / "out")] == ["x"]


OUT = ["../x.png", "a/../../x.png", "/x.png", "..\\x.png", "C:/x.png", "C:\\x.png", "."]
LINK = zipfile.ZipInfo("a.png")
LINK.external_attr = 0o120777 << 16


@pytest.mark.parametrize(
    ("files", "message"),
    [
        *(({"a.png": b"1", name: b"2"}, "leads out of it") for name in OUT),
        ({LINK: "/etc/passwd"}, "holds a link"),
        (dict.fromkeys("abc", b""), "holds 3 files; at most 2"),
        (dict.fromkeys(("a", "a/b/c.png"), b"1"), "cannot be read"),  # a folder cannot have those names
        ({"x" * 300: b"1"}, "cannot be read"),
    ],
)
def test_a_zip_is_unpacked_into_its_folder_or_refused(tmp_path, monkeypatch, files, message):
    monkeypatch.setattr(data, "MAX_ENTRIES", 2)
    with pytest.raises(DatasetError, match=message):
        unpack(zipped(tmp_path / "x.zip", files), tmp_path / "in" / "out")
    assert not list(tmp_path.glob("**/x.png"))


def test_what_a_zip_holds_is_counted_while_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "MAX_BYTES", 3_000_000)
    bomb = zipped(tmp_path / "x.zip", {"a": bytes(2_000_000), "b": bytes(2_000_000)})
    content = bomb.read_bytes()
    assert len(content) < 10_000
    with pytest.raises(DatasetError, match="more than 0.003 GB"):
        unpack(bomb, tmp_path / "out")
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) <= 3_000_000


@pytest.mark.parametrize("how", ["text", "cut", "flipped", "twice"])
def test_what_is_no_sound_zip_is_refused(tmp_path, how):
    path = zipped(tmp_path / "x.zip", {"a.png": np.random.default_rng(0).bytes(5_000)})
    content = path.read_bytes()
    if how == "twice":
        with pytest.warns(UserWarning), zipfile.ZipFile(path, "a") as archive:
            archive.writestr("a.png", b"again")
    else:
        flipped = content[:1_000] + bytes([content[1_000] ^ 255]) + content[1_001:]
        path.write_bytes({"text": b"no zip", "cut": content[:2_000], "flipped": flipped}[how])
    with pytest.raises(DatasetError, match="cannot be read"):
        unpack(path, tmp_path / "out")


def test_shards_are_read_one_image_after_the_other(tmp_path, caplog):
    first = {"a.png": image(), "a.txt": b" a red house ", "b.jpg": image(suffix="jpg"), "b.txt": b"two"}
    second = {"c.webp": image(suffix="webp"), "c.json": b'{"caption": "three"}', "d.png": image()}
    shard(tmp_path / "set-00.tar", first)
    shard(tmp_path / "set-01.tar", {**second, "d.json": b"[1]", "e.txt": b"no picture"})
    images = read_shards(str(tmp_path / "set-{00..01}.tar"))
    found = [(one.caption, one.name, Image.open(one.path).format) for one in images]
    assert found == [("a red house", "a", "PNG"), ("two", "b", "JPEG"), ("three", "c", "WEBP")]
    assert "left out: d has no caption" in caplog.text and "left out: e has no picture" in caplog.text


def test_a_shard_that_breaks_off_gives_no_image_another_caption(tmp_path, caplog):
    shard(tmp_path / "0.tar", {"000.png": image(), "000.txt": b"first"})
    shard(tmp_path / "1.tar", {"000.png": image(), "000.txt": b"second"})
    content = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(content[: content.index(b"000.txt") + 100])
    assert [one.caption for one in read_shards(str(tmp_path / "{0..1}.tar"))] == ["second"]
    assert "000 has no caption" in caplog.text


def test_every_process_reads_all_of_a_shard_and_opens_no_pickle(tmp_path, monkeypatch):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    shard(tmp_path / "x.tar", {"a.png": image(), "a.txt": b"x", "a.pyd": pickle.dumps(Trap())})
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert len(list(read_shards(str(tmp_path / "x.tar")))) == 1
    assert not (tmp_path / "sprung").exists()
