"""What the UNet is given of a prompt, against diffusers' and compel's own pipelines."""

from concurrent.futures import ThreadPoolExecutor
from copy import copy, deepcopy
from functools import partial

import pytest
import torch
from compel import CompelForSD, CompelForSDXL
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from tiny import TOKENIZER as TOKENIZER_FOLDER
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from fewstep.errors import InvalidRequest
from fewstep.generation.text_encoder import MAX_CHUNKS, TextEncoder
from fewstep.prompts import parse_prompt

PLAIN = "a red house in the snow"
LONG = "a red house in the snow with mountains at night, on the left. " * 4 + "a blue car"
parts = partial(parse_prompt, "prompt")
LAYERS = 4
TOKENIZER = AutoTokenizer.from_pretrained(TOKENIZER_FOLDER)
TOKENS = TOKENIZER.model_max_length


def make_encoder(kind, width: int, layers: int = LAYERS):
    torch.manual_seed(width)
    config = CLIPTextConfig(
        vocab_size=2000,
        hidden_size=width,
        intermediate_size=width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        eos_token_id=TOKENIZER.eos_token_id,
    )
    encoder = kind(config).requires_grad_(False).eval()
    for value in encoder.parameters():  # as first drawn, all prompts are nearly alike
        value.normal_(std=0.3)
    return encoder


@pytest.fixture(scope="module", params=["sdxl", "sd"])
def diffusion(request):
    """The text encoders of both families, with random weights, and the padding of SDXL's second."""
    none = {"vae": None, "unet": None, "scheduler": None}
    tokenizer, encoder = deepcopy(TOKENIZER), make_encoder(CLIPTextModel, 32)
    if request.param == "sd":
        none |= {"safety_checker": None, "feature_extractor": None}
        return StableDiffusionPipeline(tokenizer=tokenizer, text_encoder=encoder, **none)
    second = deepcopy(TOKENIZER)
    second.pad_token = "!"
    return StableDiffusionXLPipeline(
        tokenizer=tokenizer,
        tokenizer_2=second,
        text_encoder=encoder,
        text_encoder_2=make_encoder(CLIPTextModelWithProjection, 48),
        **none,
    )


@pytest.fixture
def text(diffusion) -> TextEncoder:
    return TextEncoder(diffusion)


def by_diffusers(diffusion, prompt, **options):
    states, _, *pooled = diffusion.encode_prompt(
        prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False, **options
    )
    return states, pooled[0] if pooled else None


def by_compel(diffusion, prompt):
    encode = CompelForSDXL if isinstance(diffusion, StableDiffusionXLPipeline) else CompelForSD
    found = encode(diffusion)(prompt)
    return found.embeds, found.pooled_embeds


def same(one, two):
    return (one is None and two is None) or torch.equal(one, two)


@pytest.mark.numeric
def test_a_plain_prompt_is_diffusers_own(diffusion, text):
    states, pooled = by_diffusers(diffusion, PLAIN)
    found = text.encode(parts(PLAIN))
    assert same(found.states, states) and same(found.pooled, pooled)


@pytest.mark.numeric
def test_a_plain_prompt_of_more_chunks_begins_alike_and_goes_on_empty(diffusion, text):
    found = text.encode(parts(PLAIN), chunks=3)
    states, pooled = by_diffusers(diffusion, PLAIN)
    empty, _ = by_diffusers(diffusion, "")
    assert torch.equal(found.states, torch.cat([states, empty, empty], dim=1))
    assert same(found.pooled, pooled)


@pytest.mark.parametrize(
    "prompt",
    [
        "a (red)1.3 house",
        "a (red)-- house in the (snow)++",
        "(red)0.5 (house)0 snow",
        LONG,
        f"{LONG}, (snow)0.6",
    ],
)
@pytest.mark.numeric
def test_weights_and_chunks_are_compels(diffusion, text, prompt):
    found = text.encode(parts(prompt), text.count_chunks("prompt", parts(prompt)))
    states, pooled = by_compel(diffusion, prompt)
    assert torch.equal(found.states, states)
    if "(" not in prompt:  # else it has pooled the parentheses too
        assert same(found.pooled, pooled)


@pytest.mark.numeric
def test_the_three_ways_to_write_a_weight_are_one(text):
    [one, two, three] = [
        text.encode(parts(f"a {word} house")).states for word in ("(red)1.1", "(red:1.1)", "red+")
    ]
    assert torch.equal(one, two)
    assert torch.allclose(one, three, atol=1e-5)
    assert not torch.allclose(one, text.encode(parts("a red house")).states, atol=1e-3)


@pytest.mark.numeric
def test_what_is_pooled_does_not_see_how_weights_are_written(diffusion, text):
    _, pooled = by_diffusers(diffusion, "a red house")
    assert same(text.encode(parts("a (red)1.3 house")).pooled, pooled)


@pytest.mark.numeric
def test_of_a_long_prompt_every_word_counts(text):
    chunks = text.count_chunks("prompt", parts(LONG))
    assert chunks > 1
    one, two = (
        text.encode(parts(LONG.replace("blue", colour)), chunks).states for colour in ("blue", "pink")
    )
    assert one.shape[1] == chunks * TOKENS
    assert torch.equal(one[:, :TOKENS], two[:, :TOKENS])
    assert not torch.equal(one[:, -TOKENS:], two[:, -TOKENS:])


