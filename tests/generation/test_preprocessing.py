"""What vision models are shown: the image that transformers' own processors make of it by Pillow."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil, ViTImageProcessorPil

from fewstep.generation.preprocessing import Preprocessing

CPU = torch.device("cpu")
# As published with Stable Diffusion 1.5, by a transformers of 2022, and by Falconsai.
CLIP = {
    "crop_size": 224,
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 224,
}
VIT = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "ViTImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "resample": 2,
    "rescale_factor": 0.00392156862745098,
    "size": {"height": 224, "width": 224},
}
OF_CLIP = {"default_to_square": False, "do_center_crop": True}
SIZES = {  # (width, height), in px
    "square": (512, 512),
    "the native size": (1024, 1024),
    "wide": (896, 320),
    "tall": (320, 1152),
    "odd": (333, 517),
    "the target": (224, 224),
    "smaller": (70, 51),
    "smaller in one": (100, 450),
}


def images_of(size):
    """Three: the hardest for a filter, noise of the two ends of the range; a slope; and squares."""
    width, height = size
    generator = np.random.default_rng(0)
    noise = 255 * generator.integers(0, 2, (height, width, 3))
    slope = np.linspace(0, 255, height)[:, None, None] * np.linspace(0, 1, width)[:, None] * [1, 0.8, 0.5]
    colours = generator.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3))
    squares = np.kron(colours, np.ones((16, 16, 1)))[:height, :width]
    return np.stack([noise, slope, squares]).astype(np.uint8)


@pytest.fixture
def width_first(monkeypatch):
    """Pillow's own passes in one order: Pillow 13 takes the other where it has less to compute so."""
    resize = Image.Image.resize

    def in_turn(self, size, resample, **options):
        return resize(resize(self, (size[0], self.height), resample), size, resample)

    monkeypatch.setattr(Image.Image, "resize", in_turn)


def differences(file, processor, defaults, images):
    """Between ours and the processor's, in levels of a byte."""
    ours = Preprocessing.read(file, CPU, **defaults)
    found = ours(torch.from_numpy(images))
    theirs = processor([Image.fromarray(image) for image in images], return_tensors="pt").pixel_values
    assert found.dtype == torch.float32 and found.shape == theirs.shape
    apart = ((found - theirs) * ours.std / ours.scale).abs()
    assert (apart - apart.round()).abs().max() < 0.01  # whole levels, as Pillow's are
    return apart


def assert_near(*compared):
    """Both round twice to whole levels, and a half may fall either way, as the weights' last bits have it: 1
    after the first pass. In the second that counts times the absolute values of its weights, whose sum is at
    most 1.25 for bicubic, and is rounded again: 2. Few values are that near to a half.
    """
    apart = differences(*compared)
    assert apart.max() < 2.01
    assert (apart > 0.5).float().mean() < 0.25


OF_BOTH = pytest.mark.parametrize(
    ("published", "kind", "defaults"),
    [(CLIP, CLIPImageProcessorPil, OF_CLIP), (VIT, ViTImageProcessorPil, {})],
    ids=["clip", "vit"],
)


def published_in(folder, published):
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(published))
    return file


@OF_BOTH
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_it_makes_what_transformers_processor_makes(tmp_path, width_first, published, kind, defaults, size):
    file = published_in(tmp_path, published)
    assert_near(file, kind.from_pretrained(tmp_path), defaults, images_of(size))


@OF_BOTH
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_the_order_of_the_two_passes_hardly_matters(tmp_path, published, kind, defaults, size):
    """In images of half the range, which negative weights leave by an eighth at most on each side in a pass.
    An order is off by at most 0.5 * 1.25 + 0.5 from what is not rounded, and so by 2 from the other.
    """
    images = 64 + images_of(size) // 2
    file = published_in(tmp_path, published)
    assert differences(file, kind.from_pretrained(tmp_path), defaults, images).max() < 2.01


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": {"shortest_edge": 30}, "crop_size": {"height": 41, "width": 28}},  # black above and below
        {"size": {"height": 40, "width": 30}, "resample": 2},
        {"do_center_crop": False},
        {"do_resize": False, "crop_size": {"height": 99, "width": 14}},
        {"do_rescale": False, "image_mean": [100.0, 110.0, 120.0], "image_std": [60.0, 70.0, 80.0]},
        {"do_normalize": False},
        {"rescale_factor": 1 / 127.5},
    ],
)
def test_whatever_the_file_of_a_processor_says_is_done(tmp_path, width_first, options):
    processor = CLIPImageProcessorPil(**options)
    processor.save_pretrained(tmp_path)
    images = images_of((64, 48))
    assert_near(tmp_path / "preprocessor_config.json", processor, OF_CLIP, images)


@pytest.mark.parametrize("name", ["do_resize", "do_center_crop", "do_rescale", "do_normalize"])
def test_null_switches_off(tmp_path, width_first, name):
    file = published_in(tmp_path, CLIP | {name: None})
    assert_near(file, CLIPImageProcessorPil.from_pretrained(tmp_path), OF_CLIP, images_of((64, 48)))


@pytest.mark.parametrize(
    "change",
    [
        {"resample": 1},  # Lanczos
        {"size": {"longest_edge": 224}},
        {"size": {"shortest_edge": 224, "longest_edge": 400}},
        {"size": None},
        {"do_rescale": True, "rescale_factor": None},
        {"image_mean": [0.5]},
        {"image_std": 0.5},
    ],
)
def test_what_it_would_do_otherwise_is_refused(tmp_path, change):
    file = published_in(tmp_path, CLIP | change)
    with pytest.raises((ValueError, LookupError, TypeError)):
        Preprocessing.read(file, CPU, **OF_CLIP)
    for no_table in ("{", "[1]", "3"):
        file.write_text(no_table)
        with pytest.raises((ValueError, LookupError, TypeError)):
            Preprocessing.read(file, CPU, **OF_CLIP)
