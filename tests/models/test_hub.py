"""Downloads by scripts/download-weights' code, from a hub on this machine, through the hub's own client."""

import hashlib
import random
import signal
import time
from dataclasses import replace

import pytest
from hub import COMMAND, REVISION, running_hub

BIG, SMALL, MEDIUM = "unet/weights.safetensors", "unet/config.json", "vae/weights.safetensors"
NAME = "owner/tiny"
PIECE = 10 * 2**20  # what the client holds in memory before it writes, and loses when the connection breaks
SIZE = 24 * 2**20  # of BIG: half of it, where connections are cut, is more than a piece


@pytest.fixture
def hub():
    # Noise: a file that was taken up at the wrong place is a wrong file.
    content = random.Random(0).randbytes(SIZE)
    files = {BIG: content, SMALL: b'{"tiny": 1}', MEDIUM: content[:5000]}
    with running_hub({NAME: files}) as hub:
        yield hub


def start(hub, folder):
    return hub.start([hub.repo(NAME)], "sdxl", "download_weights", HF_HOME=str(folder), HOME=str(folder))


def download(hub, folder, repos=None, **options):
    variables = {"HF_HOME": str(folder), "HOME": str(folder)} | options
    return hub.run(repos or [hub.repo(NAME)], "sdxl", "download_weights", **variables)


def place(folder, path):
    return folder / "fewstep" / NAME / REVISION / path


def complete(hub, folder, repos=None, starts=None, **options):
    """The log of a run that comes through with everything whole; `starts` is where it took BIG up."""
    status, err = download(hub, folder, repos, **options)
    assert status == 0, err
    assert starts is None or [one.start for one in hub.gets(BIG)] == starts
    assert_complete(hub, folder)
    return err


def assert_complete(hub, folder):
    for path, content in hub.files[NAME].items():
        assert place(folder, path).read_bytes() == content
    assert not list(folder.rglob("*.part"))


def mend(hub):
    hub.faults.clear()
    hub.seen.clear()


def refusal(hub, folder, repos=None, path=BIG, **options):
    """The sentence of a run that fails, and leaves nothing that looks finished at `path`."""
    status, err = download(hub, folder, repos, **options)
    sentence = err.splitlines()[-1]
    assert status == 1 and sentence.startswith("[download] ") and str(folder) not in sentence
    assert not place(folder, path).exists()
    return sentence


@pytest.mark.parametrize("pinned", [True, False])
def test_a_model_arrives_whole_and_a_second_run_asks_for_nothing(hub, tmp_path, pinned):
    repos = [hub.repo(NAME, pinned)]

    err = complete(hub, tmp_path, repos, apart=True)

    assert "owner/tiny: MIT, see https://huggingface.co/owner/tiny" in err
    assert f"{3 if pinned else 0} against hashes that fewstep pins, {0 if pinned else 3}" in err
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
    listed = [hub.repo(NAME)]
    hub.files[NAME]["unet/weights.bin"] = b"a pickle" * 1000

    assert download(hub, tmp_path, listed)[0] == 0

    assert not any("bin" in one.path for one in hub.seen)


def test_a_cut_connection_is_taken_up_where_it_broke_and_by_the_next_run_if_it_stays_cut(hub, tmp_path):
    hub.faults[BIG] = "cut once"
    complete(hub, tmp_path / "once", starts=[0, PIECE])

    hub.faults[BIG] = "cut"
    assert "the connection to the hub broke at owner/tiny" in refusal(hub, tmp_path / "always")
    mend(hub)
    complete(hub, tmp_path / "always", starts=[PIECE])


def test_a_killed_download_goes_on_in_the_next_run(hub, tmp_path):
    hub.faults[BIG] = "stall"
    process = start(hub, tmp_path)
    part = place(tmp_path, BIG + ".part")
    while not part.exists() or part.stat().st_size < PIECE:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not place(tmp_path, BIG).exists()

    mend(hub)
    complete(hub, tmp_path, starts=[PIECE])


def leave_part(folder, content):
    part = place(folder, BIG + ".part")
    part.parent.mkdir(parents=True)
    part.write_bytes(content)
    return part


def test_a_part_from_an_earlier_run_is_gone_on_with(hub, tmp_path):
    leave_part(tmp_path, hub.files[NAME][BIG][:70_000])

    complete(hub, tmp_path, starts=[70_000])


@pytest.mark.parametrize("length", [70_000, SIZE, SIZE + 1])
def test_a_bad_part_from_an_earlier_run_is_thrown_away(hub, tmp_path, length):
    leave_part(tmp_path, bytes(length))

    complete(hub, tmp_path)


