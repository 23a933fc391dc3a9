"""What one caller asks: `Inputs`, checked without a model, and `Request`, which a loaded model can run."""

import logging
import math
import secrets
from collections.abc import Hashable
from dataclasses import dataclass, field

from PIL import Image

from fewstep import __version__
from fewstep.errors import InvalidRequest
from fewstep.images.codec import fit, same_shape
from fewstep.images.metadata import KEY, SAME_NAMES, Recipe
from fewstep.lora.types import Lora, LoraRef, Mix, parse_source
from fewstep.models.specs import ModelSpec
from fewstep.prompts import Part, parse_prompt

logger = logging.getLogger(__name__)

PROMPT_MAX_CHARS = 2000
STEPS = (1, 8)
GUIDANCE = (0.0, 20.0)
# The LCM-LoRA has guidance distilled into it: more than this on top burns the image.
LCM_LORA_MAX_GUIDANCE = 4.0
# 31 bits, because Cog's command line reads integers as 32 bits with a sign.
SEED_MAX = 2**31 - 1
NUM_OUTPUTS = (1, 4)
STRENGTH = (0.0, 1.0)
# The steps of the schedule that an LCM is distilled on; a strength is a share of them.
SCHEDULE_STEPS = 50
STYLE_SCALE = (-2.0, 2.0)
LCM_SCALE = (0.0, 2.0)
SIDE = (64, 2048)
QUALITY = (1, 100)
FORMATS = ("webp", "jpg", "png")

# SDXL's training sizes (width, height) under the names that people know, at a native size of 1024 px.
BUCKETS_AT = 1024
ASPECT_RATIOS: dict[str, tuple[int, int]] = {
    "1:1": (1024, 1024),
    "16:9": (1344, 768),
    "9:16": (768, 1344),
    "4:3": (1152, 896),
    "3:4": (896, 1152),
    "3:2": (1216, 832),
    "2:3": (832, 1216),
    "21:9": (1536, 640),
    "9:21": (640, 1536),
}
ASPECT_CHOICES = ("auto", *ASPECT_RATIOS, "custom")


