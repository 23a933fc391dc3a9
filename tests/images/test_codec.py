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

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, ImageDraw, ImageFile, ImageOps, PngImagePlugin

from fewstep.errors import InvalidRequest
from fewstep.images.codec import (
    INPUT_FORMATS,
    INPUT_MAX_BYTES,
    INPUT_MAX_PIXELS,
    MIME_TYPES,
    encode_image,
    fit,
    open_image,
    open_mask,
    same_shape,
)
from fewstep.request import FORMATS

REPOSITORY = Path(__file__).resolve().parents[2]

PILLOWS_NAMES = {"webp": "WEBP", "jpg": "JPEG", "png": "PNG"}


@pytest.fixture
def picture():
    y, x = np.mgrid[0:96, 0:160] / 160
    waves = np.stack([np.sin(9 * x + 4 * y), np.cos(7 * y * x), np.sin(11 * x * y + 1)], axis=-1)
    return Image.fromarray((waves * 100 + 128).astype(np.uint8))


def decoded(data):
    return Image.open(io.BytesIO(data))


def mean_error(image, other):
    return np.abs(np.asarray(image, np.float64) - np.asarray(other.convert("RGB"), np.float64)).mean()


@pytest.mark.parametrize("output_format", FORMATS)
def test_a_file_is_of_its_format_and_shows_the_image(picture, output_format):
    data = encode_image(picture, output_format, 90)

    assert data == encode_image(picture.copy(), output_format, 90)
    result = decoded(data)
    assert result.format == PILLOWS_NAMES[output_format]
    assert Image.MIME[result.format] == MIME_TYPES[output_format]
    assert (result.size, result.mode) == (picture.size, "RGB")
    assert mean_error(picture, result) < 4


def test_there_are_no_other_formats_than_a_requests(picture):
    assert tuple(MIME_TYPES) == FORMATS
    with pytest.raises(ValueError, match="webp, jpg, png"):
        encode_image(picture, "bmp", 90)


def test_png_keeps_every_pixel_at_any_quality(picture):
    for quality in (1, 100):
        assert mean_error(picture, decoded(encode_image(picture, "png", quality))) == 0


@pytest.mark.parametrize("output_format", ["webp", "jpg"])
def test_quality_trades_size_for_error(picture, output_format):
    low, middle, high = (encode_image(picture, output_format, quality) for quality in (1, 60, 100))

    assert len(low) < len(middle) < len(high)
    assert mean_error(picture, decoded(low)) > mean_error(picture, decoded(middle))
    assert mean_error(picture, decoded(middle)) > mean_error(picture, decoded(high))


def test_a_jpg_of_high_quality_keeps_colour_at_full_resolution():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = (220, 30, 30)
    stripes[:, 1::2] = (30, 30, 220)
    picture = Image.fromarray(stripes)

    assert mean_error(picture, decoded(encode_image(picture, "jpg", 90))) < 10
    assert mean_error(picture, decoded(encode_image(picture, "jpg", 89))) > 20


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


def open_files():
    return len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0


@pytest.mark.parametrize("input_format", INPUT_FORMATS)
def test_an_input_opens_as_a_image_of_its_own(tmp_path, input_format):
    path = saved(tmp_path, corners(), input_format, quality=95)
    files = open_files()

    image = opened(path)
    assert open_files() == files
    path.unlink()

    assert type(image) is Image.Image
    assert (image.mode, image.size) == ("RGB", (64, 32))
    assert all(map(near, corners_of(image), (RED, GREEN, BLUE, YELLOW)))


@pytest.mark.parametrize("input_format", INPUT_FORMATS)
def test_a_photo_held_sideways_comes_out_upright(tmp_path, input_format):
    image = opened(saved(tmp_path, corners(), input_format, exif=exif(6), quality=95))

    assert image.size == (32, 64)
    assert all(map(near, corners_of(image), (BLUE, RED, YELLOW, GREEN)))


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_turned_as_pillow_turns_it(tmp_path, orientation, order):
    path = saved(tmp_path, corners(), exif=exif(orientation, order))
    with Image.open(path) as file:
        expected = ImageOps.exif_transpose(file)

    for open_it, mode in ((open_image, "RGB"), (open_mask, "L")):
        assert opened(path, open_it).tobytes() == expected.convert(mode).tobytes()


