"""What files say of how they were generated; test_server.py generates from it."""

import io
import json
import tomllib
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import fewstep
from fewstep.errors import InvalidRequest
from fewstep.images.codec import encode_image
from fewstep.images.metadata import inputs_of, parameters_text, read_recipe, save_options
from fewstep.models.specs import MODELS
from fewstep.request import Inputs, Request

FORMATS = ("png", "jpg", "webp")


class Style:
    sha256 = "ab" * 32


def recipe(**inputs):
    checked = Inputs.create(MODELS["miniature"], **({"prompt": "a red house", "seed": 7} | inputs))
    request = Request(checked, tuple(Style() for _ in checked.styles), chunks=1)
    return request.recipe(checked.seed, "miniature", "c0ffee" * 6)


def stored(content, output_format):
    return io.BytesIO(
        encode_image(Image.new("RGB", (16, 16)), output_format, 90, **save_options(content, output_format))
    )


def test_the_version_is_that_of_the_project():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert fewstep.__version__ == project["version"]


@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize(
    "inputs",
    [
        {},
        {"prompt": 'ünïcödé 雪 \U0001f344 "quoted"\nand, commas: 3'},
        {"prompt": "\U0001f344" * 2000, "negative_prompt": "\U0001f409" * 2000, "guidance": 1.5},
        {"style": "flat", "extra_style": "a/b/c.safetensors", "extra_style_scale": -0.3},
        {"lcm_scale": 0.7, "style": "snow"},
        {"image": Image.new("RGB", (64, 64)), "mask": Image.new("L", (64, 64)), "prompt_strength": 0.3},
    ],
)
def test_every_format_keeps_all_of_it(output_format, inputs):
    content = recipe(**inputs)
    assert read_recipe(stored(content, output_format)) == content


def test_its_inputs_make_the_same_request():
    wishes = {
        "steps": 3, "guidance": 1.25, "negative_prompt": "rain", "aspect_ratio": "16:9", "lcm_scale": 0.9,
        "style": "flat", "style_scale": 0.3, "extra_style": "a/b", "extra_style_scale": -1.5,
        "clip_skip": 1,
    }  # fmt: skip
    assert recipe(**inputs_of(recipe(**wishes))) == recipe(**wishes)


def test_the_text_is_what_other_tools_read():
    content = recipe(negative_prompt="rain", guidance=1.5, style="flat", steps=2)
    assert parameters_text(content) == (
        "a red house\nNegative prompt: rain\n"
        "Steps: 2, Sampler: LCM, CFG scale: 1.5, Seed: 7, Size: 256x256, Model hash: c0ffeec0ff, "
        f'Model: miniature, Lora hashes: "flat: abababababab", Version: fewstep {fewstep.__version__}'
    )
    assert "Clip skip: 2, " in parameters_text(recipe(clip_skip=1))  # they count from 1
    with Image.open(stored(content, "png")) as image:
        assert image.text["parameters"] == parameters_text(content)
        assert json.loads(image.text["fewstep"]) == content
    for output_format in ("jpg", "webp"):
        with Image.open(stored(content, output_format)) as image:
            comment = image.getexif().get_ifd(0x8769)[0x9286]
        assert comment[:8] == b"UNICODE\0" and comment[8:].decode("utf-16-be") == parameters_text(content)


def test_an_address_is_kept_without_what_may_be_a_token():
    address = "https://civitai.com/api/download/models/1?token=secret#secret"
    for output_format in FORMATS:
        file = stored(recipe(style=address), output_format).getvalue()
        assert b"secret" not in file and b"s\0e\0c\0r" not in file
    assert recipe(style=address)["styles"][0]["style"] == "https://civitai.com/api/download/models/1"


def without(**changes):
    return json.dumps(recipe(style="flat") | changes)


@pytest.mark.parametrize(
    "content",
    [
        *("{", "[]", "7", '{"fewstep": "1"}', '{"prompt": "x"}', "", "[" * 100_000),
        *(without(model=["x"]), without(model="a\0b"), without(model="../x"), without(prompt=5)),
        *(without(guidance=float("nan")), without(seed="7"), without(seed=True), without(width=None)),
        *(without(styles=7), without(styles=[{}]), without(styles=[{"style": "x", "style_scale": 1}])),
        *(without(styles=[{"style": "x", "style_scale": "1", "sha256": "ab"}]), without(image_sha256=5)),
        *(without(clip_skip="1"), without(prompt_strength=None)),
    ],
)
def test_a_image_without_a_sound_recipe_is_refused(content):
    texts = PngInfo()
    texts.add_itxt("fewstep", content)
    with pytest.raises(InvalidRequest, match="holds no recipe"):
        read_recipe(io.BytesIO(encode_image(Image.new("RGB", (16, 16)), "png", 90, pnginfo=texts)))


def test_a_file_without_any_is_refused(tmp_path):
    whole = stored(recipe(), "png").getvalue()
    plain = [encode_image(Image.new("RGB", (16, 16)), output_format, 90) for output_format in FORMATS]
    (tmp_path / "x.png").write_bytes(b"not a picture")
    damaged = map(io.BytesIO, (*plain, b"not a picture", whole[:60], whole[:-30]))
    for file in (*damaged, tmp_path / "x.png"):
        with pytest.raises(InvalidRequest, match="holds no recipe"):
            read_recipe(file)
