import dataclasses
import logging

import pytest
from PIL import Image

from fewstep.errors import InvalidRequest
from fewstep.lora.types import Mix
from fewstep.models.specs import MODELS
from fewstep.prompts import Part
from fewstep.request import ASPECT_CHOICES, ASPECT_RATIOS, PROMPT_MAX_CHARS, SEED_MAX, Inputs, Request

SDXL = MODELS["sdxl"]
MINIATURE = MODELS["miniature"]
# More digits than Python is willing to print.
HUGE, LOW = pytest.param(10**5000, id="huge"), pytest.param(-(10**5000), id="-huge")
NAN, INF = float("nan"), float("inf")
WHOLE = dict(steps=(1, 8), num_outputs=(1, 4), seed=(0, SEED_MAX), output_quality=(1, 100), clip_skip=(0, 4))
# The kind of model whose UNet takes guidance as an input.
FULL_LCM = dataclasses.replace(
    SDXL, name="full", default_guidance=8.0, embedded_guidance=True, lcm_lora=False
)


IMAGE = Image.new("RGB", (64, 64))


def create(spec=SDXL, **inputs):
    return Inputs.create(spec, **({"prompt": "a red house", "seed": 7} | inputs))


def request(*loras, chunks=1, **inputs):
    return Request(create(**inputs), loras, chunks)


def refusal(spec=SDXL, **inputs):
    with pytest.raises(InvalidRequest) as caught:
        create(spec, **inputs)
    return str(caught.value)


def test_defaults_are_resolved():
    assert create() == Inputs(
        prompt="a red house",
        prompt_parts=(Part("a red house"),),
        negative_prompt="",
        negative_parts=(),
        steps=4,
        guidance=1.0,
        guided=False,
        seed=7,
        num_outputs=1,
        width=1024,
        height=1024,
        output_format="webp",
        output_quality=90,
    )


@pytest.mark.parametrize(("name", "low", "high"), [(name, *limits) for name, limits in WHOLE.items()])
def test_whole_numbers_are_taken_up_to_their_limits_and_no_further(name, low, high):
    for good in (low, high):
        assert getattr(create(**{name: good}), name) == good
    for bad in (low - 1, high + 1):
        assert f"{name} is {bad}; it must be a whole number from {low} to {high}" in refusal(**{name: bad})


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("bad", ["4", True, 2.5, NAN, INF, 1e300, 2.0**64, HUGE, LOW, [4], {}, b"4"])
def test_whole_numbers_of_another_kind_are_refused(name, bad):
    text = refusal(**{name: bad})
    assert name in text and len(text) < 200


@pytest.mark.parametrize("name", [name for name in WHOLE if name != "seed"])
def test_null_is_refused_where_a_number_is_needed(name):
    assert "NoneType" in refusal(**{name: None})


def test_an_integral_float_becomes_an_integer():
    inputs = create(steps=2.0, seed=3.0, num_outputs=2.0)
    assert (inputs.steps, inputs.seed, inputs.seeds) == (2, 3, (3, 4))
    assert all(type(value) is int for value in (inputs.steps, inputs.seed, inputs.num_outputs))


def test_prompt_may_be_long_strange_and_in_any_script_but_not_longer():
    for prompt in ("x" * PROMPT_MAX_CHARS, "🏠" * 500, "дом у моря", "{}%s<img src=x>'; --", "a\nb\tc"):
        assert create(prompt=prompt).prompt == prompt
    assert "2001 characters; at most 2000" in refusal(prompt="x" * (PROMPT_MAX_CHARS + 1))
    assert len(refusal(prompt="x" * 1_000_000)) < 200


@pytest.mark.parametrize("prompt", ["", " ", "\n\t  ", "\u3000", "()1.3"])
def test_a_prompt_without_words_is_refused(prompt):
    assert "prompt is empty" in refusal(prompt=prompt)


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
@pytest.mark.parametrize("bad", [None, 5, ["a"], b"a", "a\0b", "a\ud83d", "\udc00"])
def test_what_is_not_plain_text_is_refused(name, bad):
    assert name in refusal(**{name: bad})


