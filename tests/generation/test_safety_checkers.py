"""What the two safety checkers say of images, beside diffusers and transformers on the same weights."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
from safetensors.torch import load_file, save_file
from tiny import make_checkers
from transformers import ViTForImageClassification

from fewstep.errors import WeightsError
from fewstep.generation.preprocessing import Preprocessing
from fewstep.generation.safety import (
    PROCESSORS,
    SAFE,
    UNCHECKED,
    UNSAFE,
    SafetyChecker,
    _clip,
    load_safety_checker,
)

CPU = torch.device("cpu")
IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3, 8, 8, 3), np.uint8))


def load(folder, kind, device=CPU):
    return load_safety_checker(folder, kind, device, torch.float32, "mend it")


def rewrite(path, change):
    """`change` the tensors of a file; what was loaded from it before is mapped, and stays."""
    state = {key: value.clone() for key, value in load_file(path).items()}
    change(state)
    path.unlink()
    save_file(state, path, {"format": "pt"})


def large(generator):
    """Weights that see differences between images; a fresh model's hardly do."""

    def change(state):
        for key, value in state.items():
            if value.ndim > 1 and "embeds" not in key:
                state[key] = torch.randn(value.shape, generator=generator)

    return change


@pytest.mark.parametrize("kind", ["clip", "vit"])
@pytest.mark.parametrize("flags", [False, True])
def test_a_checker_says_of_each_image_what_its_weights_say(tmp_path, kind, flags):
    make_checkers(tmp_path, flags)
    verdicts = load(tmp_path, kind).verdicts(IMAGES)
    assert verdicts.tolist() == [UNSAFE if flags else SAFE] * 3
    assert verdicts.dtype == torch.int8


class Diffusers:
    """The clip checker of a folder, as diffusers computes it."""

    def __init__(self, folder):
        self.module = StableDiffusionSafetyChecker.from_pretrained(folder / "safety_checker").eval()
        file = folder / PROCESSORS["clip"]
        self.prepare = Preprocessing.read(file, CPU, default_to_square=False, do_center_crop=True)

    @torch.inference_mode()
    def embeddings(self, images):
        return self.module.visual_projection(self.module.vision_model(self.prepare(images))[1])

    def verdicts(self, images):
        return self.module(self.prepare(images), torch.zeros(len(images), 1))[1]


def test_clip_flags_what_is_nearer_to_a_concept_than_its_threshold(tmp_path):
    make_checkers(tmp_path, flags=False)
    path = tmp_path / "safety_checker" / "model.safetensors"
    rewrite(path, large(torch.Generator().manual_seed(0)))
    embeddings = F.normalize(Diffusers(tmp_path).embeddings(IMAGES))
    nearest = (embeddings[1] @ embeddings[[0, 2]].T).max().item()
    assert nearest < 0.99  # the checker rounds to a thousandth

    def change(state):
        state["concept_embeds"][5] = embeddings[1]
        state["concept_embeds_weights"][5] = (1 + nearest) / 2

    rewrite(path, change)
    assert load(tmp_path, "clip").verdicts(IMAGES).tolist() == [SAFE, UNSAFE, SAFE]


class Compared:
    """What both ways to compare make of an image is its embedding here."""

    dtype = torch.float32

    def __init__(self, special, concepts, thresholds):
        self.special_care_embeds, self.concept_embeds = special, concepts
        self.special_care_embeds_weights = thresholds[: len(special)]
        self.concept_embeds_weights = thresholds[len(special) :]

    def vision_model(self, pixels):
        return None, pixels

    def visual_projection(self, pooled):
        return pooled

    def verdicts(self, embeddings):
        return SafetyChecker(_clip(lambda _: self, lambda images: images)).verdicts(embeddings).tolist()

    def reference(self, embeddings):
        _, unsafe = StableDiffusionSafetyChecker.forward(self, embeddings, torch.zeros(len(embeddings), 1))
        return [UNSAFE if each else SAFE for each in unsafe]


def thresholds_at(embeddings, concepts):
    """Such that half of all images exceed some."""
    cosines = F.normalize(embeddings) @ F.normalize(concepts).T
    return cosines.quantile(0.5 ** (1 / len(concepts)), dim=0)


