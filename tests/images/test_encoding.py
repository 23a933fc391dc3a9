"""What is written: a file of the asked format that shows the image."""

import numpy as np
import pytest
from image_files import decoded
from PIL import Image

from fewstep.images.codec import MIME_TYPES, encode_image
from fewstep.request import FORMATS

PILLOWS_NAMES = {"webp": "WEBP", "jpg": "JPEG", "png": "PNG"}


@pytest.fixture
def picture():
    y, x = np.mgrid[0:96, 0:160] / 160
    waves = np.stack([np.sin(9 * x + 4 * y), np.cos(7 * y * x), np.sin(11 * x * y + 1)], axis=-1)
    return Image.fromarray((waves * 100 + 128).astype(np.uint8))


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
