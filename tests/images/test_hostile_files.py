"""What is refused, before it costs anything: what is no image, is broken or outgrows memory."""

import io
import os
import re
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from unittest.mock import Mock

import pytest
from image_files import (
    BLUE,
    GREEN,
    RED,
    YELLOW,
    chunk,
    corners,
    corners_of,
    data_of,
    decoded,
    near,
    opened,
    png,
    refusal,
    saved,
    written,
)
from PIL import Image, ImageFile, PngImagePlugin

from fewstep.errors import InvalidRequest
from fewstep.images.codec import INPUT_FORMATS, INPUT_MAX_BYTES, INPUT_MAX_PIXELS, open_image, open_mask

REPOSITORY = Path(__file__).resolve().parents[2]


def halves(data):
    return data[: len(data) // 2]


def with_flipped_byte(data, at):
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


# 64 x 32 pixels without any compression, so that whatever byte is changed is one of a pixel's.
STORED = (
    png(64, 32, 8, 2, b"")[:33] + chunk(b"IDAT", zlib.compress(bytes((1 + 64 * 3) * 32), 0)) + chunk(b"IEND")
)

# A progressive JPEG before, between and after the starts of its scans.
SCANS = re.split(rb"(?=\xff\xda)", data_of("JPEG", progressive=True))

HOSTILE = {
    "empty": b"",
    "one byte": b"\x89",
    "noise": bytes(range(256)) * 40,
    "html": b"<!DOCTYPE html><html><body>404 not found</body></html>",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"></svg>',
    **{kind: data_of(kind) for kind in ("PDF", "GIF", "TIFF", "EPS", "BMP")},
    "heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "fits": b"SIMPLE  =                    T".ljust(2880),
    "cut jpeg": halves(data_of("JPEG")),
    "cut progressive jpeg": halves(data_of("JPEG", progressive=True)),
    "cut png": halves(data_of("PNG")),
    "cut webp": halves(data_of("WEBP")),
    "only a jpeg's signature": data_of("JPEG")[:3],
    "only a png's signature": data_of("PNG")[:8],
    "only a webp's signature": data_of("WEBP")[:16],
    "png without its last chunk": data_of("PNG")[:-12],
    "png with a broken header": with_flipped_byte(STORED, 20),
    "png with broken pixels": with_flipped_byte(STORED, 500),
    "png of no known depth": png(64, 32, 3, 0, bytes(5000)),
    "png without pixels": png(64, 32, 8, 2, b""),
    "png of no width": png(0, 32, 8, 2, bytes(193 * 32)),
    "webp with broken pixels": with_flipped_byte(data_of("WEBP", lossless=True), 21),
    "jpeg of twelve bits": data_of("JPEG").replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"),
    "flood of empty segments": b"\xff\xd8" + b"\xff\xe5\0\2" * 300_000 + data_of("JPEG")[2:],
    "flood of scans": SCANS[0] + SCANS[1] * 1001 + b"".join(SCANS[1:]),
    "flood of empty chunks": STORED[:33] + chunk(b"IDAT") * 100_000 + STORED[33:],
}


@pytest.mark.parametrize("open_it", [open_image, open_mask])
@pytest.mark.parametrize("kind", HOSTILE)
def test_what_is_no_whole_image_of_an_allowed_format_is_refused(tmp_path, kind, open_it):
    sentence = refusal(written(tmp_path, HOSTILE[kind]), open_it)

    assert "does not open" in sentence and all(name in sentence for name in INPUT_FORMATS)


def test_what_is_no_file_is_refused(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    endless = Path("/dev/zero")

    for path in (tmp_path / "missing", tmp_path, pipe, endless, Path("a\0b"), tmp_path / ("x" * 300)):
        assert "no file that can be read" in refusal(path)


def test_a_file_may_have_so_many_bytes(tmp_path):
    path = tmp_path / "input"
    path.touch()

    os.truncate(path, INPUT_MAX_BYTES)
    assert "does not open" in refusal(path)
    os.truncate(path, 2**31)
    assert "2147.5 MB; at most 30 MB" in refusal(path)


@pytest.mark.parametrize(
    ("wide", "high", "sentence"),
    [
        (8000, INPUT_MAX_PIXELS // 8000, "does not open"),
        (8000, INPUT_MAX_PIXELS // 8000 + 1, "8000x4001 px; at most 32000000 px"),
        (2**31 - 1, 2**31 - 1, "at most 32000000 px"),
        (7, 4000, "7x4000 px; each side needs 8 px"),
        (4000, 7, "4000x7 px; each side needs 8 px"),
    ],
)
def test_a_size_is_judged_by_the_header_alone(tmp_path, wide, high, sentence):
    without_pixels = png(wide, high, 8, 2, b"")

    assert sentence in refusal(written(tmp_path, without_pixels))


@pytest.mark.parametrize("side", [(8, 8), (8, 2000)])
def test_small_and_thin_images_open(tmp_path, side):
    assert opened(saved(tmp_path, corners(*side))).size == side


EXTRAS = chunk(b"zTXt", b"broken\0\x09?") + chunk(b"prVt", bytes(9)) + chunk(b"eXIf", bytes(200_000))
ANOTHER = {"save_all": True, "append_images": [Image.new("RGB", (64, 32))]}
HARMLESS = {
    "animated webp": data_of("WEBP", **ANOTHER, lossless=True),
    "animated png": data_of("PNG", **ANOTHER),
    "phone's jpeg of several images": data_of("MPO", **ANOTHER),
    "phone's jpeg with a film": data_of("JPEG") + b"".join(os.urandom(250) + b"\xff\xda" for _ in range(900)),
    "jpeg that repeats a scan": SCANS[0] + SCANS[1] * 50 + b"".join(SCANS[1:]),
    "png with texts and unknown parts": EXTRAS.join((data_of()[:33], data_of()[33:-12], data_of()[-12:])),
}


@pytest.mark.parametrize("kind", HARMLESS)
def test_what_more_there_is_in_a_file_does_no_harm_to_its_first_image(tmp_path, kind):
    assert decoded(HARMLESS["phone's jpeg of several images"]).format == "MPO"

    image = opened(written(tmp_path, HARMLESS[kind]))

    assert image.size == (64, 32) and all(map(near, corners_of(image), (RED, GREEN, BLUE, YELLOW)))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError, "more memory than is free"),
        *((error, "does not open") for error in (AssertionError, zlib.error, RuntimeError)),
    ],
)
def test_whatever_pillow_raises_is_a_refusal(tmp_path, monkeypatch, error, words):
    monkeypatch.setattr(ImageFile.ImageFile, "load", Mock(side_effect=error("in " + str(tmp_path))))

    assert words in refusal(saved(tmp_path, corners(), "JPEG"))


@pytest.mark.parametrize("leaving", [KeyboardInterrupt, SystemExit])
def test_being_stopped_is_no_refusal(tmp_path, monkeypatch, leaving):
    monkeypatch.setattr(ImageFile.ImageFile, "load", Mock(side_effect=leaving))

    with pytest.raises(leaving):
        open_image(saved(tmp_path, corners(), "JPEG"), "image")


def animated_webp(side, frames):
    file = io.BytesIO()
    pair = [Image.new("RGB", (16, 16), colour) for colour in (RED, BLUE)]
    pair[0].save(file, "WEBP", save_all=True, append_images=pair[1:])
    data = file.getvalue()
    first = data.index(b"ANMF")
    canvas = (side - 1).to_bytes(3, "little") * 2
    frame = data[first : data.index(b"ANMF", first + 4)]
    body = data[8:24] + canvas + data[30:first] + frame * frames
    return b"RIFF" + struct.pack("<I", len(body)) + body


def animated_png(side, frames):
    pixels = zlib.compress(bytes((1 + side * 3) * side), 1)

    def control(number):
        return chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, side, side, 0, 0, 1, 10, 0, 0))

    more = b"".join(
        control(2 * i - 1) + chunk(b"fdAT", struct.pack(">I", 2 * i) + pixels) for i in range(1, frames)
    )
    before = chunk(b"acTL", struct.pack(">II", frames, 0)) + control(0)
    return png(side, side, 8, 2, bytes((1 + side * 3) * side), before=before, after=more)


