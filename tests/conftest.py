"""What every test starts from."""

import os

import pytest


@pytest.fixture(autouse=True)
def no_settings_of_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own FEWSTEP_* variables must not decide what a test sees."""
    for name in [name for name in os.environ if name.startswith("FEWSTEP_")]:
        monkeypatch.delenv(name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let modules with slow tests come first: where modules run side by side, none is left for the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
