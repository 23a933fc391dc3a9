"""Safety: what cannot be checked is withheld, what is flagged is dropped, and nobody else suffers."""

import asyncio
import os
import shutil
import threading

import numpy as np
import pytest
import torch
from generating import results_of
from tiny import as_downloaded, make_checkers, make_folder

from fewstep.coglet.server import free_port, running_server
from fewstep.errors import DeadlineExceeded, SafetyError, UnsafeImage, WeightsError
from fewstep.generation.batcher import Batcher
from fewstep.generation.load import load_pipeline
from fewstep.generation.pipeline import GenerationResult
from fewstep.generation.safety import SAFE, UNCHECKED, UNSAFE, SafetyChecker, withheld
from fewstep.models.save import save_model
from fewstep.models.specs import get_model
from fewstep.request import Inputs
from fewstep.settings import Settings

SD15 = get_model("sd15")
IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 255, (3, 8, 8, 3), np.uint8))


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


def test_a_verdict_withholds_all_but_what_is_known_to_be_safe():
    assert withheld(SAFE) is None
    assert isinstance(withheld(UNSAFE), UnsafeImage)
    assert isinstance(withheld(UNCHECKED), SafetyError) and isinstance(withheld(77), SafetyError)


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


def zeros(images):
    return torch.zeros(len(images), 2, device=images.device)


def none_unsafe(images):
    return torch.zeros(len(images), dtype=torch.bool, device=images.device)


BROKEN = {
    "an error": raises,
    "nan": lambda images: (zeros(images) + torch.nan, none_unsafe(images)),
    "infinite": lambda images: (
        zeros(images).index_fill(1, none_unsafe(images)[:1].long(), torch.inf),
        none_unsafe(images),
    ),
    "no verdicts": lambda images: (zeros(images), none_unsafe(images)[:0]),
    "too many verdicts": lambda images: (zeros(images), none_unsafe(images).repeat(2)),
    "too many numbers": lambda images: (zeros(images).repeat(2, 1), none_unsafe(images)),
    "for another batch": lambda images: (zeros(images).repeat(2, 1), none_unsafe(images).repeat(2)),
    "nothing": lambda images: None,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_whatever_goes_wrong_withholds_the_images(pipeline, monkeypatch, caplog, kind):
    decide = BROKEN[kind]
    verdicts = SafetyChecker(decide).verdicts(IMAGES)
    assert verdicts.tolist() == [UNCHECKED] * 3 and verdicts.dtype == torch.int8
    assert bool(caplog.records) == (kind not in ("nan", "infinite"))
    use(pipeline, monkeypatch, decide)
    [found] = results_of(pipeline, wish())
    assert isinstance(found, SafetyError) and "withheld" in found.sentence


def test_a_failure_is_logged(caplog):
    SafetyChecker(raises).verdicts(IMAGES)
    [record] = caplog.records
    assert record.levelname == "ERROR" and "broken" in str(record.exc_info[1])


@pytest.mark.parametrize("row", range(3))
def test_an_images_own_numbers_alone_decide_on_it(row):
    numbers, unsafe = torch.zeros(3, 2), torch.tensor([True, False, True])
    numbers[row, 1] = torch.nan
    expected = [UNSAFE, SAFE, UNSAFE]
    expected[row] = UNCHECKED
    assert SafetyChecker(lambda images: (numbers, unsafe)).verdicts(IMAGES).tolist() == expected


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("an illegal memory access was encountered"),
        RuntimeError("CUDA error: unspecified launch failure"),
    ],
)
def test_a_device_that_fails_is_not_the_checkers_failure(error):
    def decide(images):
        raise error

    with pytest.raises(type(error)) as raised:
        SafetyChecker(decide).verdicts(IMAGES)
    assert raised.value is error


def test_a_checker_that_hangs_costs_its_own_time_and_gives_no_image_out(pipeline, monkeypatch):
    goes_on = threading.Event()

    def decide(images):
        goes_on.wait(60)
        return zeros(images), none_unsafe(images)

    use(pipeline, monkeypatch, decide)

    async def ask():
        batcher = Batcher(pipeline, deadline_s=1)
        with pytest.raises(DeadlineExceeded):
            await batcher.submit(pipeline.request(wish()))
        goes_on.set()
        return await batcher.submit(pipeline.request(wish()))

    assert isinstance(asyncio.run(ask()), GenerationResult)


class InTurn:
    """A checker that notes images in the order in which it sees them, however many at once."""

    def __init__(self, unsafe=(), nan=()):
        self.seen, self.unsafe, self.nan = [], unsafe, nan

    def __call__(self, images):
        turns = range(len(self.seen), len(self.seen) + len(images))
        self.seen.extend(images.cpu().numpy())
        numbers = torch.tensor([[torch.nan if turn in self.nan else 0.0] for turn in turns])
        unsafe = torch.tensor([turn in self.unsafe for turn in turns])
        return numbers.to(images.device), unsafe.to(images.device)


def test_flagged_images_are_dropped_and_all_flagged_is_an_error(pipeline, monkeypatch):
    decide = InTurn(unsafe=(1, 4, 5))
    use(pipeline, monkeypatch, decide)
    some, none, all_of_it = results_of(pipeline, wish(num_outputs=3), wish(10), wish(20, num_outputs=2))
    assert isinstance(some, GenerationResult) and some.seeds == [0, 2] and some.metrics["flagged"] == 1
    for given, seen in zip(some.images, (decide.seen[0], decide.seen[2]), strict=True):
        assert np.array_equal(given, seen)
    assert isinstance(none, GenerationResult) and none.seeds == [10] and none.metrics["flagged"] == 0
    assert isinstance(all_of_it, UnsafeImage)
    assert str(all_of_it).startswith("[unsafe] every picture was flagged")


def test_a_failed_check_fails_its_own_request_only(pipeline, monkeypatch):
    use(pipeline, monkeypatch, InTurn(nan=(1,)))
    ends = results_of(pipeline, wish(1), wish(2), wish(3))
    assert [type(end) for end in ends] == [GenerationResult, SafetyError, GenerationResult]


def test_a_request_can_switch_it_off_only_where_the_operator_allows_it(pipeline, monkeypatch):
    use(pipeline, monkeypatch, lambda images: (zeros(images), ~none_unsafe(images)))
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