def bit_png(side):
    return png(side, side, 1, 0, bytes((1 + (side + 7) // 8) * side))


def with_texts(*texts):
    return STORED[:33] + b"".join(texts) + STORED[33:]


def bombs():
    """Each with what comes of it: a size that opens, or None."""
    plain = zlib.compress(b"a" * 10**6)
    wide = zlib.compress(b"a" * 999_990 + "\N{GRINNING FACE}".encode())
    latin = [chunk(b"zTXt", b"%d\0\0" % i + plain) for i in range(70)]
    unicode = [chunk(b"iTXt", b"%d\0\1\0\0\0" % i + wide) for i in range(60)]
    return {
        "png of 9000": (bit_png(9000), None),
        "png of 13000": (bit_png(13_000), None),
        "png of 20000": (bit_png(20_000), None),
        "webp of 13000": (animated_webp(13_000, 1), None),
        "webp of 16384": (animated_webp(16_384, 1), None),
        "2 GB of text": (with_texts(struct.pack(">I", 2**31 - 1) + b"tEXt" + b"a" * 1000), None),
        "webp of 100,000 frames": (animated_webp(800, 100_000), (800, 800)),
        "png of 500 frames": (animated_png(800, 500), (800, 800)),
        "packed profile": (with_texts(chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(10**7)))), None),
        "packed texts": (with_texts(*latin), (64, 32)),
        "packed unicode": (with_texts(*unicode), (64, 32)),
    }


OPEN_AND_MEASURE = """
import sys
from pathlib import Path
from fewstep.errors import InvalidRequest
from fewstep.images.codec import open_image

def peak():  # not ru_maxrss, which a new process takes over from the one that started it
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

def outcome(path):
    try:
        return open_image(path, "image").size
    except InvalidRequest:
        return None

warm_up, *rest = map(Path, sys.argv[1:])
outcome(warm_up)
before = peak()
for path in rest:
    print(path.name, outcome(path), round(peak() - before), sep="|")
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak of memory is read from /proc")
def test_a_bomb_is_refused_or_harmless_in_little_memory(tmp_path):
    paths = [saved(tmp_path, corners())]
    expected = {}
    for name, (data, size) in bombs().items():
        paths.append(tmp_path / name)
        paths[-1].write_bytes(data)
        expected[name] = str(size)

    command = [sys.executable, "-c", OPEN_AND_MEASURE, *map(str, paths)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)

    assert (result.returncode, result.stderr) == (0, "")
    outcomes = [line.split("|") for line in result.stdout.splitlines()]
    assert {name: size for name, size, _ in outcomes} == expected
    assert [(name, grown) for name, _, grown in outcomes if int(grown) >= 50] == []


def test_pillow_is_left_as_it_was(tmp_path):
    def state():
        texts = PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY, list(warnings.filters)
        return Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, ImageFile.SAFEBLOCK, *texts

    before = state()
    open_image(saved(tmp_path, corners()), "image")
    for data in HOSTILE.values():
        with pytest.raises(InvalidRequest):
            open_image(written(tmp_path, data), "image")

    assert state() == before
    assert Image.MAX_IMAGE_PIXELS == 1024**3 // 4 // 3 and not ImageFile.LOAD_TRUNCATED_IMAGES
