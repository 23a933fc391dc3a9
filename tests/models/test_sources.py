import re

import pytest

from fewstep.models.sources import SOURCES
from fewstep.models.specs import MODELS

REPOS = [repo for repos in SOURCES.values() for repo in repos]


def test_every_model_but_the_miniature_is_fetched_from_the_hub():
    assert set(SOURCES) == set(MODELS) - {"miniature"}
    assert MODELS["miniature"].sources == ()


@pytest.mark.parametrize("repo", REPOS, ids=lambda repo: repo.name)
def test_a_repo_is_pinned_to_a_commit_and_names_its_licence(repo):
    assert re.fullmatch(r"[0-9a-f]{40}", repo.revision)
    assert repo.licence and repo.link == f"https://huggingface.co/{repo.name}"


@pytest.mark.parametrize("name", SOURCES)
def test_no_pickle_is_fetched_and_no_place_is_taken_twice(name):
    files = [file for repo in SOURCES[name] for file in repo.files]
    places = [file.place for file in files]

    assert {file.path.rsplit(".", 1)[1] for file in files} <= {"safetensors", "json", "txt"}
    assert len(places) == len(set(places))
    assert not any("fp16" in place for place in places)


@pytest.mark.parametrize("name", SOURCES)
def test_a_model_has_every_part_that_its_family_needs(name):
    places = {file.place for repo in SOURCES[name] for file in repo.files}
    folders = {"unet", "vae", "text_encoder", "tokenizer", "scheduler", "feature_extractor"}
    folders |= {"safety_checker", "safety_classifier", "vae_tiny"}
    folders |= {"text_encoder_2", "tokenizer_2"} if MODELS[name].family == "sdxl" else set()

    assert {place.split("/")[0] for place in places if "/" in place} == folders
    for folder in folders - {"tokenizer", "tokenizer_2", "scheduler", "feature_extractor"}:
        assert f"{folder}/config.json" in places
        assert sum(place.startswith(f"{folder}/") and place.endswith(".safetensors") for place in places) == 1
    assert ("lcm_lora.safetensors" in places) == MODELS[name].lcm_lora


@pytest.mark.parametrize("file", [file for repo in REPOS for file in repo.files], ids=lambda file: file.path)
def test_a_pin_is_a_sha256_and_a_size_of_that_kind_of_file(file):
    if file.sha256 is not None:
        assert re.fullmatch(r"[0-9a-f]{64}", file.sha256)
    if file.size is not None:
        assert (file.size > 5_000_000) == file.path.endswith(".safetensors")
