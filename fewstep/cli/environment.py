"""Run Python with what the project pins: python -m fewstep.cli.environment EXTRAS ARGUMENT...

EXTRAS are names from pyproject.toml, joined by commas. Where the running Python has everything that is
pinned, as in a Cog container, it is used as it is. Otherwise `.venv` is made or completed first, under a
lock, and its stamp is written last: a later run finds the stamp and starts at once. Nothing is set up for
--help. Only the standard library is imported.
"""

import fcntl
import hashlib
import json
import os
import platform
import subprocess
import sys
import tomllib
import venv
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "fewstep.json"
RUNTIME = "runtime"
TORCH_INDEX = "FEWSTEP_TORCH_INDEX"

Pins = dict[str, list[str]]


def main(arguments: list[str]) -> None:
    """Make sure of the environment, then become its Python with the rest of the arguments."""
    extras, *command = arguments
    pins = read_pins(ROOT, [name for name in extras.split(",") if name])
    python = sys.executable
    if not is_installed(pins) and {"-h", "--help"}.isdisjoint(command):
        python = str(PYTHON)
        if not is_covered(pins):
            with _locked(ROOT / ".venv.lock"):
                if not is_covered(pins):  # another script may have been here first
                    _install(pins)
    os.execv(python, [python, *command])


def read_pins(root: Path, extras: list[str]) -> Pins:
    """Return what requirements.txt and each of the extras pin, by name; SystemExit for an unknown extra."""
    lines = (root / "requirements.txt").read_text(encoding="utf-8").splitlines()
    pins: Pins = {RUNTIME: [line.strip() for line in lines if line.strip() and not line.startswith("#")]}
    known = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for name in extras:
        if name not in known["optional-dependencies"]:
            raise SystemExit(f"pyproject.toml has no extra '{name}'")
        pins[name] = known["optional-dependencies"][name]
    return pins


def is_installed(pins: Pins) -> bool:
    """Whether the running Python has every pin; a build's suffix such as +cpu does not matter."""
    for pin in (pin for group in pins.values() for pin in group):
        name, _, wanted = pin.partition("==")
        try:
            if version(name).partition("+")[0] != wanted:
                return False
        except PackageNotFoundError:
            return False
    return True


def is_covered(pins: Pins) -> bool:
    """Whether `.venv` was completed with these very pins."""
    stamped = _read_stamp()
    return PYTHON.exists() and all(stamped.get(name) == _hash(group) for name, group in pins.items())


def _read_stamp() -> dict[str, str]:
    with suppress(OSError, ValueError):
        return dict(json.loads(STAMP.read_text(encoding="utf-8")))
    return {}


def _hash(group: list[str]) -> str:
    return hashlib.sha256("\n".join(group).encode()).hexdigest()


def _install(pins: Pins) -> None:
    kept = {name: value for name, value in _read_stamp().items() if name not in pins}
    torch = next(pin for pin in pins[RUNTIME] if pin.startswith("torch=="))
    index = os.environ.get(TORCH_INDEX)
    if not PYTHON.exists():
        _say(f"setting up .venv with Python {platform.python_version()}")
        venv.create(VENV, clear=VENV.exists(), symlinks=True, with_pip=True)
    STAMP.unlink(missing_ok=True)
    if not _has(torch):
        _say(f"installing {torch}{_torch_source(index)}")
        _pip(torch, *(["--index-url", index] if index else []))
    names = ", ".join(["requirements.txt", *(f"the extra {name}" for name in pins if name != RUNTIME)])
    _say(f"installing what is pinned in {names} (150 to 230 MB in all)")
    extras = [pin for name in pins if name != RUNTIME for pin in pins[name]]
    _pip("-r", str(ROOT / "requirements.txt"), *extras)
    unfinished = STAMP.with_suffix(".part")
    unfinished.write_text(json.dumps(kept | {name: _hash(group) for name, group in pins.items()}))
    unfinished.replace(STAMP)
    _say("the environment is ready; the next run starts at once")


def _torch_source(index: str | None) -> str:
    if index:
        return f" from {TORCH_INDEX} (about 200 MB for a CPU build, 3 GB for a CUDA build)"
    if platform.system() == "Linux":
        hint = f"without an NVIDIA GPU, set {TORCH_INDEX} to an index of CPU builds: about 200 MB"
        return f" (on x86-64 the CUDA build, about 3 GB; {hint})"
    return " (about 100 MB)"


def _has(pin: str) -> bool:
    code = "import sys, importlib.metadata as m; print(m.version(sys.argv[1]))"
    name, _, wanted = pin.partition("==")
    done = subprocess.run([PYTHON, "-c", code, name], capture_output=True, text=True, check=False)
    return done.stdout.strip().partition("+")[0] == wanted


def _pip(*arguments: str) -> None:
    """Install with a line a package on stderr, on a terminal each over the last; all of pip's if it fails."""
    command = [str(PYTHON), "-u", "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    begin, end = ("\r\x1b[K", "") if sys.stderr.isatty() else ("", "\n")
    said: list[str] = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as pip:
        for line in pip.stdout or ():
            said.append(line)
            match line.split():
                case ["Collecting", package, *_]:
                    _say(f"{begin}  {package}", end)
                case ["Installing", "collected", *packages]:
                    _say(f"{begin}  unpacking {len(packages) - 1} packages", end)
    _say(begin, "")
    if pip.returncode:
        _say("".join(said), "")
        raise SystemExit(
            "pip could not install what is pinned; its message is above, and a second run goes on"
        )


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("another script is setting up .venv; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _say(sentence: str, end: str = "\n") -> None:
    # On stderr, since a script's stdout is for its result.
    print(sentence, end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
