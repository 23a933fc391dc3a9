"""Image files, made by hand where Pillow does not write them, and what opens or refuses them."""

import io
import os
import struct
import warnings
import zlib

import pytest
from PIL import ExifTags, Image, ImageDraw

from fewstep.errors import InvalidRequest
from fewstep.images.codec import open_image

RED, GREEN, BLUE, YELLOW = (220, 30, 30), (30, 200, 40), (30, 40, 220), (230, 220, 30)
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def corners(wide=64, high=32):
    """Red top left, green top right, blue bottom left, yellow bottom right."""
    image = Image.new("RGB", (wide, high))
    draw = ImageDraw.Draw(image)
    for i, colour in enumerate((RED, GREEN, BLUE, YELLOW)):
        x, y = i % 2 * wide // 2, i // 2 * high // 2
        draw.rectangle((x, y, x + wide // 2 - 1, y + high // 2 - 1), fill=colour)
    return image


def corners_of(image):
    x, y = image.width - 4, image.height - 4
    return [image.getpixel(at) for at in ((3, 3), (x, 3), (3, y), (x, y))]


def data_of(output_format="PNG", image=None, **options):
    file = io.BytesIO()
    (image or corners()).save(file, output_format, **options)
    return file.getvalue()


def written(folder, data):
    path = folder / "input"
    path.write_bytes(data)
    return path


def saved(folder, image, output_format="PNG", **options):
    return written(folder, data_of(output_format, image, **options))


def chunk(kind, data=b""):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(wide, high, depth, colour, rows, *, before=b"", after=b""):
    """A PNG made by hand, for what Pillow does not write; `rows` start with the number of their filter."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", wide, high, depth, colour, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(rows, 1))
    return b"\x89PNG\r\n\x1a\n" + header + before + pixels + after + chunk(b"IEND")


def exif(orientation, order="<", more=()):
    """EXIF of an orientation and `more` entries (tag, type, count, value)."""
    entries = [(ExifTags.Base.Orientation, 3, 1, orientation << (16 if order == ">" else 0)), *more]
    packed = b"".join(struct.pack(order + "HHII", *entry) for entry in entries)
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, len(entries))
    return b"Exif\0\0" + head + packed + bytes(4)


def near(pixel, other, tolerance=6):
    return all(abs(a - b) <= tolerance for a, b in zip(pixel, other, strict=True))


def opened(path, open_it=open_image):
    """What opens without a warning, since everything on stderr is shown to the caller."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image = open_it(path, "image")
    assert [str(warning.message) for warning in caught] == []
    return image


def refusal(path, open_it=open_image):
    with warnings.catch_warnings(record=True) as caught, pytest.raises(InvalidRequest) as refused:
        warnings.simplefilter("always")
        open_it(path, "init_picture")
    assert [str(warning.message) for warning in caught] == []
    sentence = refused.value.sentence
    assert sentence.startswith("init_picture ")
    assert str(path) not in sentence and "input" not in sentence
    return sentence


def decoded(data):
    return Image.open(io.BytesIO(data))


def open_files():
    return len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0
