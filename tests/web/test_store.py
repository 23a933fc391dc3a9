"""What visitors leave, in SQLite and in a real PostgreSQL where its programs are installed."""

import os
import pwd
import shutil
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import webp

from fewstep.coglet.server import free_port
from fewstep.errors import InternalError, InvalidRequest, NotFound, SettingsError, Taken
from fewstep.web import store as store_module
from fewstep.web.messages import Nickname, ReviewText, checked
from fewstep.web.store import Store

A, B = "a" * 32, "b" * 32
RECIPE = {"prompt": "a <b>red</b> house", "seed": 7, "width": 16, "height": 16}


def postgres_programs():
    for folder in (None, *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")))):
        found = [shutil.which(name, path=folder) for name in ("initdb", "pg_ctl")]
        if all(found):
            return found
    return None


@pytest.fixture(scope="session")
def postgres(tmp_path_factory):
    """A server of its own, in a folder of its own, which ends with the tests."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("PostgreSQL's initdb and pg_ctl are not installed")
    initdb, pg_ctl = programs
    folder = tmp_path_factory.mktemp("postgres")
    own = {"check": True, "stdout": subprocess.DEVNULL, "cwd": folder}
    if os.getuid() == 0:  # which PostgreSQL refuses to run as
        user = pwd.getpwnam("postgres" if "postgres" in {one.pw_name for one in pwd.getpwall()} else "nobody")
        own |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        for path in (folder, *list(folder.parents)[:3]):  # pytest makes them for us alone
            if path.name.startswith(("pytest-", "popen-", "postgres")):
                path.chmod(0o755)
        os.chown(folder, user.pw_uid, user.pw_gid)
    data, port = folder / "data", free_port()
    options = ["-U", "fewstep", "-A", "trust", "--no-sync", "-E", "UTF8", "--locale=C"]
    subprocess.run([initdb, "-D", data, *options], **own)
    options = ["-l", folder / "log", "-o", f"-p {port} -k {folder} -h 127.0.0.1 -F"]
    subprocess.run([pg_ctl, "-D", data, *options, "start"], **own)  # returns when it can be asked
    yield f"postgresql://fewstep@127.0.0.1:{port}/postgres"
    os.kill(int((data / "postmaster.pid").read_text().split()[0]), signal.SIGINT)


@pytest.fixture(params=["sqlite", "postgres"])
def store(request, tmp_path):
    url = request.getfixturevalue("postgres") if request.param == "postgres" else ""
    made = Store(tmp_path, url)
    yield made
    store_module.Base.metadata.drop_all(made._engine)
    made.close()


def keep(store, user=A, **recipe):
    return store.keep(user, webp(), {**RECIPE, **recipe})


def all_of(store, limit):
    """The whole gallery, page by page."""
    shown, before = [], None
    while True:
        page = store.gallery(A, before, limit)
        shown += page["pictures"]
        if (before := page["next"]) is None:
            return shown


def test_a_nickname_is_its_users_alone_however_it_is_written(store):
    store.name(A, "Ünïcorn")
    assert store.me(A)["nickname"] == "Ünïcorn"
    for same in ("ünïcorn", "ÜNÏCORN", "U\u0308ni\u0308corn"):
        with pytest.raises(Taken):
            store.name(B, same)
    assert store.me(B)["nickname"] == ""
    store.name(A, "other")
    store.name(B, "Ünïcorn")  # free again
    store.name(A, "")
    store.name(B, "")  # two without a name are not the same name
    assert store.me(A)["nickname"] == store.me(B)["nickname"] == ""


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "a/b", "<img src=x>", "'; DROP TABLE visitors; --", "名前"]
)
def test_a_nickname_may_be_anything_that_can_be_seen_since_it_is_never_a_path(store, name):
    store.name(A, name)
    assert store.me(A)["nickname"] == name


@pytest.mark.parametrize(
    "name", ["a\0b", "a\u202eb", "a\u200bb", "x" * 41, 5, None, "a\nb", "\ud800", "a\u3164"]
)
def test_a_nickname_that_cannot_be_seen_is_refused(name):
    assert checked(Nickname, {"nickname": "  Ünïcorn "}).nickname == "Ünïcorn"
    with pytest.raises(InvalidRequest, match="nickname"):
        checked(Nickname, {"nickname": name})


def test_a_nickname_that_is_too_long_as_it_is_compared_is_refused(store):
    with pytest.raises(InvalidRequest):
        store.name(A, "\ufdfa" * 9)


def test_a_kept_image_is_shown_to_all_and_taken_out_by_its_user_alone(store):
    store.name(A, "ann")
    kept = keep(store)
    assert store.file(kept["id"]).read_bytes() == webp()
    [mine], [theirs] = store.gallery(A)["pictures"], store.gallery(B)["pictures"]
    assert mine == {**kept, "mine": True} and theirs == {**kept, "mine": False}
    assert (mine["nickname"], mine["recipe"]) == ("ann", RECIPE)
    with pytest.raises(NotFound):
        store.discard(B, kept["id"])
    store.discard(A, kept["id"])
    assert store.gallery(A)["pictures"] == [] and not store.file(kept["id"]).exists()


def test_no_id_is_a_path(store):
    some = ["\0", "x", "../secret", "a" * 31, "a" * 33, "A" * 32, "a" * 31 + "/", "..%2f" * 6 + "aa"]
    for read, names in ((store.file, ["", *some]), (lambda before: store.gallery(A, before), some)):
        for name in names:
            with pytest.raises(NotFound):
                read(name)


def test_the_gallery_is_read_page_by_page_without_gap_or_repeat(store):
    ids = [keep(store, seed=i)["id"] for i in range(7)]
    assert [one["id"] for one in all_of(store, 3)] == ids[::-1]


def test_a_user_keeps_only_so_many_and_a_refused_image_leaves_no_file(store, monkeypatch):
    monkeypatch.setattr(store_module, "MAX_KEPT", 2)
    keep(store)
    keep(store)
    with pytest.raises(InvalidRequest, match="2 of your pictures are kept"):
        keep(store)
    assert len(list(store._files.iterdir())) == 2
    keep(store, B)


def test_a_review_is_one_a_user_and_can_be_written_anew(store):
    store.review(A, 5, "so quick")
    store.review(B, 2, "")
    store.review(A, 4, "quick")
    found = store.reviews(A)
    assert (found["count"], found["average"]) == (2, 3.0)
    shown = {(one["rating"], one["text"], one["mine"]) for one in found["reviews"]}
    assert shown == {(4, "quick", True), (2, "", False)}
    assert store.me(A)["review"] == {"rating": 4, "text": "quick"}


def test_a_review_has_a_rating_and_a_text_that_can_be_seen():
    text = "so quick 👩\u200d🚀\nand calm"
    assert checked(ReviewText, {"rating": 5, "text": text}).text == text
    for rating in (0, 6, True, "5", 4.5, None):
        with pytest.raises(InvalidRequest, match="rating must be a whole number from 1 to 5"):
            checked(ReviewText, {"rating": rating, "text": ""})
    for text in ("x" * 1001, "a\0b", 5):
        with pytest.raises(InvalidRequest, match="text"):
            checked(ReviewText, {"rating": 5, "text": text})


def test_forgetting_a_user_leaves_nothing_of_theirs_and_all_of_the_others(store):
    for user in (A, B):
        store.name(user, user[0])
        keep(store, user)
        store.review(user, 3, "")
    store.forget(A)
    assert store.me(A) == {"nickname": "", "pictures": 0, "review": None}
    assert store.me(B) == {"nickname": "b", "pictures": 1, "review": {"rating": 3, "text": ""}}
    assert len(list(store._files.iterdir())) == 1
    assert store.summary()["visitors"] == store.summary()["pictures"] == store.summary()["reviews"] == 1
    store.forget(A)  # twice is no error


def test_twenty_who_write_at_once_lose_nothing(store):
    def write(i):
        user = f"{i % 20:032x}"
        store.name(user, f"v{i % 20}")
        kept = keep(store, user, seed=i)
        store.review(user, 1 + i % 5, str(i))
        store.gallery(user)
        return kept["id"]

    with ThreadPoolExecutor(20) as pool:
        ids = list(pool.map(write, range(100)))
    found = all_of(store, 100)
    assert sorted(one["id"] for one in found) == sorted(ids)
    assert {one["recipe"]["seed"] for one in found} == set(range(100))
    summary = store.summary()
    assert (summary["visitors"], summary["pictures"], summary["reviews"]) == (20, 100, 20)


def test_one_user_who_does_everything_at_once_ends_as_one(store):
    """The first row of a visitor, written by many at once; and nothing is left of what was kept meanwhile."""

    def write(i):
        store.review(A, 1 + i % 5, "")
        store.name(A, "ann")
        keep(store, A, seed=i)
        if i % 4 == 3:
            store.forget(A)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(40)))
    kept = [one["id"] for one in store.gallery(A, limit=100)["pictures"]]
    assert sorted(kept) == sorted(file.stem for file in store._files.iterdir())
    assert store.reviews(A)["count"] <= 1 and store.summary()["visitors"] <= 1


def test_an_error_of_the_database_tells_nobody_what_a_user_wrote(store, caplog):
    store.name(A, "ann")
    now = store_module._now()
    with pytest.raises(InternalError) as caught, store._transaction() as session:
        session.add(store_module.Review(user=A, rating=9, text="secret words", created=now))
    assert "IntegrityError" in caplog.text
    assert "secret words" not in caplog.text + str(caught.value) and caught.value.__cause__ is None


def test_a_database_that_is_not_there_is_said_without_its_password(tmp_path):
    url = f"postgresql://me:secret@127.0.0.1:{free_port()}/x"
    for wrong in (url, "nonsense", "mysql://x", "sqlite:////proc/none/x"):
        with pytest.raises(SettingsError) as caught:
            Store(tmp_path, wrong)
        assert "DATABASE_URL" in caught.value.sentence and "secret" not in str(caught.value)


def test_what_was_left_is_there_after_a_restart(tmp_path):
    first = Store(tmp_path)
    first.name(A, "ann")
    kept = keep(first)
    first.close()
    again = Store(tmp_path)
    assert again.me(A)["nickname"] == "ann"
    assert [one["id"] for one in again.gallery(A)["pictures"]] == [kept["id"]]
    again.close()
