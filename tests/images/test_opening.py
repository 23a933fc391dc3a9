"""What is read: any orientation, depth, colours and shape, as the caller meant it."""

import os
import struct

import numpy as np
import pytest
from image_files import (
    BLACK,
    BLUE,
    GREEN,
    RED,
    WHITE,
    YELLOW,
    chunk,
    corners,
    corners_of,
    exif,
    near,
    open_files,
    opened,
    png,
    saved,
    written,
)
from PIL import Image, ImageCms, ImageDraw, ImageOps, PngImagePlugin

from fewstep.images.codec import INPUT_FORMATS, fit, open_image, open_mask, same_shape


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
