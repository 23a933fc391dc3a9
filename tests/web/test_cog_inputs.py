"""Whatever a client sends, a Cog server gets inputs that were checked, and nothing else."""

import asyncio
import base64

import numpy as np
import pytest
from conftest import MINIATURE, decoded, encoded
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fewstep.errors import InvalidRequest
from fewstep.images.codec import open_alpha_mask, open_image, open_mask
from fewstep.models.specs import get_model
from fewstep.web.cog_inputs import CogInputs, ImageReader

SDXL = get_model("sdxl")


def sent(content, opened):
    return asyncio.run(ImageReader().read(content, "image", opened))


def test_a_prompt_alone_becomes_inputs_with_the_size_and_the_seed_settled():
    cog = CogInputs.create(MINIATURE, {"prompt": "a red house", "seed": None, "style": None})
    seed = cog.inputs.pop("seed")
    assert 0 <= seed < 2**31
    assert cog.inputs == {
        "prompt": "a red house", "steps": 4, "guidance": 1.0, "num_outputs": 1, "aspect_ratio": "custom",
        "width": 256, "height": 256, "output_format": "webp", "output_quality": 90,
    }  # fmt: skip


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": ""}, {"prompt": "a" * 2001}, {"prompt": 5}, {"prompt": "a\0b"}, {"steps": 9},
        {"steps": "4"}, {"steps": True}, {"guidance": float("nan")}, {"guidance": 4.5}, {"seed": 2**31},
        {"seed": -1}, {"num_outputs": 5}, {"aspect_ratio": "2:1"}, {"prompt_strength": 2},
        {"output_format": "gif"}, {"webhook": "http://127.0.0.1/"}, {"id": "../x"},
        {"disable_safety_checker": True}, {"image": "file:///etc/passwd"},
        {"mask": "http://169.254.169.254/"}, {"lcm_scale": 0},
        {"style": "https://huggingface.co/x.safetensors"}, {"style": "owner/repo"}, {"style": "../../x"},
        {"style": ["golden-hour"]}, {"style": {"a": 1}},
    ],
)  # fmt: skip
def test_what_is_not_allowed_is_refused_without_being_quoted(fields):
    with pytest.raises(InvalidRequest) as caught:
        CogInputs.create(MINIATURE, {"prompt": "a red house", **fields}, styles=["golden-hour"])
    assert len(caught.value.sentence) < 400
    texts = [value for value in fields.values() if isinstance(value, str) and len(value) > 4]
    assert not any(text in caught.value.sentence for text in texts)


def test_a_style_of_the_servers_own_goes_with_its_scale():
    fields = {"prompt": "a red house", "style": "golden-hour", "style_scale": 0.5}
    cog = CogInputs.create(MINIATURE, fields, styles=["golden-hour"])
    assert (cog.inputs["style"], cog.inputs["style_scale"]) == ("golden-hour", 0.5)


def test_a_negative_prompt_goes_only_where_it_counts():
    for guidance, goes in ((1, False), (2, True)):
        cog = CogInputs.create(MINIATURE, {"prompt": "a", "negative_prompt": "blue", "guidance": guidance})
        assert ("negative_prompt" in cog.inputs) is goes


def test_a_quick_one_is_one_small_image_of_the_same_shape_and_seed():
    fields = {"prompt": "a", "seed": 7, "num_outputs": 4, "aspect_ratio": "16:9"}
    quick, full = (CogInputs.create(SDXL, fields, quick=quick) for quick in (True, False))
    assert full.size == (1344, 768) and quick.size == (672, 384)
    assert (quick.inputs["num_outputs"], quick.inputs["seed"]) == (1, 7)
    assert [(one["num_outputs"], one["seed"]) for one in full.recipes] == [(1, 7 + i) for i in range(4)]
    as_it_is = CogInputs.create(get_model("sd15"), {"prompt": "a"}, quick=True)  # it has no smaller size
    assert as_it_is.size == (512, 512)


def test_images_go_as_our_own_pixels_of_the_size_that_is_generated():
    photo = Image.effect_mandelbrot((300, 200), (-2, -1, 1, 1), 50).convert("RGB")
    picture = sent(encoded(photo, "JPEG", exif=b"Exif\0\0secret place"), open_image)
    mask = sent(encoded(Image.new("L", (300, 200), 255)), open_mask)
    cog = CogInputs.create(MINIATURE, {"prompt": "a", "prompt_strength": 0.5}, image=picture, mask=mask)
    assert cog.size == (312, 208)
    image = decoded(cog.inputs["image"])
    assert (image.format, image.size, decoded(cog.inputs["mask"]).size) == ("PNG", (312, 208), (312, 208))
    assert b"secret" not in base64.b64decode(cog.inputs["image"].partition(",")[2])
    assert cog.recipe["from_image"] and "image" not in cog.recipe and cog.inputs["prompt_strength"] == 0.5


@pytest.mark.parametrize(
    "content", [b"", b"<svg onload=alert(1)>", b"GIF89a" + b"\0" * 20, b"\x89PNG\r\n\x1a\n"]
)
def test_what_is_no_image_is_refused(content):
    with pytest.raises(InvalidRequest):
        sent(content, open_image)


def test_a_bomb_is_refused_by_its_header():
    bomb = encoded(Image.new("1", (9000, 9000)))
    assert len(bomb) < 20_000
    with pytest.raises(InvalidRequest, match="81000000|9000x9000"):
        sent(bomb, open_image)


def test_a_large_image_is_kept_no_larger_than_what_is_generated():
    assert sent(encoded(Image.new("RGB", (4000, 1000))), open_image).size == (2048, 512)


def test_a_flood_of_texts_in_an_alpha_mask_is_not_unpacked():
    """What Pillow alone would make 200 MB of."""
    texts = PngInfo()
    for i in range(60):
        texts.add_text(f"k{i}", "x" * 1_000_000, zip=True)
    flood = encoded(Image.new("LA", (64, 64), (0, 0)), pnginfo=texts)
    assert len(flood) < 200_000
    assert np.asarray(sent(flood, open_alpha_mask)).min() == 255


def test_openais_masks_are_transparent_where_to_repaint():
    alpha = np.full((8, 16), 255, np.uint8)
    alpha[:, 8:] = 0
    rgba = Image.fromarray(np.dstack([np.zeros((8, 16, 3), np.uint8), alpha]), "RGBA")
    read = np.asarray(sent(encoded(rgba), open_alpha_mask))
    assert read[:, :8].max() == 0 and read[:, 8:].min() == 255
    white = np.asarray(sent(encoded(Image.new("RGB", (8, 8), "white")), open_alpha_mask))
    assert white.min() == 255