@pytest.mark.parametrize("seed", range(4))
def test_clip_compares_as_diffusers_does(seed):
    generator = torch.Generator().manual_seed(seed)
    embeddings, special, concepts = (torch.randn(n, 12, generator=generator) for n in (2000, 3, 17))
    thresholds = torch.cat([thresholds_at(embeddings, special), thresholds_at(embeddings, concepts)])
    # Without those images whose scores, with special care or without, round by their last bits.
    unit = F.normalize(torch.cat([special, concepts]).double())
    thousandths = 1000 * (F.normalize(embeddings.double()) @ unit.T - thresholds)
    near = ((thousandths - 0.5).abs() < 0.01) | ((thousandths + 9.5).abs() < 0.01)
    embeddings = embeddings[~near.any(1)]
    assert len(embeddings) > 1900
    compared = Compared(special, concepts, thresholds)
    found = compared.verdicts(embeddings)
    assert found == compared.reference(embeddings)
    compared.special_care_embeds_weights.fill_(2.0)  # which none exceeds
    careless = compared.verdicts(embeddings)
    assert careless == compared.reference(embeddings)
    assert {*zip(careless, found, strict=True)} == {(SAFE, SAFE), (SAFE, UNSAFE), (UNSAFE, UNSAFE)}


@pytest.mark.parametrize(
    ("above_special", "above", "verdict"),
    [
        (-1, 0.0004, SAFE),  # rounded to a thousandth, it is 0
        (-1, 0.0006, UNSAFE),
        (0.0004, -0.005, SAFE),
        (0.0006, -0.005, UNSAFE),  # special care adds 0.01
        (0.0006, -0.0094, UNSAFE),
        (0.0006, -0.0096, SAFE),
        (0.5, -0.011, SAFE),
    ],
)
def test_clip_rounds_before_it_compares_and_adds_special_care_once(above_special, above, verdict):
    special, concepts = torch.tensor([[2.0, 0.0]] * 2), torch.tensor([[0.0, 3.0]])
    thresholds = torch.tensor([0.6 - above_special, 0.6 - above_special, 0.8 - above])
    compared = Compared(special, concepts, thresholds)
    embeddings = torch.tensor([[0.6, 0.8], [-0.6, -0.8], [60.0, 80.0]])  # the same, its opposite, and longer
    assert compared.verdicts(embeddings) == compared.reference(embeddings) == [verdict, SAFE, verdict]


def test_clip_says_of_each_embedding_whether_it_could_be_compared():
    compared = Compared(torch.eye(4)[:1], torch.eye(4)[1:2], torch.tensor([2.0, 0.5]))
    rows = [[0, 1, 0, 0], [0, 0, 1, 0], [torch.nan, 1, 0, 0], [0, torch.inf, 0, 0], [0, 1e30, 0, 0], [0] * 4]
    expected = [UNSAFE, SAFE, UNCHECKED, UNCHECKED, UNCHECKED, SAFE]
    assert compared.verdicts(torch.tensor(rows, dtype=torch.float32)) == expected


@pytest.mark.parametrize("seed", range(3))
def test_clip_says_of_images_what_diffusers_says(tmp_path, seed):
    make_checkers(tmp_path, flags=False)
    # As the published file has it: bare numbers, of the shorter edge and of a square in the middle.
    means = {"image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28]}
    words = {"size": 32, "crop_size": 32, "resample": 3, **means}
    (tmp_path / PROCESSORS["clip"]).write_text(json.dumps(words))
    path = tmp_path / "safety_checker" / "model.safetensors"
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (40, 33, 48, 3), generator=generator, dtype=torch.uint8)
    rewrite(path, large(generator))
    embeddings = Diffusers(tmp_path).embeddings(images)

    def change(state):
        for name in ("concept_embeds", "special_care_embeds"):
            state[name] = torch.randn(state[name].shape, generator=generator)
            state[f"{name}_weights"] = thresholds_at(embeddings, state[name])

    rewrite(path, change)
    expected = Diffusers(tmp_path).verdicts(images)
    assert load(tmp_path, "clip").verdicts(images).tolist() == [int(unsafe) for unsafe in expected]
    assert {*expected} == {False, True}


