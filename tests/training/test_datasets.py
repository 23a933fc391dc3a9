"""Pictures and captions as users have them: folders, zips, broken files; and batches that resume exactly."""

import io
import json
import pickle
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import make_diffusers_folder

from fewstep.errors import DatasetError
from fewstep.miniature.drawing import draw
from fewstep.miniature.scenes import Scene
from fewstep.models import get_model
from fewstep.pipeline import load_pipeline
from fewstep.settings import Settings
from fewstep.training import datasets
from fewstep.training.datasets import Batches, Captioned, Encoder, find, read_shards, unpack
from fewstep.training.loop import WHOLE, Share
from fewstep.training.sources import load_base

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
    "line",
    ["{", "[]", '{"file_name": "a.png"}', '"x"', '{"file_name": 3, "text": "x"}']
    + ['{"file_name": "a.png", "text": null}'],
)
def test_a_list_that_is_none_is_refused_by_its_line(tmp_path, line):
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "a.png", "text": "x"}}\n{line}\n')
    with pytest.raises(DatasetError, match="line 2 of metadata.jsonl is not like"):
        find(tmp_path)


def test_a_line_of_the_list_ends_where_json_lines_end(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "one\u2028two\u0085three"}\n')
    assert find(tmp_path)[0].caption == "one\u2028two\u0085three"


@pytest.mark.parametrize("name", ["a.txt", "metadata.jsonl"])
def test_a_caption_of_megabytes_is_refused(tmp_path, name):
    (tmp_path / "a.png").write_bytes(picture())
    with (tmp_path / name).open("wb") as file:
        file.truncate(50_000_000)
    with pytest.raises(DatasetError, match="so it holds no captions"):
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
    "name", ["../x.png", "a/../../x.png", "/x.png", "..\\x.png", "C:/x.png", "C:\\x.png", "."]
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


@pytest.mark.parametrize("names", [("a", "a/b/c.png"), ("x" * 300,)])
def test_names_that_no_folder_can_have_are_refused(tmp_path, names):
    with pytest.raises(DatasetError, match="cannot be read"):
        unpack(zipped(tmp_path / "x.zip", dict.fromkeys(names, b"1")), tmp_path / "out")


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
def diffusion():
    return load_base("miniature", Settings(verify="size"), torch.device("cpu"))


def captioned(folder, **files):
    found = []
    for name, content in files.items():
        (folder / f"{name}.png").write_bytes(content)
        found.append(Captioned(folder / f"{name}.png", f"a {name} house", f"{name}.png"))
    return found


def test_an_example_is_the_picture_at_its_nearest_native_size(diffusion, tmp_path):
    pictures = captioned(tmp_path, wide=picture((600, 300)), square=picture((100, 100)))
    encoder = Encoder(diffusion, tmp_path / "encoded")
    wide, square = map(load_file, encoder.encode_all(pictures))
    assert (wide["latents"].shape, square["latents"].shape) == ((4, 12, 21), (4, 16, 16))
    # 600x300 covers 168x96 at a scale of 0.32, where 12 px are too much on both sides.
    assert wide["time_ids"].tolist() == [300, 600, 0, 12, 96, 168]
    assert square["time_ids"].tolist() == [100, 100, 0, 0, 128, 128]
    assert encoder.captions == ["a wide house", "a square house"]
    assert encoder.no_prompt() is None  # SDXL's is all zeros

    house = draw(Scene("house", "red", "meadow", "mountains", "day", "middle"), 1)
    house.save(tmp_path / "house.png")
    [drawn] = map(load_file, encoder.encode_all([Captioned(tmp_path / "house.png", "a house", "house.png")]))
    vae = diffusion.vae
    with torch.inference_mode():
        back = vae.decode(drawn["latents"][None].float() / vae.config.scaling_factor).sample[0]
    expected = torch.from_numpy(np.array(house)).permute(2, 0, 1) / 127.5 - 1
    assert (back - expected).abs().mean() < 0.1


