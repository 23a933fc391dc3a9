"""Safety: what cannot be checked is withheld, what is flagged is dropped, and nobody else suffers."""

import asyncio
import os
import shutil
import threading

import numpy as np
import pytest
import torch
from generating import results_of
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import as_downloaded, make_checkers, make_folder

from fewstep.coglet.server import free_port, running_server
from fewstep.errors import DeadlineExceeded, SafetyError, UnsafeImage, WeightsError
from fewstep.generation.batcher import Batcher
from fewstep.generation.load import load_pipeline
from fewstep.generation.pipeline import GenerationResult
from fewstep.generation.safety import SafetyChecker, load_safety_checker
from fewstep.models.save import save_model
from fewstep.models.specs import get_model
from fewstep.request import Inputs
from fewstep.settings import Settings

SD15 = get_model("sd15")
CPU = torch.device("cpu")
IMAGES = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (8, 8, 3), np.uint8)) for i in range(3)]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """weights/sd15 as download and save make it, at toy size."""
    root = tmp_path_factory.mktemp("weights")
    save_model(SD15, as_downloaded(SD15, make_folder(SD15, root / "source")), root)
    return root


@pytest.fixture(scope="module")
def pipeline(weights):
    return load_pipeline(SD15, Settings(model="sd15", weights_root=weights))


def wish(seed=0, **inputs):
    size = {"aspect_ratio": "custom", "width": 64, "height": 64}
    return Inputs.create(SD15, prompt="a house", seed=seed, steps=1, **size, **inputs)


def flagged(checker):
    """Which of IMAGES are; the others are given out as they are."""
    found = [checker.checked(image) for image in IMAGES]
    assert all(one is image or isinstance(one, UnsafeImage) for one, image in zip(found, IMAGES, strict=True))
    return [isinstance(one, UnsafeImage) for one in found]


@pytest.mark.parametrize("kind", ["clip", "vit"])
@pytest.mark.parametrize("flags", [False, True])
def test_a_checker_says_of_each_image_what_its_weights_say(tmp_path, kind, flags):
    make_checkers(tmp_path, flags)
    checker = load_safety_checker(tmp_path, kind, CPU, torch.float32, "mend it")
    assert flagged(checker) == [flags] * 3


def test_clip_flags_what_is_nearer_to_a_concept_than_its_threshold(tmp_path):
    make_checkers(tmp_path, flags=False)
    path = tmp_path / "safety_checker" / "model.safetensors"

    def change(tensors):
        state = {key: value.clone() for key, value in load_file(path).items()} | tensors
        path.unlink()  # what was loaded from it is mapped
        save_file(state, path, {"format": "pt"})
        return load_safety_checker(tmp_path, "clip", CPU, torch.float32, "mend it")

    # Small weights, as a fresh model has, see hardly any difference between images.
    generator = torch.Generator().manual_seed(0)
    large = {
        key: torch.randn(value.shape, generator=generator)
        for key, value in load_file(path).items()
        if value.ndim > 1 and "embeds" not in key
    }
    probe = change(large)
    embeddings = torch.nn.functional.normalize(probe._decide(IMAGES)[0])
    nearest = (embeddings[1] @ embeddings[[0, 2]].T).max().item()
    assert nearest < 0.99  # the checker rounds to a thousandth
    state = load_file(path)
    concepts, thresholds = state["concept_embeds"].clone(), state["concept_embeds_weights"].clone()
    concepts[5], thresholds[5] = embeddings[1], (1 + nearest) / 2
    checker = change({"concept_embeds": concepts, "concept_embeds_weights": thresholds})
    assert flagged(checker) == [False, True, False]


@pytest.mark.parametrize("kind", ["clip", "vit"])
@pytest.mark.parametrize("damage", ["missing", "a tensor less", "nan"])
def test_a_checker_that_is_not_whole_is_none(tmp_path, kind, damage):
    make_checkers(tmp_path, flags=False)
    path = tmp_path / {"clip": "safety_checker", "vit": "safety_classifier"}[kind] / "model.safetensors"
    state = {key: value.clone() for key, value in load_file(path).items()}
    last = "visual_projection.weight" if kind == "clip" else "classifier.weight"
    path.unlink()
    if damage == "a tensor less":
        del state[last]
    elif damage == "nan":
        state[last][0, 0] = torch.nan
    if damage != "missing":
        save_file(state, path, {"format": "pt"})
    if damage == "nan":
        checker = load_safety_checker(tmp_path, kind, CPU, torch.float32, "mend it")
        assert all(isinstance(checker.checked(image), SafetyError) for image in IMAGES)
    else:
        with pytest.raises(WeightsError, match="run: mend it"):
            load_safety_checker(tmp_path, kind, CPU, torch.float32, "mend it")


def test_setup_fails_without_the_checker_unless_it_is_switched_off(tmp_path):
    files = as_downloaded(SD15, make_folder(SD15, tmp_path / "s"))
    save_model(SD15, [each for each in files if "safety" not in each.file.place], tmp_path)
    settings = {"model": "sd15", "weights_root": tmp_path}
    missing = r"weights/sd15/safety_c\w+ is missing; run: scripts/download-weights sd15"
    for kind in ("clip", "vit"):
        with pytest.raises(WeightsError, match=missing):
            load_pipeline(SD15, Settings(**settings, safety=kind))
    assert load_pipeline(SD15, Settings(**settings, safety="off")).checker is None