@pytest.mark.parametrize(
    "odd",
    [
        exif(6, more=[(0x010F + i, 2, 50_000, 8) for i in range(200)]),
        exif(6, more=[(0x011A, 5, 1, 2**32 - 1), (0x8769, 4, 1, 2**31)]),
        exif(6)[:-4],
        exif(6) + bytes(60_000),
    ],
    ids=["longer-than-the-file", "pointing-outside", "cut-short", "padded"],
)
@pytest.mark.parametrize("input_format", INPUT_FORMATS)
def test_odd_exif_neither_fails_nor_warns(tmp_path, input_format, odd):
    data = saved(tmp_path, corners(), input_format, exif=odd, quality=95).read_bytes()
    if input_format == "JPEG":
        data = data[:2] + data[20:]  # without JFIF, as cameras write it, Pillow reads EXIF early
        assert data[2:4] == b"\xff\xe1"

    assert corners_of(opened(written(tmp_path, data)))[0] == pytest.approx(BLUE, abs=6)


@pytest.mark.parametrize("odd", [b"", b"II*\0\xff\xff\xff\xff", b"MM\0*", exif(6)[6:20]])
def test_exif_that_says_nothing_leaves_the_image_as_it_is(tmp_path, odd):
    assert opened(saved(tmp_path, corners(), exif=b"Exif\0\0" + odd)).tobytes() == corners().tobytes()


def test_nothing_but_the_pixels_is_kept(tmp_path):
    texts = PngImagePlugin.PngInfo()
    texts.add_text("parameters", "a secret prompt")

    image = opened(saved(tmp_path, corners(), exif=exif(6), pnginfo=texts, dpi=(300, 300)))

    assert image.info.keys() == {"sha256"} and dict(image.getexif()) == {}


