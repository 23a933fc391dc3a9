"""What a model costs on this machine, seen from outside: one prediction by the real server, as a CSV's row.

append_row(Path("benchmarks/full-size.csv"), measure("sdxl-random", width=512, height=512, steps=1))
"""

from __future__ import annotations

import csv
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fewstep.coglet.server import Server, ServerFailed, code_and_sentence, free_port, running_server
from fewstep.settings import Settings

# A full-size model on a small CPU generates for minutes.
DEADLINE_S = 3600


def measure(model: str, environ: Mapping[str, str] | None = None, **inputs: int) -> dict[str, Any]:
    """Start a server of `model`, let it generate once and weigh it; Linux only.

    Seconds are wall-clock: `setup_s` from the start of the process until predictions are served, which takes
    in a first image at the model's native size; `painting_s` of the whole request. The peaks are of what
    was resident at once, during setup and afterwards, files that are mapped included. Raises ServerFailed
    when the model does not come up or does not generate.
    """
    environ = {**(os.environ if environ is None else environ), "FEWSTEP_MODEL": model}
    machine = describe_machine()
    body = {"prompt": "noise", "seed": 0, "aspect_ratio": "custom", **inputs}
    with tempfile.TemporaryFile() as log:
        environ |= {"FEWSTEP_DEADLINE_S": str(DEADLINE_S), "NO_COLOR": "1"}
        started = time.perf_counter()
        with running_server(port=free_port(), log=log, environ=environ) as server:
            server.wait_ready()
            setup_s = time.perf_counter() - started
            setup_peak = _peak_bytes(server, forget=True)
            started = time.perf_counter()
            status, answer = server.post("/predictions", {"input": body})
            result_s = time.perf_counter() - started
            if status != 200 or answer["status"] != "succeeded":
                raise ServerFailed(code_and_sentence(str(answer.get("error", answer))))
            return {
                **machine,
                "model": model,
                "dtype": _dtype_of(environ),
                **inputs,
                "setup_s": round(setup_s, 1),
                "painting_s": round(result_s, 2),
                **{f"{part}_s": round(answer["metrics"][f"{part}_ms"] / 1000, 2) for part in _PARTS},
                "setup_peak_gb": round(setup_peak / 1e9, 2),
                "painting_peak_gb": round(_peak_bytes(server) / 1e9, 2),
                "gpu_gb": _gpu("memory.used"),
            }


_PARTS = ("text", "steps", "decode")


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add `row` to the CSV at `path`, which gets a header when it is new."""
    path.parent.mkdir(exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def describe_machine() -> dict[str, Any]:
    """Where and with what it was measured."""
    found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": found[1] if found else platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9),
        "gpu": _gpu("name"),
        "torch": version("torch"),
        "diffusers": version("diffusers"),
    }


def _dtype_of(environ: Mapping[str, str]) -> str:
    from fewstep.models.device import device_and_dtype, name_of  # imports torch, which takes seconds

    _, dtype = device_and_dtype(Settings.from_env(environ))
    return name_of(dtype)


def _peak_bytes(server: Server, forget: bool = False) -> int:
    """The server's and its worker's peaks together; they share a process group."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(process.name)) != server.process.pid:
                continue
            found = re.search(r"VmHWM:\s*(\d+) kB", (process / "status").read_text())
            total += int(found[1]) * 1024 if found else 0
            if forget:
                (process / "clear_refs").write_text("5")  # Linux begins the peak anew
        except OSError:  # it has ended
            continue
    return total


def _gpu(field: str) -> str:
    """What nvidia-smi says of the first GPU, empty without one; memory in GB."""
    if not shutil.which("nvidia-smi"):
        return ""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", "--id=0"]
    told = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return f"{int(told) * 2**20 / 1e9:.2f}" if field.startswith("memory") and told.isdecimal() else told
