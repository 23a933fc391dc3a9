"""Pictures and captions as users have them: folders, zips, broken files; and batches that resume exactly."""

import io
import json
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.errors import DatasetError
from fewstep.miniature.drawing import draw
from fewstep.miniature.scenes import Scene
from fewstep.models import get_model
from fewstep.pipeline import load_pipeline
from fewstep.settings import Settings
from fewstep.training import datasets
from fewstep.training.datasets import Batches, Captioned, Example, encode, find, unpack

MINIATURE = get_model("miniature")


def picture(size=(128, 128), colour="red", suffix="png") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, suffix.upper().replace("JPG", "JPEG"))
    return file.getvalue()


def zipped(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_captions_are_read_from_a_list_or_from_beside(tmp_path):
    (tmp_path / "more").mkdir()
    for name in ("b.png", "a.jpg", "more/c.webp", "d.PNG", ".hidden.png"):
        (tmp_path / name).write_bytes(picture(suffix=name[-3:].lower().replace("ebp", "webp")))
    rows = [{"file_name": "a.jpg", "text": "a red house"}, {"file_name": "b.png", "text": " two  "}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "more" / "c.txt").write_text("\ufeffthree\n", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("not a caption")
    found = find(tmp_path, caption="any")
    assert [(one.path.name, one.caption) for one in found] == [
        ("a.jpg", "a red house"),
        ("b.png", "two"),
        ("d.PNG", "any"),
        ("c.webp", "three"),
    ]
    with pytest.raises(DatasetError, match="1 of 4 pictures have no caption"):
        find(tmp_path)


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"file_name": "a.png"}', '"x"', '{"file_name": 3, "text": "x"}']
)
def test_a_list_that_is_none_is_refused_by_its_line(tmp_path, line):
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "a.png", "text": "x"}}\n{line}\n')
    with pytest.raises(DatasetError, match="line 2 of metadata.jsonl is not like"):
        find(tmp_path)


def test_no_picture_at_all_is_said(tmp_path):
    (tmp_path / "a.gif").write_bytes(b"GIF89a")
    with pytest.raises(DatasetError, match="there is no picture"):
        find(tmp_path)


def test_a_zip_is_unpacked_as_it_is(tmp_path):
    files = {"a/b.png": picture(), "a/b.txt": b"x", "empty/": b""}
    unpack(zipped(tmp_path / "x.zip", files), tmp_path / "out")
    assert (tmp_path / "out" / "a" / "b.png").read_bytes() == files["a/b.png"]
    assert [one.caption for one in find(tmp_path / "out")] == ["x"]


@pytest.mark.parametrize(
    "name", ["../x.png", "a/../../x.png", "/x.png", "..\\x.png", "C:/x.png", "C:\\x.png"]
)
def test_a_path_out_of_the_zip_is_refused(tmp_path, name):
    with pytest.raises(DatasetError, match="leads out of it"):
        unpack(zipped(tmp_path / "x.zip", {"a.png": b"1", name: b"2"}), tmp_path / "in" / "out")
    assert not list(tmp_path.glob("**/x.png"))


def test_a_link_in_a_zip_is_refused(tmp_path):
    link = zipfile.ZipInfo("a.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(DatasetError, match="holds a link"):
        unpack(tmp_path / "x.zip", tmp_path / "out")


def test_what_a_zip_holds_is_counted_while_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "MAX_BYTES", 3_000_000)
    bomb = zipped(tmp_path / "x.zip", {"a": bytes(2_000_000), "b": bytes(2_000_000)})
    content = bomb.read_bytes()
    assert len(content) < 10_000
    with pytest.raises(DatasetError, match="more than 0.003 GB"):
        unpack(bomb, tmp_path / "out")
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) <= 3_000_000


def test_too_many_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "MAX_ENTRIES", 2)
    with pytest.raises(DatasetError, match="holds 3 files; at most 2"):
        unpack(zipped(tmp_path / "x.zip", dict.fromkeys("abc", b"")), tmp_path / "out")