@pytest.mark.parametrize(
    ("image", "on_white", "on_black"),
    [
        (Image.new("1", (8, 8), 1), WHITE, 255),
        (Image.new("L", (8, 8), 77), (77, 77, 77), 77),
        (Image.new("LA", (8, 8), (40, 128)), (148, 148, 148), 20),
        (Image.new("RGBA", (8, 8), (255, 0, 0, 0)), WHITE, 0),
        (Image.new("RGBA", (8, 8), (*WHITE, 128)), WHITE, 128),
        (Image.new("RGBA", (8, 8), (0, 0, 255, 51)), (204, 204, 255), 6),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
@pytest.mark.parametrize("input_format", ["PNG", "WEBP"])
def test_transparency_is_white_in_images_black_in_masks(tmp_path, input_format, image, on_white, on_black):
    path = saved(tmp_path, image, input_format, lossless=True, exact=True)

    assert near(opened(path).getpixel((4, 4)), on_white, 1)
    assert abs(opened(path, open_mask).getpixel((4, 4)) - on_black) <= 1


@pytest.mark.parametrize(
    ("alpha", "on_white", "on_black"),
    [
        (1, WHITE, 0),
        (0, (100, 100, 100), 100),
        (b"\xff\0\xff", WHITE, 0),
        (b"\0\xff", (100, 100, 100), 100),
        (b"\0\x80", (177, 177, 177), 50),
    ],
)
def test_a_palette_may_have_transparent_colours(tmp_path, alpha, on_white, on_black):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([*RED, 100, 100, 100, *BLUE])
    path = saved(tmp_path, image, transparency=alpha)

    assert opened(path).getpixel((4, 4)) == on_white
    assert opened(path, open_mask).getpixel((4, 4)) == on_black


def test_of_16_bits_the_upper_8_are_kept_and_none_is_clipped(tmp_path):
    values = (0, 255, 257, 8192, 32768, 49152, 65535, 65535)
    grey = b"".join(b"\0" + struct.pack(">H", value) * 8 for value in values)
    path = written(tmp_path, png(8, 8, 16, 0, grey))
    for open_it in (open_image, open_mask):
        image = opened(path, open_it).convert("L")
        assert [image.getpixel((4, y)) for y in range(8)] == [value // 256 for value in values]

    colour = (b"\0" + struct.pack(">HHH", 0x1234, 0x80FF, 0xFF00) * 8) * 8
    assert opened(written(tmp_path, png(8, 8, 16, 2, colour))).getpixel((4, 4)) == (0x12, 0x80, 0xFF)


@pytest.mark.parametrize(
    ("depth", "colour", "row", "transparent"),
    [
        (2, 0, b"\0\x55\x55", struct.pack(">H", 85)),
        (16, 0, b"\0" + bytes([200, 0]) * 8, struct.pack(">H", 200)),
        (16, 2, b"\0" + bytes([200, 0]) * 24, struct.pack(">HHH", 200, 200, 200)),
    ],
)
def test_a_transparent_colour_is_not_sought_among_scaled_pixels(tmp_path, depth, colour, row, transparent):
    path = written(tmp_path, png(8, 8, depth, colour, row * 8, before=chunk(b"tRNS", transparent)))

    assert opened(path).getpixel((4, 4)) != WHITE


def test_a_transparent_colour_of_8_bits_shows_white(tmp_path):
    path = saved(tmp_path, corners(), transparency=RED)

    assert corners_of(opened(path)) == [WHITE, GREEN, BLUE, YELLOW]
    assert corners_of(opened(path, open_mask))[0] == 0


def test_a_jpeg_of_four_inks_is_read_as_photoshop_writes_it(tmp_path):
    path = saved(tmp_path, Image.new("CMYK", (32, 32), (0, 255, 255, 0)), "JPEG", quality=100)
    assert near(opened(path).getpixel((9, 9)), (255, 0, 0))

    # The same inks stored as brightness and colour (YCCK): stored values are what Pillow was given, inverted.
    luma = Image.new("RGB", (1, 1), (0, 255, 255)).convert("YCbCr").getpixel((0, 0))
    inks = Image.new("CMYK", (32, 32), (*(255 - value for value in luma), 0))
    data = bytearray(saved(tmp_path, inks, "JPEG", quality=100).read_bytes())
    at = data.index(b"Adobe") + 11
    assert data[at] == 0
    data[at] = 2
    assert near(opened(written(tmp_path, bytes(data))).getpixel((9, 9)), (255, 0, 0))


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# A profile that takes red for blue and blue for red.
SWAPPED = SRGB.replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")


@pytest.mark.parametrize(
    ("mode", "input_format"), [*(("RGB", each) for each in INPUT_FORMATS), ("P", "PNG"), ("RGBA", "PNG")]
)
def test_colours_of_another_profile_become_those_of_srgb(tmp_path, mode, input_format):
    image = corners().convert(mode, palette=Image.Palette.ADAPTIVE)

    image = opened(saved(tmp_path, image, input_format, quality=95, icc_profile=SWAPPED))

    assert all(map(near, corners_of(image), (RED[::-1], GREEN[::-1], BLUE[::-1], YELLOW[::-1])))
    assert "icc_profile" not in image.info


@pytest.mark.parametrize(
    ("mode", "input_format", "profile"),
    [
        ("RGB", "PNG", b"no profile"),
        ("RGB", "WEBP", SWAPPED[:300]),
        ("RGBA", "PNG", os.urandom(2_000_000)),
        ("L", "JPEG", SWAPPED),
        ("CMYK", "JPEG", SWAPPED),
    ],
)
def test_a_profile_that_is_broken_or_of_other_channels_is_ignored(tmp_path, mode, input_format, profile):
    image = corners().convert(mode)
    with_profile = opened(saved(tmp_path, image, input_format, icc_profile=profile))

    assert with_profile.tobytes() == opened(saved(tmp_path, image, input_format)).tobytes()


def test_a_mask_is_taken_by_its_numbers_whatever_its_profile(tmp_path):
    mask = opened(saved(tmp_path, corners(), icc_profile=SWAPPED), open_mask)

    assert mask.tobytes() == corners().convert("L").tobytes()


def test_a_mask_is_white_where_to_repaint(tmp_path):
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (16, 16, 48, 48))

    assert opened(saved(tmp_path, mask), open_mask).tobytes() == mask.tobytes()
    strokes = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    strokes.paste((255, 255, 255, 255), (16, 16, 48, 48))
    assert opened(saved(tmp_path, strokes), open_mask).tobytes() == mask.tobytes()
    assert opened(saved(tmp_path, mask.convert("1")), open_mask).tobytes() == mask.tobytes()


def test_fit_covers_the_size_and_cuts_both_sides_alike():
    image = Image.new("RGB", (300, 100), BLACK)
    image.paste(RED, (100, 0, 200, 100))

    square = fit(image, 64, 64)

    assert square.size == (64, 64)
    assert near(square.getpixel((1, 32)), RED) and near(square.getpixel((62, 32)), RED)
    tall = fit(image.transpose(Image.Transpose.ROTATE_90), 128, 64)
    assert near(tall.getpixel((64, 1)), RED) and near(tall.getpixel((64, 62)), RED)


@pytest.mark.parametrize("size", [(64, 64), (96, 40), (200, 104), (640, 480)])
def test_fit_keeps_a_mask_on_its_image(size):
    mask = Image.new("L", (301, 203), 0)
    ImageDraw.Draw(mask).ellipse((120, 60, 220, 160), fill=255)
    image = mask.convert("RGB")

    fitted, fitted_mask = fit(image, *size), fit(mask, *size)

    apart = np.abs(np.asarray(fitted.convert("L"), int) - np.asarray(fitted_mask, int))
    assert apart.max() < 80 and apart.mean() < 2


def test_fit_draws_no_echo_into_a_mask():
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (32, 0, 64, 64))

    row = np.asarray(fit(mask, 256, 256), int)[128]

    assert (np.diff(row) >= 0).all()


def test_fit_leaves_a_image_that_fits_as_it_is():
    assert fit(corners(), 64, 32).tobytes() == corners().tobytes()


def input_sizes():
    sides = [8, 9, 100, 300, 512, 640, 696, 1000, 1023, 1024, 1080, 1365, 1920, 2389, 4032, 8160, 4_000_000]
    return [(wide, high) for wide in sides for high in sides]


@pytest.mark.parametrize("native_size", [64, 96, 128, 512, 768, 1024])
def test_same_shape_stays_within_its_bounds_and_keeps_the_aspect_at_the_native_area(native_size):
    for size in input_sizes():
        wide, high = same_shape(size, native_size)

        assert (wide % 8, high % 8) == (0, 0)
        assert 9 * wide <= 21 * high and 9 * high <= 21 * wide, size
        assert same_shape(size[::-1], native_size) == (high, wide)
        aspect, area = min(max(size[0] / size[1], 9 / 21), 21 / 9), wide * high / native_size**2
        assert 0.75 < area <= 1.1, size
        if native_size > 96:  # where eights are fine enough
            assert wide / high == pytest.approx(aspect, rel=0.05), size
            assert area == pytest.approx(1, abs=0.12 if native_size == 128 else 0.03)


def test_same_shape_at_sizes_that_people_send():
    for native_size in (128, 512, 768, 1024):
        for side in (8, 100, native_size, 5000):
            assert same_shape((side, side), native_size) == (native_size, native_size)
    assert same_shape((4032, 3024), 1024) == (1184, 888)
    assert same_shape((1080, 1920), 1024) == (768, 1368)
    assert same_shape((5000, 100), 1024) == (1568, 672)


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