@pytest.mark.parametrize("name", ["output_format", "aspect_ratio"])
@pytest.mark.parametrize("bad", ["QQQ was cancelled", "WEBP ", None, 1, ["webp"]])
def test_an_unknown_choice_lists_the_choices_and_quotes_nothing(name, bad):
    text = refusal(**{name: bad})
    assert ("webp, jpg, png" if name == "output_format" else ", ".join(ASPECT_CHOICES)) in text
    assert "QQQ" not in text and "cancel" not in text


def test_no_refusal_quotes_free_text():
    bad = "QQQ cancelled"
    for name in Inputs.create.__kwdefaults__.keys() - {"image", "mask"}:
        if name != "negative_prompt":
            text = refusal(**{"aspect_ratio": "custom", "width": 512, "height": 512, name: bad})
            assert "QQQ" not in text and "cancel" not in text


@pytest.mark.parametrize(("spec", "own", "most"), [(SDXL, 1.0, 4), (FULL_LCM, 8.0, 20)])
def test_guidance_is_the_models_own_unless_given_and_with_an_lcm_lora_at_most_4(spec, own, most):
    assert create(spec).guidance == own
    given = create(spec, guidance=most).guidance
    assert given == most and type(given) is float
    assert f"from 0 to {most}" in refusal(spec, guidance=most + 0.01)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("guidance", [-0.1, 99, 10**400]),
        *((name, [-2.1, 2.1, None]) for name in ("style_scale", "extra_style_scale", "lcm_scale")),
        ("prompt_strength", [-0.1, 1.1, None]),
    ],
    ids=str,
)
def test_a_bad_number_is_refused(name, more):
    for bad in ("1", True, NAN, INF, [], 10**5000, *more):
        assert f"{name} is " in refusal(**{name: bad})


def test_guided_means_a_second_evaluation():
    assert [g for g in (0, 0.5, 1, 1.01, 4) if create(SDXL, guidance=g).guided] == [1.01, 4]
    assert not any(create(FULL_LCM, guidance=g).guided for g in (0, 1, 8))


@pytest.mark.parametrize(
    ("spec", "inputs", "warned"),
    [
        (SDXL, {"negative_prompt": "blur"}, True),
        (SDXL, {"negative_prompt": "blur", "guidance": 1.5}, False),
        (SDXL, {}, False),
        (FULL_LCM, {"negative_prompt": "blur"}, True),
    ],
)
def test_a_negative_prompt_without_effect_is_said_in_the_log(spec, inputs, warned, caplog):
    with caplog.at_level(logging.WARNING, logger="fewstep"):
        create(spec, **inputs)
    assert ("no effect" in caplog.text) == warned and "blur" not in caplog.text


def test_a_missing_seed_is_drawn_anew_each_time():
    seeds = [create(seed=None).seed for _ in range(64)]
    assert all(0 <= seed <= SEED_MAX for seed in seeds) and len(set(seeds)) == 64
    assert max(seeds) >= 2**29  # 31 bits are drawn, not fewer: 64 seeds all below a quarter, one in 10**38


def test_seeds_count_up_and_wrap():
    assert create(seed=5, num_outputs=3).seeds == (5, 6, 7)
    assert create(seed=SEED_MAX, num_outputs=3).seeds == (SEED_MAX, 0, 1)