def test_the_miniature_needs_none():
    assert load_pipeline(get_model("miniature"), Settings()).checker is None


def use(pipeline, monkeypatch, decide):
    monkeypatch.setattr(pipeline, "checker", SafetyChecker(decide))


def raises(images):
    raise RuntimeError("broken")


@pytest.mark.parametrize(
    "decide",
    [
        raises,
        lambda images: (torch.full((len(images), 2), torch.nan), [False] * len(images)),
        lambda images: (torch.tensor([[0.0, torch.inf]]), [False] * len(images)),
        lambda images: (torch.zeros(len(images), 2), []),
        lambda images: (torch.zeros(len(images), 2), [False] * (len(images) + 1)),
        lambda images: (torch.zeros(len(images) + 1, 2), [False] * len(images)),
        lambda images: None,
    ],
)
def test_whatever_goes_wrong_withholds_the_image(pipeline, monkeypatch, decide):
    use(pipeline, monkeypatch, decide)
    [found] = results_of(pipeline, wish())
    assert isinstance(found, SafetyError) and "withheld" in found.sentence


def test_a_checker_that_hangs_costs_its_own_time_and_gives_no_image_out(pipeline, monkeypatch):
    goes_on = threading.Event()

    def decide(images):
        goes_on.wait(60)
        return torch.zeros(len(images), 1), [False] * len(images)

    use(pipeline, monkeypatch, decide)

    async def ask():
        batcher = Batcher(pipeline, deadline_s=1)
        with pytest.raises(DeadlineExceeded):
            await batcher.submit(pipeline.request(wish()))
        goes_on.set()
        return await batcher.submit(pipeline.request(wish()))

    assert isinstance(asyncio.run(ask()), GenerationResult)


def test_flagged_images_are_dropped_and_all_flagged_is_an_error(pipeline, monkeypatch):
    seen = []

    def decide(images):
        seen.extend(images)
        return torch.zeros(1, 1), [len(seen) in (2, 5, 6)]

    use(pipeline, monkeypatch, decide)
    some, none, all_of_it = results_of(pipeline, wish(num_outputs=3), wish(10), wish(20, num_outputs=2))
    assert isinstance(some, GenerationResult) and some.seeds == [0, 2] and some.metrics["flagged"] == 1
    assert some.images == [seen[0], seen[2]]
    assert isinstance(none, GenerationResult) and none.seeds == [10] and none.metrics["flagged"] == 0
    assert isinstance(all_of_it, UnsafeImage)
    assert str(all_of_it).startswith("[unsafe] every picture was flagged")


def test_a_failed_check_fails_its_own_request_only(pipeline, monkeypatch):
    calls = []

    def decide(images):
        calls.append(images)
        return (torch.full((1, 1), torch.nan), [False]) if len(calls) == 2 else (torch.zeros(1, 1), [False])

    use(pipeline, monkeypatch, decide)
    ends = results_of(pipeline, wish(1), wish(2), wish(3))
    assert [type(end) for end in ends] == [GenerationResult, SafetyError, GenerationResult]


def test_a_request_can_switch_it_off_only_where_the_operator_allows_it(pipeline, monkeypatch):
    use(pipeline, monkeypatch, lambda images: (torch.zeros(1, 1), [True]))
    unchecked = wish(disable_safety_checker=True)
    [found] = results_of(pipeline, unchecked)
    assert isinstance(found, UnsafeImage)
    monkeypatch.setattr(pipeline, "allow_unsafe", True)
    found, mate = results_of(pipeline, unchecked, wish(1))
    assert isinstance(found, GenerationResult) and isinstance(mate, UnsafeImage)


def test_a_server_whose_every_image_is_flagged_starts_and_gives_none_out(tmp_path):
    folder = make_folder(SD15, tmp_path / "source")
    for name in ("safety_checker", "safety_classifier", "feature_extractor"):
        shutil.rmtree(folder / name)
    make_checkers(folder, flags=True)
    save_model(SD15, as_downloaded(SD15, folder), tmp_path / "weights")
    environ = os.environ | {
        "FEWSTEP_MODEL": "sd15",
        "FEWSTEP_WEIGHTS": str(tmp_path / "weights"),
        "FEWSTEP_OUTPUTS": str(tmp_path / "outputs"),
    }
    inputs = {"prompt": "a house", "steps": 1, "aspect_ratio": "custom", "width": 64, "height": 64}
    with (
        open(tmp_path / "log", "wb") as log,
        running_server(port=free_port(), log=log, environ=environ) as server,
    ):
        server.wait_ready()
        for extra in ({}, {"num_outputs": 2}, {"disable_safety_checker": True}):
            _, answer = server.post("/predictions", {"input": inputs | extra})
            assert answer["status"] == "failed" and "[unsafe] every picture was flagged" in answer["error"]
    assert list((tmp_path / "outputs").glob("*.*")) == []