@torch.inference_mode()
def test_vit_flags_what_is_as_likely_unsafe_as_not(tmp_path):
    make_checkers(tmp_path, flags=False)
    path = tmp_path / "safety_classifier" / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 33, 48, 3), generator=generator, dtype=torch.uint8)
    rewrite(path, large(generator))
    classifier = ViTForImageClassification.from_pretrained(path.parent).eval()
    pixels = Preprocessing.read(tmp_path / PROCESSORS["vit"], CPU)(images)
    normal, unsafe = classifier(pixels).logits.T
    middle = (normal - unsafe).quantile(0.6)  # between two of 40 images
    rewrite(path, lambda state: state["classifier.bias"][1].add_(middle))
    expected = [int(each) for each in unsafe + middle >= normal]
    assert load(tmp_path, "vit").verdicts(images).tolist() == expected
    assert sum(expected) == 24


@pytest.mark.parametrize("kind", ["clip", "vit"])
def test_no_checker_reads_what_the_device_computes(tmp_path, kind, caplog):
    """The numbers of a meta tensor cannot be read: item, tolist, cpu, bool and masks all fail."""
    make_checkers(tmp_path, flags=False)
    images = torch.empty(5, 40, 24, 3, dtype=torch.uint8, device="meta")
    verdicts = load(tmp_path, kind, images.device).verdicts(images)
    assert (verdicts.shape, verdicts.device) == ((5,), images.device)
    assert not caplog.records  # of a failure


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("kind", ["clip", "vit"])
@pytest.mark.parametrize("flags", [False, True])
def test_a_gpu_checks_without_a_wait(tmp_path, kind, flags):
    make_checkers(tmp_path, flags)
    checker = load(tmp_path, kind, torch.device("cuda"))
    images = IMAGES.cuda()
    checker.verdicts(images)  # the libraries' own beginnings may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        verdicts = checker.verdicts(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert verdicts.tolist() == [UNSAFE if flags else SAFE] * 3


@pytest.mark.parametrize("kind", ["clip", "vit"])
@pytest.mark.parametrize("damage", ["missing", "a tensor less", "nan"])
def test_a_checker_that_is_not_whole_is_none(tmp_path, kind, damage):
    make_checkers(tmp_path, flags=False)
    path = tmp_path / {"clip": "safety_checker", "vit": "safety_classifier"}[kind] / "model.safetensors"
    last = "visual_projection.weight" if kind == "clip" else "classifier.weight"
    if damage == "missing":
        path.unlink()
    elif damage == "a tensor less":
        rewrite(path, lambda state: state.pop(last))
    else:
        rewrite(path, lambda state: state[last][0, 0].fill_(torch.nan))
        assert load(tmp_path, kind).verdicts(IMAGES).tolist() == [UNCHECKED] * 3
        return
    with pytest.raises(WeightsError, match="run: mend it"):
        load(tmp_path, kind)


@pytest.mark.parametrize("name", ["concept_embeds", "special_care_embeds"])
@pytest.mark.parametrize("end", ["", "_weights"])
def test_a_concept_that_is_nan_is_no_reason_to_call_an_image_safe(tmp_path, name, end):
    make_checkers(tmp_path, flags=False)
    path = tmp_path / "safety_checker" / "model.safetensors"
    rewrite(path, lambda state: state[name + end][-1].fill_(torch.nan))
    assert load(tmp_path, "clip").verdicts(IMAGES).tolist() == [UNCHECKED] * 3


@pytest.mark.parametrize("kind", ["clip", "vit"])
@pytest.mark.parametrize("damage", [None, "{", '{"size": 224, "resample": 1}'])
def test_a_checker_whose_images_nobody_can_prepare_is_none(tmp_path, kind, damage):
    make_checkers(tmp_path, flags=False)
    file = tmp_path / PROCESSORS[kind]
    file.unlink()
    if damage:
        file.write_text(damage)
    with pytest.raises(WeightsError, match=r"preprocessor_config.json is missing or .*; run: mend it"):
        load(tmp_path, kind)