@pytest.mark.parametrize("spec", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("aspect", ASPECT_CHOICES[:-1])
def test_sizes_by_name_fit_the_model_and_the_name(spec, aspect):
    inputs = create(spec, aspect_ratio=aspect)
    assert inputs.width % 8 == inputs.height % 8 == 0
    assert inputs.width * inputs.height <= spec.max_pixels
    assert inputs.width * inputs.height == pytest.approx(spec.native_size**2, rel=0.07)
    wide, high = (1, 1) if aspect == "auto" else map(int, aspect.split(":"))
    assert inputs.width / inputs.height == pytest.approx(wide / high, rel=0.05)


def test_sizes_by_name_at_1024_and_256():
    wide, tall = create(SDXL, aspect_ratio="16:9"), create(MINIATURE, aspect_ratio="9:21")
    assert (wide.width, wide.height, tall.width, tall.height) == (1344, 768, 160, 384)


def test_mirrored_names_are_mirrored_sizes():
    for name, size in ASPECT_RATIOS.items():
        assert ASPECT_RATIOS[":".join(reversed(name.split(":")))] == size[::-1]


@pytest.mark.parametrize(
    ("given", "used"), [(64, 64), (67, 64), (68, 72), (71, 72), (72.0, 72), (2047, 2048), (2048, 2048)]
)
def test_custom_sides_are_rounded_to_the_nearest_8(given, used):
    inputs = create(aspect_ratio="custom", width=given, height=512)
    assert (inputs.width, inputs.height) == (used, 512)


@pytest.mark.parametrize("bad", [0, -64, 63, 2049, 100_000, "512", True, 512.5, NAN, HUGE])
@pytest.mark.parametrize("name", ["width", "height"])
def test_bad_custom_sides_are_refused(name, bad):
    text = refusal(**({"aspect_ratio": "custom", "width": 512, "height": 512} | {name: bad}))
    assert f"{name} is" in text and "64 to 2048" in text


def test_custom_needs_both_sides_and_the_others_none():
    for inputs in ({"width": 512}, {"height": 512}, {}):
        assert "both width and height" in refusal(aspect_ratio="custom", **inputs)
    for inputs in ({"width": 512}, {"height": 512}, {"width": 0}, {"width": 512, "height": 512}):
        for aspect in ("auto", "1:1", "16:9"):
            assert "aspect_ratio=custom" in refusal(aspect_ratio=aspect, **inputs)


@pytest.mark.parametrize(("spec", "side"), [(SDXL, 1536), (MINIATURE, 512)])
def test_too_many_pixels_once_rounded_are_refused_with_the_limit(spec, side):
    for width in (side, side + 3):
        assert create(spec, aspect_ratio="custom", width=width, height=side).width == side
    for width in (side + 4, side + 8):
        text = refusal(spec, aspect_ratio="custom", width=width, height=side)
        assert f"{side + 8}x{side}" in text and f"{side}x{side}" in text


def test_shape_key_ignores_what_a_batch_may_mix():
    mixable = [
        {},
        {"prompt": "another, much longer prompt"},
        {"seed": 99},
        {"num_outputs": 4},
        {"output_format": "png", "output_quality": 3},
        {"guidance": 0.3},
        {"prompt_strength": 0.5},  # of no image
        {"aspect_ratio": "1:1"},
        {"aspect_ratio": "custom", "width": 1024, "height": 1024},
    ]
    assert len({request(**inputs).shape_key for inputs in mixable}) == 1
    assert request(guidance=1.5).shape_key == request(guidance=4, negative_prompt="x").shape_key
    other = Image.new("RGB", (64, 64), "blue")
    assert request(image=other).shape_key == request(image=IMAGE).shape_key


def test_shape_key_tells_apart_what_changes_the_computation():
    different = [{}, {"steps": 5}, {"guidance": 1.5}, {"aspect_ratio": "4:3"}, {"aspect_ratio": "3:4"}]
    different += [{"clip_skip": skip, "chunks": chunks} for skip in (0, 1) for chunks in (2, 3)]
    different += [{"clip_skip": 1}, {"image": IMAGE}, {"image": IMAGE, "prompt_strength": 0.5}]
    different += [{"image": IMAGE, "mask": Image.new("L", (64, 64))}]
    assert len({request(**inputs).shape_key for inputs in different}) == len(different)


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_a_weight_out_of_range_is_refused_before_any_work(name):
    assert f"{name} gives a word the weight 9" in refusal(**{name: "a (red)9 house"})


def test_the_miniatures_text_encoders_have_few_layers_to_skip():
    assert create(MINIATURE, clip_skip=1).clip_skip == 1
    assert "clip_skip is 2; it must be a whole number from 0 to 1" in refusal(MINIATURE, clip_skip=2)


def test_a_request_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        create().seed = 8


class Style:
    def __init__(self, sha256):
        self.sha256 = sha256


def test_styles_stand_in_order_each_with_its_scale():
    inputs = {"style": "one", "style_scale": 0.5, "extra_style": "owner/two", "extra_style_scale": -1}
    assert [(style.name, style.source.place, style.scale) for style in create(**inputs).styles] == [
        ("style", "one", 0.5),
        ("extra_style", "owner/two", -1.0),
    ]
    assert create(style="", extra_style=None).styles == ()
    mix = request(Style("a"), Style("b"), **inputs).mix
    assert [(lora.sha256, scale) for lora, scale in mix.styles] == [("a", 0.5), ("b", -1.0)]
    with pytest.raises(ValueError, match="longer"):
        _ = request(Style("a"), **inputs).shape_key


def test_what_changes_the_weights_is_part_of_the_keys_and_nothing_else_is():
    a = request(Style("a"), style="a", style_scale=0.8)
    others = [
        request(Style("b"), style="a", style_scale=0.8),
        request(Style("a"), style="a", style_scale=0.7),
        request(Style("a"), style="a", lcm_scale=0.9),
        request(Style("a"), Style("b"), style="a", extra_style="b"),
        request(),
    ]
    for other in others:
        assert other.weights_key != a.weights_key and other.shape_key != a.shape_key
    renamed = request(Style("a"), style="the-same", seed=8)
    assert renamed.weights_key == a.weights_key and renamed.shape_key == a.shape_key
    nothing = request(Style("a"), style="a", style_scale=0)
    assert nothing.weights_key == request().weights_key == Mix().key
    assert request(steps=2).weights_key == request().weights_key


def test_a_full_lcm_has_no_lcm_lora_to_scale():
    assert create(FULL_LCM, lcm_scale=1).lcm_scale == 1
    assert "lcm_scale is 0.5" in refusal(FULL_LCM, lcm_scale=0.5)
    assert "-0.5" in refusal(lcm_scale=-0.5)


def test_an_image_gives_the_size_its_shape_unless_asked_otherwise():
    wide = Image.new("RGB", (900, 600), "red")
    assert (create(image=wide).width, create(image=wide).height) == (1264, 840)
    assert create(image=wide, aspect_ratio="1:1").image.size == (1024, 1024)
    custom = create(image=wide, aspect_ratio="custom", width=512, height=640)
    assert custom.image.size == (custom.width, custom.height) == (512, 640)


@pytest.mark.parametrize(
    ("strength", "steps", "real"),
    [(0.0, 4, 1), (0.02, 4, 1), (0.05, 1, 1), (0.05, 8, 2), (0.3, 8, 8), (0.8, 4, 4), (1.0, 8, 8)],
)
def test_a_low_strength_has_fewer_steps_to_take_but_always_one(strength, steps, real):
    inputs = create(image=IMAGE, prompt_strength=strength, steps=steps)
    assert inputs.real_steps == real
    assert create(prompt_strength=strength, steps=steps).real_steps == steps


def test_a_mask_lies_on_its_image_and_has_its_shape_at_any_size():
    image, mask = Image.new("RGB", (300, 200)), Image.new("L", (150, 100))
    mask.paste(255, (0, 0, 75, 100))
    inputs = create(image=image, mask=mask, aspect_ratio="1:1")
    assert inputs.mask.size == inputs.image.size == (inputs.width, inputs.height)
    assert inputs.mask.getpixel((500, 512)) == 255 and inputs.mask.getpixel((524, 512)) == 0
    assert "mask is given without image" in refusal(mask=mask)
    assert "mask is 300x100 px and image 300x200 px" in refusal(image=image, mask=Image.new("L", (300, 100)))
