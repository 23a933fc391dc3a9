"""The encoders are compared by the settings that `encode_image` takes."""

from PIL import Image

from fewstep.benchmark.encoding import OPTIONS, SIDE, measure, tiled
from fewstep.images.codec import MIME_TYPES, encode_image
from fewstep.miniature.world.drawing import draw
from fewstep.miniature.world.scenes import Scene


def test_rows_are_of_all_settings_and_those_in_use_are_among_them():
    image = draw(Scene("castle", "red", "snow", "hills", "day", "middle"), 1)
    rows = measure(image, repeats=2)
    assert len(rows) == len(OPTIONS)
    assert all(0 < row["least"] <= row["ms"] <= row["most"] for row in rows)
    sizes = {row["bytes"] for row in rows}
    for kind in MIME_TYPES:
        assert len(encode_image(image, kind, 90)) in sizes


def test_images_are_tiled_without_a_gap():
    whole = tiled([Image.new("RGB", (256, 256), (i, 9, 9)) for i in range(1, 17)])
    assert whole.size == (SIDE, SIDE)
    assert sorted(colour for _, (colour, _, _) in whole.getcolors()) == list(range(1, 17))
