"""fewstep/cli/environment.py: what is installed when, without pip or a network."""

import sys
from importlib.metadata import version

import pytest

from fewstep.cli import environment


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of one pin that no machine has, with pip and venv replaced by a record of their calls."""
    (tmp_path / "requirements.txt").write_text("# why\ntorch==0.0.1\nabsent==1.0\n")
    (tmp_path / "pyproject.toml").write_text(
        '[project.optional-dependencies]\nserve = ["served==1.0"]\ndev = ["made==1.0"]\n'
    )
    places = {"ROOT": "", "VENV": ".venv", "PYTHON": ".venv/bin/python", "STAMP": ".venv/fewstep.json"}
    for name, place in places.items():
        monkeypatch.setattr(environment, name, tmp_path / place)
    monkeypatch.setattr(environment.venv, "create", make_bare_venv)
    monkeypatch.setattr(environment.os, "execv", lambda python, arguments: None)
    return tmp_path


def make_bare_venv(folder, **_):
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)


@pytest.fixture
def installed(monkeypatch):
    calls: list[tuple[str, ...]] = []
    monkeypatch.setattr(environment, "_pip", lambda *arguments: calls.append(arguments))
    return calls


def test_torch_comes_first_and_alone_from_its_own_index(project, installed, monkeypatch):
    monkeypatch.setenv("FEWSTEP_TORCH_INDEX", "file:///wheels")
    environment.main(["serve", "-c", "pass"])
    assert installed == [
        ("torch==0.0.1", "--index-url", "file:///wheels"),
        ("-r", str(project / "requirements.txt"), "served==1.0"),
    ]


def test_a_second_run_installs_nothing_and_another_extra_only_what_is_missing(project, installed):
    environment.main(["serve", "-c", "pass"])
    environment.main(["serve", "-c", "pass"])
    assert len(installed) == 2
    environment.main(["dev", "-c", "pass"])
    assert installed[-1][2:] == ("made==1.0",)
    count = len(installed)
    environment.main(["dev,serve", "-c", "pass"])
    assert len(installed) == count


def test_a_changed_pin_is_installed(project, installed):
    environment.main(["serve", "-c", "pass"])
    (project / "requirements.txt").write_text("torch==0.0.2\n")
    environment.main(["serve", "-c", "pass"])
    assert installed[2][0] == "torch==0.0.2"


def test_an_installation_that_broke_off_is_taken_up_again(project, installed, monkeypatch):
    environment.main(["serve", "-c", "pass"])
    with monkeypatch.context() as broken:
        broken.setattr(environment, "_pip", fail)
        with pytest.raises(SystemExit, match="pip"):
            environment.main(["dev", "-c", "pass"])
    pins = environment.read_pins(project, ["serve"])
    assert not environment.is_covered(pins)


def fail(*_):
    raise SystemExit("pip broke off")


def test_an_unknown_extra_is_named(project):
    with pytest.raises(SystemExit, match="no extra 'gpu'"):
        environment.main(["gpu", "-c", "pass"])


def test_where_everything_is_installed_no_environment_is_made(project, monkeypatch):
    (project / "requirements.txt").write_text(f"pytest=={pytest.__version__}\n")
    became: list[str] = []
    monkeypatch.setattr(environment.os, "execv", lambda python, arguments: became.extend(arguments))
    environment.main(["", "-c", "pass"])
    assert became == [sys.executable, "-c", "pass"]
    assert not (project / ".venv").exists()


def test_a_builds_suffix_does_not_make_a_version_another():
    assert environment.is_installed({"runtime": [f"torch=={version('torch').partition('+')[0]}"]})
    assert not environment.is_installed({"runtime": ["torch==0.0.1"]})


PIP_SAYS = """Collecting torch==0.0.1 (from -r requirements.txt)
  Downloading torch-0.0.1-py3-none-any.whl (899 MB)
Collecting numpy>=1
Requirement already satisfied: absent in lib
Installing collected packages: numpy, torch"""


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("status", [0, 1])
def test_pip_shows_a_line_a_package_and_all_if_it_fails(project, capsys, monkeypatch, terminal, status):
    environment.PYTHON.parent.mkdir(parents=True)
    environment.PYTHON.write_text(f"#!/bin/sh\ncat <<'END'\n{PIP_SAYS}\nEND\nexit {status}\n")
    environment.PYTHON.chmod(0o755)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    if status:
        with pytest.raises(SystemExit, match="pip could not install"):
            environment._pip("torch")
    else:
        environment._pip("torch")
    clear, end = ("\r\x1b[K", "") if terminal else ("", "\n")
    shown = "".join(f"{clear}  {text}{end}" for text in ("torch==0.0.1", "numpy>=1", "unpacking 2 packages"))
    assert capsys.readouterr().err == shown + clear + (f"{PIP_SAYS}\n" if status else "")
