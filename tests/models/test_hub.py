"""Downloads by scripts/download-weights' code, from a hub on this machine, through the hub's own client."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hub import REVISION, running_hub

from fewstep.models.sources import HubRepo

ROOT = Path(__file__).resolve().parents[2]
BIG, SMALL, MEDIUM = "unet/weights.safetensors", "unet/config.json", "vae/weights.safetensors"
NAME = "owner/tiny"
PIECE = 10 * 2**20  # what the client holds in memory before it writes, and loses when the connection breaks
SIZE = 24 * 2**20  # of BIG: half of it, where connections are cut, is more than a piece
# The command as it is, with another table of models.
COMMAND = """
import json, sys
from fewstep.models.sources import SOURCES, HubFile, HubRepo
table = json.loads(sys.argv[1])
SOURCES["sdxl"] = tuple(
    HubRepo(**{**row, "files": tuple(HubFile(**file) for file in row["files"])}) for row in table
)
from fewstep.cli.download_weights import main
sys.exit(main([]))
"""


@pytest.fixture
def hub():
    # Noise: a file that was taken up at the wrong place is a wrong file.
    content = random.Random(0).randbytes(SIZE)
    files = {BIG: content, SMALL: b'{"tiny": 1}', MEDIUM: content[:5000]}
    with running_hub({NAME: files}) as hub:
        yield hub


def start(hub, folder: Path, repos: list[HubRepo] | None = None, **variables: str) -> subprocess.Popen[str]:
    table = json.dumps([asdict(repo) for repo in repos or [hub.repo(NAME)]])
    environ = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environ |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(folder), "HOME": str(folder), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, table],
        env=environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def download(hub, folder: Path, *arguments, **variables: str) -> tuple[int, str]:
    process = start(hub, folder, *arguments, **variables)
    out, err = process.communicate(timeout=60)
    assert out == "" and "Traceback" not in err
    return process.returncode, err


def place(folder: Path, path: str) -> Path:
    return folder / "fewstep" / NAME / REVISION / path


def assert_complete(hub, folder: Path) -> None:
    for path, content in hub.files[NAME].items():
        assert place(folder, path).read_bytes() == content
    assert not list(folder.rglob("*.part"))


def refusal(hub, folder: Path, *arguments, path: str = BIG, **variables: str) -> str:
    """The sentence of a run that fails, and leaves nothing that looks finished at `path`."""
    status, err = download(hub, folder, *arguments, **variables)
    sentence = err.splitlines()[-1]
    assert status == 1 and sentence.startswith("[download] ") and str(folder) not in sentence
    assert not place(folder, path).exists()
    return sentence


@pytest.mark.parametrize("pinned", [True, False])
def test_a_model_arrives_whole_and_a_second_run_asks_for_nothing(hub, tmp_path, pinned):
    repos = [hub.repo(NAME, pinned)]

    status, err = download(hub, tmp_path, repos)

    assert status == 0 and "owner/tiny: MIT, see https://huggingface.co/owner/tiny" in err
    against = "3 against hashes that fewstep pins, 0" if pinned else "0 against hashes that fewstep pins, 3"
    assert against in err
    assert_complete(hub, tmp_path)
    hub.seen.clear()
    assert download(hub, tmp_path, repos)[0] == 0
    assert hub.seen == []


def test_two_downloads_at_once_fetch_everything_once(hub, tmp_path):
    both = [start(hub, tmp_path), start(hub, tmp_path)]

    ends = [process.communicate(timeout=60)[1] for process in both]

    assert [process.returncode for process in both] == [0, 0], ends
    assert len(hub.gets(BIG)) == 1
    assert_complete(hub, tmp_path)


def test_only_what_is_listed_is_fetched(hub, tmp_path):
    hub.files[NAME]["unet/weights.bin"] = b"a pickle" * 1000
    repo = hub.repo(NAME)
    listed = tuple(file for file in repo.files if not file.path.endswith(".bin"))

    assert download(hub, tmp_path, [replace(repo, files=listed)])[0] == 0

    assert not any("bin" in one.path for one in hub.seen)


def test_a_cut_connection_is_taken_up_where_it_broke(hub, tmp_path):
    hub.faults[BIG] = "cut once"

    assert download(hub, tmp_path)[0] == 0

    assert [one.start for one in hub.gets(BIG)] == [0, PIECE]
    assert_complete(hub, tmp_path)


def test_a_connection_that_stays_cut_ends_in_a_sentence_and_the_next_run_goes_on(hub, tmp_path):
    hub.faults[BIG] = "cut"

    assert "the connection to the hub broke at owner/tiny" in refusal(hub, tmp_path)

    hub.faults.clear()
    hub.seen.clear()
    assert download(hub, tmp_path)[0] == 0
    assert [one.start for one in hub.gets(BIG)] == [PIECE]
    assert_complete(hub, tmp_path)


def test_a_killed_download_goes_on_in_the_next_run(hub, tmp_path):
    hub.faults[BIG] = "stall"
    process = start(hub, tmp_path)
    part = place(tmp_path, BIG + ".part")
    while not part.exists() or part.stat().st_size < PIECE:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not place(tmp_path, BIG).exists()

    hub.faults.clear()
    hub.seen.clear()
    assert download(hub, tmp_path)[0] == 0
    assert [one.start for one in hub.gets(BIG)] == [PIECE]
    assert_complete(hub, tmp_path)


def test_a_part_from_an_earlier_run_is_gone_on_with(hub, tmp_path):
    part = place(tmp_path, BIG + ".part")
    part.parent.mkdir(parents=True)
    part.write_bytes(hub.files[NAME][BIG][:70_000])

    assert download(hub, tmp_path)[0] == 0

    assert [one.start for one in hub.gets(BIG)] == [70_000]
    assert_complete(hub, tmp_path)


@pytest.mark.parametrize("length", [70_000, SIZE, SIZE + 1])
def test_a_bad_part_from_an_earlier_run_is_thrown_away(hub, tmp_path, length):
    part = place(tmp_path, BIG + ".part")
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(length))

    assert download(hub, tmp_path)[0] == 0

    assert_complete(hub, tmp_path)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("truncate", f"came with {SIZE // 2} bytes where {SIZE} are expected"),
        ("html", f"came with 26 bytes where {SIZE} are expected"),
        ("flip", "arrived with other bytes than its sha256 promises"),
        (401, "accept its licence at https://huggingface.co/owner/tiny and set HF_TOKEN"),
        (403, "set HF_TOKEN"),
        (404, "does not hold unet/weights.safetensors (HTTP 404)"),
        (429, "(HTTP 429)"),
        (500, "HTTP 500"),
    ],
)
def test_every_failure_is_one_sentence_and_the_next_run_completes(hub, tmp_path, fault, said):
    hub.faults[BIG] = fault

    assert said in refusal(hub, tmp_path)
    assert not list(tmp_path.rglob("*.part")) or isinstance(fault, int)

    hub.faults.clear()
    assert download(hub, tmp_path)[0] == 0
    assert_complete(hub, tmp_path)


@pytest.mark.parametrize("fault", ["html", "truncate"])
def test_a_wrong_answer_in_mid_file_leaves_what_came_before(hub, tmp_path, fault):
    part = place(tmp_path, BIG + ".part")
    part.parent.mkdir(parents=True)
    part.write_bytes(hub.files[NAME][BIG][:70_000])
    hub.faults[BIG] = fault

    refusal(hub, tmp_path)
    kept = part.read_bytes() if part.exists() else b""
    assert hub.files[NAME][BIG].startswith(kept)
    assert len(kept) == 70_000 or fault == "html"  # which answers to no range: nothing tells it from the file

    hub.faults.clear()
    assert download(hub, tmp_path)[0] == 0
    assert_complete(hub, tmp_path)


def test_a_web_page_in_place_of_the_list_of_files_is_told(hub, tmp_path):
    hub.faults["paths-info"] = "html"

    sentence = refusal(hub, tmp_path, [hub.repo(NAME, pinned=False)], path="paths-info")

    assert "what answers for owner/tiny, the list of its files, is not the hub" in sentence


def test_a_hub_that_asks_to_wait_is_waited_for(hub, tmp_path):
    hub.faults[BIG] = [429]

    status, err = download(hub, tmp_path)

    assert status == 0 and "429" in err
    assert_complete(hub, tmp_path)


def test_a_flipped_byte_in_a_small_file_is_found_by_its_blob_id(hub, tmp_path):
    hub.faults[SMALL] = "flip"

    sentence = refusal(hub, tmp_path, [hub.repo(NAME, pinned=False)], path=SMALL)

    assert "arrived with other bytes than its git promises" in sentence


def test_a_hub_that_states_another_hash_than_the_pin_is_not_believed(hub, tmp_path):
    repo = hub.repo(NAME)
    files = tuple(
        replace(file, size=None, sha256=hashlib.sha256(b"x").hexdigest()) for file in repo.files[:1]
    )

    assert "is not the file that fewstep knows" in refusal(hub, tmp_path, [replace(repo, files=files)])
    assert not hub.gets(BIG)


def test_a_file_that_the_hub_does_not_list_is_named(hub, tmp_path):
    repo = hub.repo(NAME, pinned=False)
    del hub.files[NAME][MEDIUM]

    assert f"does not hold {MEDIUM}" in refusal(hub, tmp_path, [repo])


def test_a_file_that_was_damaged_on_the_disk_is_fetched_anew(hub, tmp_path):
    download(hub, tmp_path)
    damaged = bytearray(hub.files[NAME][BIG])
    damaged[1000] ^= 1
    place(tmp_path, BIG).write_bytes(damaged)
    hub.seen.clear()

    status, err = download(hub, tmp_path)

    assert status == 0 and "unet/weights.safetensors is damaged on this disk" in err
    assert {one.path.partition(REVISION)[2] for one in hub.seen} == {f"/{BIG}"}
    assert_complete(hub, tmp_path)


def test_too_small_a_disk_is_told_before_anything_is_fetched(hub, tmp_path):
    repo = hub.repo(NAME)
    files = (replace(repo.files[0], size=10**15), *repo.files[1:])

    sentence = refusal(hub, tmp_path, [replace(repo, files=files)])

    assert "1000000.0 GB are to be downloaded and the disk has" in sentence
    assert hub.seen == []


def test_a_disk_that_fills_up_on_the_way_is_told_and_the_next_run_goes_on(hub, tmp_path):
    limited = COMMAND.replace("import json", "import resource, json", 1).replace(
        "table =", "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); table =", 1
    )
    original, globals()["COMMAND"] = COMMAND, limited
    try:
        assert "the disk is full at owner/tiny" in refusal(hub, tmp_path)
    finally:
        globals()["COMMAND"] = original

    assert download(hub, tmp_path)[0] == 0
    assert_complete(hub, tmp_path)


def test_the_token_goes_to_the_hub_and_not_to_its_storage(hub, tmp_path):
    hub.token = "hf_secret"

    sentence = refusal(hub, tmp_path)
    assert "HF_TOKEN" in sentence
    status, err = download(hub, tmp_path, HF_TOKEN="hf_secret")

    assert status == 0 and "hf_secret" not in err
    assert_complete(hub, tmp_path)
    assert any(one.at_storage for one in hub.seen)
    assert all(one.authorization is None for one in hub.seen if one.at_storage)


def test_what_the_clients_own_cache_holds_is_taken_from_there(hub, tmp_path):
    cached = tmp_path / "hub" / "models--owner--tiny" / "snapshots" / REVISION / BIG
    cached.parent.mkdir(parents=True)
    cached.write_bytes(hub.files[NAME][BIG])

    assert download(hub, tmp_path)[0] == 0

    assert not hub.gets(BIG)
    assert_complete(hub, tmp_path)


def test_a_damaged_file_in_the_clients_cache_is_not_taken(hub, tmp_path):
    cached = tmp_path / "hub" / "models--owner--tiny" / "snapshots" / REVISION / BIG
    cached.parent.mkdir(parents=True)
    cached.write_bytes(bytes(SIZE))

    assert download(hub, tmp_path)[0] == 0

    assert_complete(hub, tmp_path)


def test_the_containers_offline_switch_does_not_forbid_a_download(hub, tmp_path):
    assert download(hub, tmp_path, HF_HUB_OFFLINE="1")[0] == 0
    assert_complete(hub, tmp_path)