def test_chunks_are_counted_with_their_markers(text):
    word = "red "
    assert text.count_chunks("prompt", parts(word * (TOKENS - 2))) == 1
    assert text.count_chunks("prompt", parts(word * (TOKENS - 1))) == 2
    assert text.count_chunks("prompt", parts(f"({word * (TOKENS - 1)})1.2")) == 2
    assert text.count_chunks("negative_prompt", parts("")) == 1
    assert text.count_chunks("prompt", parts(word * (TOKENS - 2) * MAX_CHUNKS)) == MAX_CHUNKS


def test_a_prompt_of_too_many_chunks_is_refused_with_the_limit(text):
    with pytest.raises(InvalidRequest, match=r"negative_prompt fills 9 chunks of 46 tokens; at most 8 fit"):
        text.count_chunks("negative_prompt", parts("red " * ((TOKENS - 2) * MAX_CHUNKS + 1)))


@pytest.mark.parametrize("skip", [1, 2])
@pytest.mark.numeric
def test_clip_skip_leaves_the_last_layers_out(diffusion, text, skip):
    found = text.encode(parts(PLAIN), clip_skip=skip)
    if isinstance(diffusion, StableDiffusionXLPipeline):
        states, pooled = by_diffusers(diffusion, PLAIN, clip_skip=skip)
        assert same(found.pooled, pooled)
    else:  # diffusers' own asks transformers 5 for a part that it no longer has
        shallow = copy(diffusion)
        shallow.text_encoder = deepcopy(diffusion.text_encoder)
        del shallow.text_encoder.encoder.layers[-skip:]
        states, _ = by_diffusers(shallow, PLAIN)
    assert torch.equal(found.states, states)
    assert not torch.equal(found.states, text.encode(parts(PLAIN)).states)


def test_a_negative_prompt_of_nothing_is_zeros_for_sdxl_and_empty_text_for_sd(diffusion, text):
    prompt = text.encode(parts(LONG), 8, 1)
    nothing = text.encode_nothing(prompt, 8, 1)
    assert nothing.states.shape == prompt.states.shape
    if isinstance(diffusion, StableDiffusionXLPipeline):
        assert not nothing.states.any() and not nothing.pooled.any()
    else:
        assert torch.equal(nothing.states, text.encode(parts(""), 8, 1).states)


@pytest.mark.numeric
def test_a_weight_is_taken_from_the_encoders_as_they_are_now(diffusion, text):
    """A style changes their weights between two requests; compel's providers keep what they once encoded."""
    wish = (parts("a (red)1.3 house"), 2, 0)
    before = text.encode(*wish).states
    weight = diffusion.text_encoder.get_parameter("encoder.layers.0.self_attn.q_proj.weight")
    pristine = weight.clone()
    weight.mul_(3)
    try:
        styled = text.encode(*wish, weights="of a style").states
        assert torch.equal(styled, TextEncoder(diffusion).encode(*wish).states)
    finally:
        weight.copy_(pristine)
    assert not torch.equal(styled, before)
    assert torch.equal(text.encode(*wish, weights="of another").states, before)


def test_what_was_encoded_is_kept_while_there_is_room(diffusion, text, monkeypatch):
    plain, long = parts(PLAIN), parts(LONG)
    wishes = [(plain,), (plain, 2), (plain, 1, 1), (plain, 1, 0, "of a style"), (long, 8)]
    first = [text.encode(*wish) for wish in wishes]
    assert all(text.encode(*wish) is one for wish, one in zip(wishes, first, strict=True))
    assert len({id(one) for one in first}) == len(wishes)
    monkeypatch.setattr("fewstep.generation.text_encoder.KEPT_BYTES", sum(one.size for one in first))
    text = TextEncoder(diffusion)
    first = [text.encode(*wish) for wish in wishes]
    text.encode(parts(PLAIN))
    text.encode(parts(PLAIN + "!"))  # in the place of what was used longest ago, which is not PLAIN
    assert text.encode(parts(PLAIN)) is first[0] and text.encode(parts(LONG), 8) is first[-1]
    assert text.encode(parts(PLAIN), 2) is not first[1]


def test_chunks_are_counted_on_any_thread_while_the_model_encodes(text):
    """A tokenizer keeps how it last cut and padded: two threads in one give each other's lengths, or fail."""
    expected = text.encode(parts(PLAIN)).states
    chunks = text.count_chunks("prompt", parts(LONG))
    with ThreadPoolExecutor(4) as threads:
        counted = [threads.submit(text.count_chunks, "prompt", parts(LONG)) for _ in range(300)]
        while not all(one.done() for one in counted):
            anew = text.encode(parts(PLAIN), weights=object())  # of which nothing is kept
            assert torch.equal(anew.states, expected)
    assert {one.result() for one in counted} == {chunks}


@pytest.mark.parametrize(("width", "expected"), [(32, 1), (128, 3)])
def test_a_narrow_encoder_computes_on_one_thread_and_gives_the_others_back(width, expected):
    none = dict.fromkeys(("vae", "unet", "scheduler", "safety_checker", "feature_extractor"))
    encoder, seen = make_encoder(CLIPTextModel, width), []
    text = TextEncoder(StableDiffusionPipeline(tokenizer=deepcopy(TOKENIZER), text_encoder=encoder, **none))

    def note(*_):
        seen.append(torch.get_num_threads())
        if len(seen) == 2:
            raise MemoryError

    encoder.register_forward_pre_hook(note)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        text.encode(parts("a house"))
        assert torch.get_num_threads() == 3
        with pytest.raises(MemoryError):
            text.encode(parts("a tree"))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert seen == [expected, expected]
