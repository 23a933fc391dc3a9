"""The last images: of each visitor so many, of all so many bytes."""

from fewstep.web.recent import RecentImages


def test_the_oldest_go_first_and_nobody_elses():
    recent = RecentImages(max_images=2, max_bytes=100)
    first, *others = [recent.add("a", b"x" * 10, {"i": i}) for i in range(3)]
    theirs = recent.add("b", b"x" * 10, {})
    assert recent.of("a", first) is None and recent.any(first) is None
    assert all(recent.of("a", one) for one in others) and recent.of("b", theirs)
    assert recent.of("b", others[0]) is None and recent.any(others[0])


def test_bytes_are_bounded_over_all_visitors():
    recent = RecentImages(max_images=9, max_bytes=100)
    ids = [recent.add(str(i % 3), b"x" * 30, {}) for i in range(10)]
    assert [bool(recent.any(one)) for one in ids] == [False] * 7 + [True] * 3
    recent.add("c", b"x" * 1000, {})
    assert recent._bytes == 0 and not recent._of and not recent._images


def test_what_is_forgotten_is_gone():
    recent = RecentImages()
    mine, theirs = recent.add("a", b"x", {}), recent.add("b", b"x", {})
    recent.forget("a")
    recent.forget("a")
    assert recent.any(mine) is None and recent.any(theirs) and recent._bytes == 1
