"""What every test starts from."""

import os
import re

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs, of child processes too, unless tests of one are asked for: results are those of a CPU."""
    if not re.search(r"(?<!not )\bgpu\b", config.getoption("markexpr")):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything asks CUDA, which reads it once


@pytest.fixture(autouse=True)
def no_settings_of_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own FEWSTEP_* variables must not decide what a test sees."""
    for name in [name for name in os.environ if name.startswith("FEWSTEP_")]:
        monkeypatch.delenv(name)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test of a GPU where there is none, or where it is hidden."""
    if item.get_closest_marker("gpu"):
        import torch  # which most modules of tests do without

        if not torch.cuda.is_available():
            pytest.skip("torch sees no GPU here; where there is one, run scripts/test -m gpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let modules with slow tests come first: where modules run side by side, none is left for the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