@dataclass(frozen=True, slots=True)
class Inputs:
    """What predict() takes, checked, with nothing left open: sizes are resolved and the seed is drawn.

    Made by `create`; the constructor checks nothing.
    """

    prompt: str
    prompt_parts: tuple[Part, ...]
    negative_prompt: str
    negative_parts: tuple[Part, ...]
    steps: int
    guidance: float
    guided: bool  # classifier-free guidance: two UNet evaluations a step, and negative_prompt counts
    seed: int
    num_outputs: int
    width: int  # a multiple of 8, as is height: the VAE reduces by 8
    height: int
    output_format: str
    output_quality: int
    strength: float = 1.0  # how far from `image`; without one, all the way from noise
    styles: tuple[LoraRef, ...] = ()
    lcm_scale: float = 1.0
    # RGB, of this size, and L, white where to repaint; `info["sha256"]` of each is the caller's file's.
    image: Image.Image | None = field(default=None, repr=False)
    mask: Image.Image | None = field(default=None, repr=False)
    unchecked: bool = False  # asked for; whether it counts is the operator's to say
    clip_skip: int = 0  # of the text encoders' layers, from the last

    @classmethod
    def create(
        cls,
        spec: ModelSpec,
        *,
        prompt: str,
        steps: int = 4,
        guidance: float | None = None,
        seed: int | None = None,
        negative_prompt: str = "",
        num_outputs: int = 1,
        aspect_ratio: str = "auto",
        width: int | None = None,
        height: int | None = None,
        output_format: str = "webp",
        output_quality: int = 90,
        style: str | None = None,
        style_scale: float = 0.8,
        extra_style: str | None = None,
        extra_style_scale: float = 0.8,
        lcm_scale: float = 1.0,
        image: Image.Image | None = None,
        mask: Image.Image | None = None,
        prompt_strength: float = 0.8,
        clip_skip: int = 0,
        disable_safety_checker: bool = False,
    ) -> "Inputs":
        """Check every input, types included, since coglet without a schema passes anything on.

        Raises InvalidRequest whose sentence says what is allowed.
        """
        scale = _guidance(spec, guidance)
        guided = not spec.embedded_guidance and scale > 1
        if mask is not None:
            mask = _mask_on(image, mask)
        width, height = _size(spec, aspect_ratio, width, height, image)
        strength = _number("prompt_strength", prompt_strength, *STRENGTH)
        if (added := _number("lcm_scale", lcm_scale, *LCM_SCALE)) != 1.0 and not spec.lcm_lora:
            raise InvalidRequest(
                f"lcm_scale is {added:g}; {spec.name} has no LCM-LoRA to scale, so leave it out"
            )
        parts = parse_prompt("prompt", _text("prompt", prompt))
        if not parts:
            raise InvalidRequest("prompt is empty; say in a few words what to paint")
        if _text("negative_prompt", negative_prompt) and not guided:
            logger.warning("negative_prompt has no effect: guidance is %g, and it takes more than 1", scale)
        return cls(
            prompt=prompt,
            prompt_parts=parts,
            negative_prompt=negative_prompt,
            negative_parts=parse_prompt("negative_prompt", negative_prompt),
            steps=_whole("steps", steps, *STEPS),
            guidance=scale,
            guided=guided,
            seed=secrets.randbits(31) if seed is None else _whole("seed", seed, 0, SEED_MAX),
            num_outputs=_whole("num_outputs", num_outputs, *NUM_OUTPUTS),
            width=width,
            height=height,
            output_format=_choice("output_format", output_format, FORMATS),
            output_quality=_whole("output_quality", output_quality, *QUALITY),
            styles=(
                *_style("style", style, style_scale),
                *_style("extra_style", extra_style, extra_style_scale),
            ),
            lcm_scale=added,
            strength=1.0 if image is None else strength,
            image=None if image is None else fit(image, width, height),
            mask=None if mask is None else fit(mask, width, height),
            clip_skip=_whole("clip_skip", clip_skip, 0, spec.max_clip_skip),
            unchecked=_flag("disable_safety_checker", disable_safety_checker),
        )

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seed of each image; they count up and wrap to stay within 31 bits."""
        return tuple((self.seed + i) % (SEED_MAX + 1) for i in range(self.num_outputs))

    @property
    def real_steps(self) -> int:
        """How many steps are taken: of a low strength there are fewer to take, but always one."""
        return min(self.steps, max(1, int(self.strength * SCHEDULE_STEPS)))


@dataclass(frozen=True, slots=True)
class Request:
    """What one caller asks of a loaded model; `Pipeline.request` makes it."""

    inputs: Inputs
    loras: tuple[Lora, ...]  # that `inputs.styles` name, in order
    chunks: int  # of the text encoders' length, that the prompts fill

    @property
    def num_outputs(self) -> int:
        """How many images it takes in a batch."""
        return self.inputs.num_outputs

    @property
    def mix(self) -> Mix:
        """What is added to the model's weights."""
        scales = (style.scale for style in self.inputs.styles)
        return Mix(tuple(zip(self.loras, scales, strict=True)), self.inputs.lcm_scale)

    @property
    def weights_key(self) -> Hashable:
        """Requests with equal keys are generated by the same weights."""
        return self.mix.key

    @property
    def shape_key(self) -> Hashable:
        """Requests with equal keys may share a forward pass: all that changes the computation but prompt,
        seed and the value of guidance."""
        inputs = self.inputs
        mode = "text" if inputs.image is None else "image" if inputs.mask is None else "mask"
        text = (self.chunks, inputs.clip_skip)
        size = (inputs.width, inputs.height)
        return (*size, mode, inputs.steps, inputs.strength, inputs.guided, text, self.weights_key)

    def recipe(self, seed: int, model: str, revision: str) -> Recipe:
        """The inputs that generate one image of this request again, alone; `revision` is of the weights."""
        inputs = self.inputs
        recipe: Recipe = {KEY: __version__, "model": model, "revision": revision}
        recipe |= {name: getattr(inputs, name) for name in SAME_NAMES} | {"seed": seed}
        recipe["styles"] = [
            {"style": style.source.shown, "style_scale": style.scale, "sha256": lora.sha256}
            for style, lora in zip(inputs.styles, self.loras, strict=True)
        ]
        if inputs.clip_skip:
            recipe["clip_skip"] = inputs.clip_skip
        if inputs.image is not None:
            recipe["prompt_strength"] = inputs.strength
        for name, image in (("image_sha256", inputs.image), ("mask_sha256", inputs.mask)):
            if image is not None:
                recipe[name] = image.info.get("sha256", "")
        return recipe


