import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from fewstep.errors import WeightsError
from fewstep.models.manifest import Origin, read_manifest, verify_weights, write_manifest

REMEDY = "scripts/mend tiny"
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A weights folder with its manifest, as a model's save leaves it."""
    folder = tmp_path / "weights" / "tiny"
    (folder / "unet").mkdir(parents=True)
    (folder / UNET).write_bytes(bytes(range(256)) * 40)
    (folder / "unet" / "config.json").write_text("{}")
    (folder / "model_index.json").write_text("{}")
    (folder / "README.md").write_text("a card")
    write(folder)
    return folder


def write(folder, **extra):
    origin = Origin("owner/tiny", "0" * 40, "MIT")
    return write_manifest(folder, model="tiny", origin=origin, extra=extra)


def edit_manifest(folder, edit):
    content = json.loads((folder / "manifest.json").read_text())
    edit(content)
    (folder / "manifest.json").write_text(json.dumps(content))


def refusal(folder, mode="sha256"):
    with pytest.raises(WeightsError) as caught:
        verify_weights(folder, fix=REMEDY, mode=mode)
    text = str(caught.value)
    # One sentence, ending in the command, without the machine's own path.
    assert text.startswith("[weights] weights/tiny") and text.endswith(f"; run: {REMEDY}")
    assert "\n" not in text and str(folder.parent) not in text
    return text


def test_what_is_written_is_read_and_verified(folder):
    written = write(folder, judge={"sha256": "ab"}, steps=[1, 2])

    assert read_manifest(folder, fix=REMEDY) == written
    assert verify_weights(folder, fix=REMEDY, mode="sha256") == written
    assert verify_weights(folder, fix=REMEDY, mode="size") == written


def test_the_manifest_says_what_each_file_is_and_where_it_is_from(folder):
    manifest = write(folder, judge="ab")

    assert [file.path for file in manifest.files] == ["model_index.json", "unet/config.json", UNET]
    unet = manifest.files[2]
    data = (folder / UNET).read_bytes()
    assert (unet.size, unet.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert (unet.source, unet.revision, unet.licence) == ("owner/tiny", "0" * 40, "MIT")
    assert (manifest.model, manifest.extra) == ("tiny", {"judge": "ab"})


def test_files_of_one_folder_may_come_from_different_places(folder):
    vae = Origin("owner/vae", "1" * 40, "Apache-2.0")
    rest = Origin("owner/tiny", "0" * 40, "MIT")

    written = write_manifest(folder, model="tiny", origin=rest, origins={"unet/config.json": vae})

    found = {file.path: (file.source, file.revision, file.licence) for file in written.files}
    assert found.pop("unet/config.json") == ("owner/vae", "1" * 40, "Apache-2.0")
    assert set(found.values()) == {("owner/tiny", "0" * 40, "MIT")}


def test_hidden_files_are_not_listed_and_none_is_left(folder):
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("x")

    manifest = write(folder)

    assert len(manifest.files) == 3
    assert list(folder.glob(".*")) == [folder / ".cache"]


def test_the_same_files_give_the_same_manifest_bytes(folder):
    first = (folder / "manifest.json").read_bytes()
    write(folder)

    assert (folder / "manifest.json").read_bytes() == first


def test_the_card_may_change_and_harmless_files_may_lie_about(folder):
    (folder / "README.md").write_text("a better card")
    (folder / "notes.txt").write_text("mine")

    verify_weights(folder, fix=REMEDY)


def test_a_missing_folder_is_named(folder):
    shutil.rmtree(folder)

    assert refusal(folder) == f"[weights] weights/tiny is missing; run: {REMEDY}"


def swap(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("path", "spoil", "said"),
    [
        ("manifest.json", Path.unlink, "is missing"),
        (UNET, Path.unlink, "is missing"),
        ("model_index.json", swap, "is missing"),
        (UNET, lambda path: os.truncate(path, 10_000), "has 10000 bytes where 10240 are expected"),
        ("unet/other.fp16.safetensors", Path.touch, "is not in the manifest"),
    ],
)
@pytest.mark.parametrize("mode", ["sha256", "size"])
def test_a_file_that_is_not_as_listed_is_named(folder, path, spoil, said, mode):
    spoil(folder / path)

    assert f"weights/tiny/{path} {said}" in refusal(folder, mode)


def test_a_flipped_byte_is_found_by_the_hash_and_only_by_it(folder):
    data = bytearray((folder / UNET).read_bytes())
    data[5000] ^= 1
    (folder / UNET).write_bytes(data)

    text = refusal(folder)

    assert f"weights/tiny/{UNET} is damaged" in text
    assert hashlib.sha256(data).hexdigest()[:12] in text
    verify_weights(folder, fix=REMEDY, mode="size")


@pytest.mark.parametrize("name", ["unet/model.bin", "a.pt", "b.PTH", "c.ckpt", "vae/d.pkl", "e.pickle"])
def test_pickles_are_refused_even_when_listed(folder, name):
    (folder / "vae").mkdir()
    (folder / name).write_bytes(b"x")

    assert f"weights/tiny/{name} is a pickle" in refusal(folder)
    write(folder)
    assert f"weights/tiny/{name} is a pickle" in refusal(folder)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"null", b"[]", b"\xff\xfe", b"[" * 100_000, b"{}"),
        b'{"model": "tiny", "files": {}, "extra": {}}',
        b'{"model": "tiny", "files": [], "extra": {}}',
        b'{"model": "tiny", "files": [5], "extra": {}}',
        b'{"model": "tiny", "files": [{"path": "x"}], "extra": {}}',
    ],
)
def test_a_manifest_that_cannot_be_read_is_named(folder, content):
    (folder / "manifest.json").write_bytes(content)

    assert "weights/tiny/manifest.json is not a sound manifest" in refusal(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("size", "10240"), ("size", None), ("sha256", ""), ("sha256", 5)),
        *(("path", 5), ("path", ""), ("surplus", 1)),
    ],
)
def test_a_manifest_with_a_bad_field_is_refused(folder, key, value):
    edit_manifest(folder, lambda content: content["files"][0].update({key: value}))

    assert "weights/tiny/manifest.json is not a sound manifest" in refusal(folder)


def test_a_path_listed_twice_is_refused(folder):
    edit_manifest(folder, lambda content: content["files"].append(content["files"][0]))

    assert "not a sound manifest" in refusal(folder)


def test_paths_that_lead_out_of_the_folder_are_refused(folder):
    outside = folder.parent / "secret.json"
    outside.write_text("{}")
    (folder / "way_out").symlink_to(folder.parent)
    for path in ("../secret.json", str(outside), "unet/../../secret.json", "way_out/secret.json", "a\0b"):
        edit_manifest(folder, lambda content, path=path: content["files"][0].update(path=path))

        assert "not a sound manifest" in refusal(folder)


def test_the_manifest_of_another_model_is_refused(folder):
    edit_manifest(folder, lambda content: content.update(model="sdxl"))

    assert "manifest of another model" in refusal(folder)


def test_a_manifest_that_fails_to_be_written_leaves_the_old_one(folder):
    before = (folder / "manifest.json").read_bytes()

    with pytest.raises(TypeError):
        write(folder, judge=object())

    assert (folder / "manifest.json").read_bytes() == before
    verify_weights(folder, fix=REMEDY)