@pytest.mark.parametrize(
    ("path", "fault", "said"),
    [
        (BIG, "truncate", f"came with {SIZE // 2} bytes where {SIZE} are expected"),
        (BIG, "html", f"came with 26 bytes where {SIZE} are expected"),
        (BIG, "flip", "arrived with other bytes than its sha256 promises"),
        (BIG, 401, "accept its licence at https://huggingface.co/owner/tiny and set HF_TOKEN"),
        (BIG, 403, "set HF_TOKEN"),
        (BIG, 404, "does not hold unet/weights.safetensors (HTTP 404)"),
        (BIG, 429, "(HTTP 429)"),
        (BIG, 500, "HTTP 500"),
        (SMALL, "flip", "arrived with other bytes than its git promises"),  # which it has as a blob id
        ("paths-info", "html", "what answers for owner/tiny, the list of its files, is not the hub"),
    ],
)
def test_every_failure_is_one_sentence_and_the_next_run_completes(hub, tmp_path, path, fault, said):
    repos, hub.faults[path] = [hub.repo(NAME, pinned=path == BIG)], fault

    assert said in refusal(hub, tmp_path, repos, path)
    assert not list(tmp_path.rglob("*.part")) or isinstance(fault, int)

    mend(hub)
    complete(hub, tmp_path, repos)


@pytest.mark.parametrize("fault", ["html", "truncate"])
def test_a_wrong_answer_in_mid_file_leaves_what_came_before(hub, tmp_path, fault):
    part = leave_part(tmp_path, hub.files[NAME][BIG][:70_000])
    hub.faults[BIG] = fault

    refusal(hub, tmp_path)
    kept = part.read_bytes() if part.exists() else b""
    assert hub.files[NAME][BIG].startswith(kept)
    assert len(kept) == 70_000 or fault == "html"  # which answers to no range: nothing tells it from the file

    mend(hub)
    complete(hub, tmp_path)


def test_a_hub_that_asks_to_wait_is_waited_for(hub, tmp_path):
    hub.faults[BIG] = [429]

    assert "429" in complete(hub, tmp_path, apart=True)  # as the client logs it


def test_a_hub_that_states_another_hash_than_the_pin_is_not_believed(hub, tmp_path):
    repo, said = hub.repo(NAME), "is not the file that fewstep knows"
    files = (replace(repo.files[0], size=None, sha256=hashlib.sha256(b"x").hexdigest()),)
    pinned = [replace(repo, files=files)]
    complete(hub, tmp_path / "before", [hub.repo(NAME, pinned=False)])
    mend(hub)

    assert said in refusal(hub, tmp_path, pinned)
    assert said in refusal(hub, tmp_path / "before", pinned, path="another")  # what was stated is asked again
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

    assert "unet/weights.safetensors is damaged on this disk" in complete(hub, tmp_path)

    assert {one.path.partition(REVISION)[2] for one in hub.seen} == {f"/{BIG}"}


def test_too_small_a_disk_is_told_before_anything_is_fetched(hub, tmp_path):
    repo = hub.repo(NAME)
    files = (replace(repo.files[0], size=10**15), *repo.files[1:])

    sentence = refusal(hub, tmp_path, [replace(repo, files=files)])

    assert "1000000.0 GB are to be downloaded and the disk has" in sentence
    assert hub.seen == []


def test_a_disk_that_fills_up_on_the_way_is_told_and_the_next_run_goes_on(hub, tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    assert "the disk is full at owner/tiny" in refusal(hub, tmp_path, apart=True, code=f"{limit}\n{COMMAND}")

    complete(hub, tmp_path)


def test_the_token_goes_to_the_hub_and_not_to_its_storage(hub, tmp_path):
    hub.token = "hf_secret"

    assert "HF_TOKEN" in refusal(hub, tmp_path)
    assert "hf_secret" not in complete(hub, tmp_path, apart=True, HF_TOKEN="hf_secret")

    assert any(one.at_storage for one in hub.seen)
    assert all(one.authorization is None for one in hub.seen if one.at_storage)


@pytest.mark.parametrize("damaged", [False, True])
def test_what_the_clients_own_cache_holds_is_taken_unless_it_is_damaged(hub, tmp_path, damaged):
    cached = tmp_path / "hub" / "models--owner--tiny" / "snapshots" / REVISION / BIG
    cached.parent.mkdir(parents=True)
    cached.write_bytes(bytes(SIZE) if damaged else hub.files[NAME][BIG])

    complete(hub, tmp_path)

    assert bool(hub.gets(BIG)) == damaged


def test_the_containers_offline_switch_does_not_forbid_a_download(hub, tmp_path):
    complete(hub, tmp_path, apart=True, HF_HUB_OFFLINE="1")