def test_what_the_unet_is_told_is_what_a_painter_tells_it(diffusion, tmp_path):
    [wide] = map(
        load_file, Encoder(diffusion, tmp_path / "e").encode_all(captioned(tmp_path, wide=picture()))
    )
    prompt = load_pipeline(MINIATURE, Settings(dtype="fp32", verify="size")).text.encode("a wide house")
    torch.testing.assert_close(wide["prompt_embeds"].float(), prompt.states[0], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(wide["pooled"].float(), prompt.pooled[0], rtol=2e-3, atol=2e-3)


def test_encoded_pictures_are_found_again_by_what_they_depend_on(diffusion, tmp_path, monkeypatch):
    pictures = captioned(tmp_path, one=picture(), other=picture(colour="blue"))
    first = Encoder(diffusion, tmp_path / "encoded").encode_all(pictures)
    with monkeypatch.context() as patched:
        patched.setattr(diffusion.vae, "encode", None)
        assert Encoder(diffusion, tmp_path / "encoded").encode_all(pictures) == first
    renamed = [Captioned(one.path, "another", one.name) for one in pictures]
    assert not set(first) & set(Encoder(diffusion, tmp_path / "encoded").encode_all(renamed))
    smaller = Encoder(diffusion, tmp_path / "encoded", 64).encode_all(pictures)
    assert not set(first) & set(smaller) and load_file(smaller[0])["latents"].shape == (4, 8, 8)
    with torch.no_grad():
        bias = diffusion.vae.encoder.conv_in.bias
        bias.add_(1)
        assert not set(first) & set(Encoder(diffusion, tmp_path / "encoded").encode_all(pictures))
        bias.sub_(1)


@pytest.mark.parametrize("side", [100, 32, 4096])
def test_a_resolution_that_cannot_be_trained_at_is_refused(diffusion, tmp_path, side):
    with pytest.raises(DatasetError, match=f"resolution is {side}; it must be a multiple of 8 from 64 to"):
        Encoder(diffusion, tmp_path, side)


def test_a_broken_picture_is_named_and_left_out(diffusion, tmp_path, caplog):
    pictures = captioned(tmp_path, good=picture(), bad=picture()[:60])
    encoder = Encoder(diffusion, tmp_path / "encoded")
    assert len(encoder.encode_all(pictures)) == 1
    assert "bad.png" in caplog.text and encoder.captions == ["a good house"]
    with pytest.raises(DatasetError, match="none of 1 pictures can be opened"):
        encoder.encode_all(pictures[1:])


def shard(path, samples):
    with tarfile.open(path, "w") as archive:
        for name, content in samples.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def test_shards_are_read_one_picture_after_the_other(tmp_path, caplog):
    shard(
        tmp_path / "set-00.tar",
        {"a.png": picture(), "a.txt": b" a red house ", "b.jpg": picture(suffix="jpg"), "b.txt": b"two"},
    )
    told = json.dumps({"caption": "three"}).encode()
    shard(
        tmp_path / "set-01.tar",
        {"c.webp": picture(suffix="webp"), "c.json": told, "d.png": picture(), "d.json": b"[1]"}
        | {"e.txt": b"no picture"},
    )
    found = [
        (one.caption, one.name, Image.open(one.path).format)
        for one in read_shards(str(tmp_path / "set-{00..01}.tar"))
    ]
    assert found == [("a red house", "a", "PNG"), ("two", "b", "JPEG"), ("three", "c", "WEBP")]
    assert "left out: d has no caption" in caplog.text and "left out: e has no picture" in caplog.text


def test_a_shard_that_breaks_off_gives_no_picture_another_caption(tmp_path, caplog):
    shard(tmp_path / "0.tar", {"000.png": picture(), "000.txt": b"first"})
    shard(tmp_path / "1.tar", {"000.png": picture(), "000.txt": b"second"})
    content = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(content[: content.index(b"000.txt") + 100])
    assert [one.caption for one in read_shards(str(tmp_path / "{0..1}.tar"))] == ["second"]
    assert "000 has no caption" in caplog.text


def test_every_process_reads_all_shards(tmp_path, monkeypatch):
    shard(tmp_path / "x.tar", {"a.png": picture(), "a.txt": b"x"})
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert len(list(read_shards(str(tmp_path / "x.tar")))) == 1


def test_shards_are_encoded_up_to_a_limit(diffusion, tmp_path):
    shard(tmp_path / "x.tar", {f"{i}.png": picture(colour=(i, 0, 0)) for i in range(5)})
    encoder = Encoder(diffusion, tmp_path / "encoded")
    assert len(set(encoder.encode_all(read_shards(str(tmp_path / "x.tar"), "any"), limit=3))) == 3


def test_a_pickle_in_a_shard_is_not_opened(tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    shard(tmp_path / "x.tar", {"a.png": picture(), "a.txt": b"x", "a.pyd": pickle.dumps(Trap())})
    assert len(list(read_shards(str(tmp_path / "x.tar")))) == 1
    assert not (tmp_path / "sprung").exists()


def test_no_shards_are_said(diffusion, tmp_path):
    with pytest.raises(DatasetError, match="none of 0 pictures"):
        Encoder(diffusion, tmp_path).encode_all(read_shards(str(tmp_path / "nothing.tar")))


def encoded(folder, *shapes):
    paths = []
    for i, shape in enumerate(shapes):
        paths.append(folder / f"{i}.safetensors")
        rows = {"latents": torch.full((4, *shape), float(i)), "prompt_embeds": torch.zeros(2, 3)}
        rows |= {"pooled": torch.zeros(5), "time_ids": torch.zeros(6)}
        save_file(rows, paths[-1])
    return paths


def shown(batches, step, share=WHOLE):
    return [int(value) for value in batches(step, share).latents[:, 0, 0, 0]]


def test_every_picture_is_shown_once_an_epoch_beside_others_of_its_shape(tmp_path):
    batches = Batches(encoded(tmp_path, *[(16, 16)] * 7, *[(12, 20)] * 2), 3, 5, torch.device("cpu"))
    epochs = [[shown(batches, 4 * epoch + step) for step in range(4)] for epoch in range(2)]
    for epoch in epochs:
        counts = Counter(i for batch in epoch for i in batch)
        assert set(counts) == set(range(9)) and max(counts.values()) <= 2
        assert all(len(batch) == 3 and len({i < 7 for i in batch}) == 1 for batch in epoch)
    assert epochs[0] != epochs[1]


def test_a_batch_depends_on_its_step_and_the_seed_alone(tmp_path):
    every = encoded(tmp_path, *[(16, 16)] * 10)
    one, other, third = (Batches(every, 4, seed, torch.device("cpu")) for seed in (5, 5, 6))
    expected = [shown(one, step) for step in range(9)]
    assert shown(other, 7) == expected[7]
    assert [shown(third, step) for step in range(9)] != expected
    assert shown(other, 7, Share(0, 2)) + shown(other, 7, Share(1, 2)) == expected[7]
    batch = one(0)
    assert (
        batch.prompt_embeds.shape == (4, 2, 3)
        and batch.pooled.shape == (4, 5)
        and batch.time_ids.shape == (4, 6)
    )


def test_sd_has_no_pooled_states_and_an_empty_prompt_of_its_own(tmp_path):
    sd = make_diffusers_folder(get_model("sd15"), tmp_path / "sd15")
    diffusion = load_base(str(sd), Settings(), torch.device("cpu"))
    encoder = Encoder(diffusion, tmp_path / "encoded")
    files = encoder.encode_all(captioned(tmp_path, one=picture()))
    batch = Batches(files, 2, 0, torch.device("cpu"), encoder.no_prompt())(0)
    assert batch.pooled is None and batch.time_ids is None and len(batch.latents) == 2
    empty = batch.without_prompt().prompt_embeds
    assert empty.shape == batch.prompt_embeds.shape and empty.any()
