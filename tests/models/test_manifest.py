import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from fewstep.errors import WeightsError
from fewstep.models.manifest import Origin, check_folder, check_hashes, read_manifest, write_manifest

REMEDY = "scripts/mend tiny"
UNET = "unet/diffusion_pytorch_model.safetensors"
ORIGIN = Origin("owner/tiny", "0" * 40, "MIT")


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


def write(folder, origins=None, **extra):
    return write_manifest(folder, model="tiny", origin=ORIGIN, origins=origins, extra=extra)


def check(folder):
    manifest = check_folder(folder, fix=REMEDY)
    check_hashes(folder, manifest, fix=REMEDY)
    return manifest


def refusal(folder):
    with pytest.raises(WeightsError) as caught:
        check(folder)
    text = str(caught.value)
    # One sentence, ending in the command, without the machine's own path.
    assert text.startswith("[weights] weights/tiny") and text.endswith(f"; run: {REMEDY}")
    assert "\n" not in text and str(folder.parent) not in text
    return text


def test_the_manifest_says_what_each_file_is_and_where_it_is_from(folder):
    vae = Origin("owner/vae", "1" * 40, "Apache-2.0")
    written = write(folder, {"unet/config.json": vae}, judge={"sha256": "ab"}, steps=[1, 2])

    assert read_manifest(folder, fix=REMEDY) == check(folder) == written
    assert (written.model, written.extra) == ("tiny", {"judge": {"sha256": "ab"}, "steps": [1, 2]})
    assert [file.path for file in written.files] == ["model_index.json", "unet/config.json", UNET]
    origins = [Origin(file.source, file.revision, file.licence) for file in written.files]
    assert origins == [ORIGIN, vae, ORIGIN]
    data = (folder / UNET).read_bytes()
    assert (written.files[2].size, written.files[2].sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_the_same_files_give_the_same_manifest_bytes_and_hidden_ones_are_not_listed(folder):
    first = (folder / "manifest.json").read_bytes()
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x").write_text("x")

    manifest = write(folder)

    assert (folder / "manifest.json").read_bytes() == first and len(manifest.files) == 3
    assert list(folder.glob(".*")) == [folder / ".cache"]


def test_the_card_may_change_and_harmless_files_may_lie_about(folder):
    (folder / "README.md").write_text("a better card")
    (folder / "notes.txt").write_text("mine")

    check(folder)


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
def test_a_file_that_is_not_as_listed_is_named(folder, path, spoil, said):
    spoil(folder / path)

    assert f"weights/tiny/{path} {said}" in refusal(folder)


def test_a_flipped_byte_is_found_by_the_hash_and_only_by_it(folder):
    data = bytearray((folder / UNET).read_bytes())
    data[5000] ^= 1
    (folder / UNET).write_bytes(data)

    text = refusal(folder)

    assert f"weights/tiny/{UNET} is damaged" in text
    assert hashlib.sha256(data).hexdigest()[:12] in text
    check_folder(folder, fix=REMEDY)


@pytest.mark.parametrize("name", ["unet/model.bin", "a.pt", "b.PTH", "c.ckpt", "vae/d.pkl", "e.pickle"])
def test_pickles_are_refused_even_when_listed(folder, name):
    (folder / "vae").mkdir()
    (folder / name).write_bytes(b"x")

    assert f"weights/tiny/{name} is a pickle" in refusal(folder)
    write(folder)
    assert f"weights/tiny/{name} is a pickle" in refusal(folder)


UNSOUND = [
    *(b"", b"{", b"null", b"[]", b"\xff\xfe", b"[" * 100_000, b"{}"),
    b'{"model": "tiny", "files": {}, "extra": {}}',
    b'{"model": "tiny", "files": [], "extra": {}}',
    b'{"model": "tiny", "files": [5], "extra": {}}',
    b'{"model": "tiny", "files": [{"path": "x"}], "extra": {}}',
    *({"size": "10240"}, {"size": None}, {"sha256": ""}, {"sha256": 5}, {"path": 5}, {"path": ""}),
    *({"surplus": 1}, {"path": UNET}),  # which is listed already
    *({"path": path} for path in ("../secret.json", "{outside}", "unet/../../secret.json")),
    *({"path": path} for path in ("way_out/secret.json", "a\0b")),
]


@pytest.mark.parametrize("wrong", UNSOUND)
def test_a_manifest_that_is_not_sound_is_named(folder, wrong):
    outside = folder.parent / "secret.json"
    outside.write_text("{}")
    (folder / "way_out").symlink_to(folder.parent)
    if isinstance(wrong, dict):
        content = json.loads((folder / "manifest.json").read_text())
        content["files"][0] |= wrong
        wrong = json.dumps(content).replace("{outside}", str(outside)).encode()
    (folder / "manifest.json").write_bytes(wrong)

    assert "weights/tiny/manifest.json is not a sound manifest" in refusal(folder)


def test_the_manifest_of_another_model_is_refused(folder):
    write_manifest(folder, model="sdxl", origin=ORIGIN)

    assert "manifest of another model" in refusal(folder)


def test_a_manifest_that_fails_to_be_written_leaves_the_old_one(folder):
    before = (folder / "manifest.json").read_bytes()

    with pytest.raises(TypeError):
        write(folder, judge=object())

    assert (folder / "manifest.json").read_bytes() == before
    check(folder)
