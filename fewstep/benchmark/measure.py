"""What all measurements share: a server to measure, what it and the machine are, and figures taken in turns.

`measure` is a model's cost seen from outside: one prediction by the real server, as a CSV's row.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

from fewstep.coglet.server import ROOT, Server, code_and_sentence, free_port, running_server
from fewstep.errors import ServerFailed
from fewstep.settings import Settings

K = TypeVar("K")
BENCHMARKS = ROOT / "benchmarks"


@contextmanager
def serving(environ: Mapping[str, str], root: Path = ROOT) -> Iterator[Server]:
    """Run the server of the predict.py in `root`, ready. Raises ServerFailed when it does not come up."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        environ = {**environ, "PYTHONPATH": str(ROOT), "TMPDIR": folder, "NO_COLOR": "1"}
        with running_server(port=free_port(), log=log, environ=environ, root=root) as server:
            server.wait_ready()
            yield server


@contextmanager
def serving_web() -> Iterator[tuple[int, int]]:
    """Run scripts/web, as people start it: its port and its process. Raises ServerFailed without READY."""
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "fewstep.cli.web", "--port", str(port), "--no-open"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "FEWSTEP_WEB_DATA": folder},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr
        try:
            while not (line := process.stderr.readline()).startswith("ready: "):
                if not line:
                    raise ServerFailed("scripts/web did not come up")
            # Its log; were it not read, the server would wait for that.
            threading.Thread(target=process.stderr.read, daemon=True).start()
            yield port, process.pid
        finally:
            process.terminate()
            process.wait(60)


def only(weights: Path, **variables: str) -> dict[str, str]:
    """Return the shell's environment, of all FEWSTEP_ variables with these alone."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("FEWSTEP_")}
    environ |= {f"FEWSTEP_{name}": value for name, value in variables.items()}
    return environ | {"FEWSTEP_WEIGHTS": str(weights)}


def predict(server: Server, timeout_s: float | None = None, **inputs: Any) -> dict[str, Any]:
    """Return the answer to a prediction. Raises ServerFailed with the server's sentence."""
    status, answer = server.post("/predictions", {"input": inputs}, timeout_s)
    if status != 200 or answer["status"] != "succeeded":
        raise ServerFailed(code_and_sentence(str(answer.get("error", answer))))
    return answer  # type: ignore[no-any-return]


def in_turns(
    measured: Mapping[K, Callable[[], float]], repeats: int, warm_up: int = 1
) -> dict[K, list[float]]:
    """Take each figure in turns, so that what slows the machine slows all; the first few do not count."""
    figures: dict[K, list[float]] = {name: [] for name in measured}
    for repeat in range(-warm_up, repeats):
        for name, once in measured.items():
            figure = once()
            if repeat >= 0:
                figures[name].append(figure)
    return figures


def spread(name: str, values: Sequence[float], digits: int) -> dict[str, float]:
    """Return the median, under `name`, and the extremes."""
    figures = {name: statistics.median(values), "least": min(values), "most": max(values)}
    return {key: round(value, digits) for key, value in figures.items()}


def measure(model: str, **inputs: int) -> dict[str, Any]:
    """Start a server of `model`, let it generate once and weigh it; Linux only.

    Seconds are wall-clock: `setup_s` from the start of the process until predictions are served, which takes
    in a first image at the model's native size; `painting_s` of the whole request. The peaks are of what
    was resident at once, during setup and afterwards, files that are mapped included. Raises ServerFailed
    when the model does not come up or does not generate.
    """
    from fewstep.models.device import device_and_dtype, name_of  # imports torch, which takes seconds

    # A full-size model on a small CPU generates for minutes.
    environ = os.environ | {"FEWSTEP_MODEL": model, "FEWSTEP_DEADLINE_S": "3600"}
    dtype = name_of(device_and_dtype(Settings.from_env(environ))[1])
    machine, started = describe_machine(), time.perf_counter()
    with serving(environ) as server:
        setup_s = time.perf_counter() - started
        setup_peak = _peak_gb(server, forget=True)
        started = time.perf_counter()
        metrics = predict(server, prompt="noise", seed=0, aspect_ratio="custom", **inputs)["metrics"]
        return {
            **machine,
            "model": model,
            "dtype": dtype,
            **inputs,
            "setup_s": round(setup_s, 1),
            "painting_s": round(time.perf_counter() - started, 2),
            **{f"{part}_s": round(metrics[f"{part}_ms"] / 1000, 2) for part in ("text", "steps", "decode")},
            "setup_peak_gb": setup_peak,
            "painting_peak_gb": _peak_gb(server),
            "gpu_gb": nvidia_smi("memory.used"),
        }


def describe_machine() -> dict[str, Any]:
    """Return where and with what it is measured."""
    cpu = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu[1] if cpu else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9),
        "gpu": nvidia_smi("name"),
        "torch": version("torch"),
        "diffusers": version("diffusers"),
    }


def memory_bytes(pid: int, field: str) -> int:
    """Return a figure of Linux about a process: VmRSS is what is resident, VmHWM the most that ever was."""
    figure = re.search(rf"{field}:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(figure[1]) * 1024 if figure else 0


def _peak_gb(server: Server, forget: bool = False) -> float:
    """Return the server's and its worker's peaks together; they share a process group."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(process.name)) == server.process.pid:
                total += memory_bytes(int(process.name), "VmHWM")
                if forget:
                    (process / "clear_refs").write_text("5")  # Linux begins the peak anew
        except OSError:  # it has ended
            continue
    return round(total / 1e9, 2)


def nvidia_smi(field: str) -> str:
    """Return what nvidia-smi says of the GPU that CUDA takes first, empty without one; memory in GB."""
    # An index or a UUID; what comes after it is of other GPUs, and none or -1 hides them all.
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if first in ("", "-1") or not shutil.which("nvidia-smi"):
        return ""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", f"--id={first}"]
    done = subprocess.run(command, capture_output=True, text=True)
    value = "" if done.returncode else done.stdout.strip()
    return f"{int(value) * 2**20 / 1e9:.2f}" if field.startswith("memory") and value.isdecimal() else value


def line(row: Mapping[str, Any]) -> str:
    """Return what there is of a row, as one line."""
    values = {name: f"{value:g}" if isinstance(value, float) else value for name, value in row.items()}
    return ", ".join(f"{name} {value}" for name, value in values.items() if value != "")