def _shown(value: object) -> str:
    """Numbers as they are, everything else by its type: an error never quotes free text."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"of type {type(value).__name__}"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if abs(value) < 10**15 else "a number of more than 15 digits"


def _whole(name: str, value: object, low: int, high: int) -> int:
    # JSON Schema counts 2.0 as an integer, and coglet then passes it on as a float.
    whole = int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(whole, bool) or not isinstance(whole, int) or not low <= whole <= high:
        raise InvalidRequest(f"{name} is {_shown(value)}; it must be a whole number from {low} to {high}")
    return whole


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequest(f"{name} is {_shown(value)}; it must be true or false")
    return value


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in allowed:
        raise InvalidRequest(f"{name} is not one of the choices; choose one of {', '.join(allowed)}")
    return value


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} is {_shown(value)}; it must be text")
    if len(value) > PROMPT_MAX_CHARS:
        raise InvalidRequest(
            f"{name} has {len(value)} characters; at most {PROMPT_MAX_CHARS} are allowed, so shorten it"
        )
    # Neither can be kept: a file's metadata ends at a NUL, and half a surrogate pair has no UTF-8.
    if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
        raise InvalidRequest(f"{name} holds a NUL or half of a surrogate pair; send it as plain Unicode text")
    return value


def _guidance(spec: ModelSpec, value: object) -> float:
    if value is None:
        return spec.default_guidance
    high = LCM_LORA_MAX_GUIDANCE if spec.lcm_lora else GUIDANCE[1]
    why = f", since {spec.name} has guidance built in" if spec.lcm_lora else ""
    return _number("guidance", value, GUIDANCE[0], high, why)


def _number(name: str, value: object, low: float, high: float, why: str = "") -> float:
    # NaN fails every comparison, so that it is refused here too.
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InvalidRequest(f"{name} is {_shown(value)}; it must be a number from {low:g} to {high:g}{why}")
    return float(value)


def _style(name: str, source: object, scale: object) -> tuple[LoraRef, ...]:
    checked = _number(f"{name}_scale", scale, *STYLE_SCALE)
    if source is None or source == "":  # pages send empty fields
        return ()
    return (LoraRef(name, parse_source(name, _text(name, source)), checked),)


def _mask_on(image: Image.Image | None, mask: Image.Image) -> Image.Image:
    """`mask` at the size of `image`, so that both are cut to shape alike."""
    if image is None:
        raise InvalidRequest("mask is given without image; send the picture that it belongs to as well")
    (wide, high), (mask_wide, mask_high) = image.size, mask.size
    if abs(wide * mask_high / (high * mask_wide) - 1) > 0.02:
        raise InvalidRequest(
            f"mask is {mask_wide}x{mask_high} px and image {wide}x{high} px; send them in one shape"
        )
    return fit(mask, wide, high)


def _size(
    spec: ModelSpec, aspect_ratio: object, width: object, height: object, image: Image.Image | None
) -> tuple[int, int]:
    aspect = _choice("aspect_ratio", aspect_ratio, ASPECT_CHOICES)
    if aspect != "custom":
        if width is not None or height is not None:
            raise InvalidRequest(
                "width and height go only with aspect_ratio=custom; set that, or leave them out"
            )
        if aspect == "auto" and image is not None:
            return same_shape(image.size, spec.native_size)
        return named_sizes_of(spec.native_size)["1:1" if aspect == "auto" else aspect]
    if width is None or height is None:
        raise InvalidRequest("aspect_ratio=custom needs both width and height; give both, in px")
    wide, high = (_to_multiple_of_8(_whole(*side, *SIDE)) for side in (("width", width), ("height", height)))
    if wide * high > spec.max_pixels:
        square = math.isqrt(spec.max_pixels)
        raise InvalidRequest(
            f"{wide}x{high} is {wide * high} px in all; {spec.name} paints at most {spec.max_pixels} px, "
            f"such as {square}x{square}, so ask for a smaller size"
        )
    return wide, high


def named_sizes_of(native_size: int) -> dict[str, tuple[int, int]]:
    """Width and height in px of every shape that a model of this native size generates, the square first."""
    scale = native_size / BUCKETS_AT
    return {
        name: (_to_multiple_of_8(wide * scale), _to_multiple_of_8(high * scale))
        for name, (wide, high) in ASPECT_RATIOS.items()
    }


def _to_multiple_of_8(side: float) -> int:
    return math.floor(side / 8 + 0.5) * 8