@pytest.mark.parametrize("how", ["text", "cut", "flipped", "twice"])
def test_what_is_no_sound_zip_is_refused(tmp_path, how):
    path = zipped(tmp_path / "x.zip", {"a.png": np.random.default_rng(0).bytes(5_000)})
    content = bytearray(path.read_bytes())
    if how == "text":
        path.write_text("no zip")
    elif how == "cut":
        path.write_bytes(content[:2_000])
    elif how == "flipped":
        content[1_000] ^= 255
        path.write_bytes(content)
    else:
        with pytest.warns(UserWarning), zipfile.ZipFile(path, "a") as archive:
            archive.writestr("a.png", b"again")
    with pytest.raises(DatasetError, match="cannot be read"):
        unpack(path, tmp_path / "out")


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(MINIATURE, Settings(dtype="fp32", verify="size"))


def captioned(folder, **files):
    found = []
    for name, content in files.items():
        (folder / f"{name}.png").write_bytes(content)
        found.append(Captioned(folder / f"{name}.png", f"a {name} house"))
    return found


def test_an_example_is_the_picture_at_its_nearest_native_size(pipeline, tmp_path):
    wide, square = encode(pipeline, captioned(tmp_path, wide=picture((600, 300)), square=picture((100, 100))))
    assert (wide.latents.shape, square.latents.shape) == ((4, 12, 21), (4, 16, 16))
    # 600x300 covers 168x96 at a scale of 0.32, where 12 px are too much on both sides.
    assert wide.time_ids.tolist() == [300, 600, 0, 12, 96, 168]
    assert square.time_ids.tolist() == [100, 100, 0, 0, 128, 128]
    house = draw(Scene("house", "red", "meadow", "mountains", "day", "middle"), 1)
    house.save(tmp_path / "house.png")
    [drawn] = encode(pipeline, [Captioned(tmp_path / "house.png", "a house")])
    vae = pipeline.diffusion.vae
    with torch.inference_mode():
        back = vae.decode(drawn.latents[None] / vae.config.scaling_factor).sample[0]
    expected = torch.from_numpy(np.array(house)).permute(2, 0, 1) / 127.5 - 1
    assert (back - expected).abs().mean() < 0.1
    prompt = pipeline.text.encode("a wide house")
    assert torch.equal(wide.prompt_embeds, prompt.states[0]) and torch.equal(wide.pooled, prompt.pooled[0])


def test_a_broken_picture_is_named_and_left_out(pipeline, tmp_path, caplog):
    pictures = captioned(tmp_path, good=picture(), bad=picture()[:60])
    assert len(encode(pipeline, pictures)) == 1
    assert "bad.png" in caplog.text
    with pytest.raises(DatasetError, match="none of 1 pictures can be opened"):
        encode(pipeline, pictures[1:])


def examples(*shapes):
    return [
        Example(torch.full((4, *shape), float(i)), torch.zeros(2, 3), torch.zeros(5), torch.zeros(6))
        for i, shape in enumerate(shapes)
    ]


def shown(batches, step):
    return [int(value) for value in batches(step).latents[:, 0, 0, 0]]


def test_every_picture_is_shown_once_an_epoch_beside_others_of_its_shape():
    batches = Batches(examples(*[(16, 16)] * 7, *[(12, 20)] * 2), 3, 5, torch.device("cpu"))
    epochs = [[shown(batches, 4 * epoch + step) for step in range(4)] for epoch in range(2)]
    for epoch in epochs:
        counts = Counter(i for batch in epoch for i in batch)
        assert set(counts) == set(range(9)) and max(counts.values()) <= 2
        assert all(len(batch) == 3 and len({i < 7 for i in batch}) == 1 for batch in epoch)
    assert epochs[0] != epochs[1]


def test_a_batch_depends_on_its_step_and_the_seed_alone():
    every = examples(*[(16, 16)] * 10)
    one, other, third = (Batches(every, 4, seed, torch.device("cpu")) for seed in (5, 5, 6))
    expected = [shown(one, step) for step in range(9)]
    assert shown(other, 7) == expected[7]
    assert [shown(third, step) for step in range(9)] != expected
    batch = one(0)
    assert (
        batch.prompt_embeds.shape == (4, 2, 3)
        and batch.pooled.shape == (4, 5)
        and batch.time_ids.shape == (4, 6)
    )


def test_sd_has_no_pooled_states():
    rows = [Example(torch.zeros(4, 8, 8), torch.zeros(2, 3), None, None)]
    batch = Batches(rows, 2, 0, torch.device("cpu"))(0)
    assert batch.pooled is None and batch.time_ids is None and len(batch.latents) == 2
