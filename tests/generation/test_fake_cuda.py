"""What generating asks of a CUDA device, which is fake: nothing mixes devices, and a batch waits once."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_cuda_cases import CASES, NOT_WAITING, WAITING

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("g++"), reason="a fake CUDA device takes g++, which is not here"),
]


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("traces")
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    command = [sys.executable, HERE / "fake_cuda_cases.py", folder]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "traces.json").read_text())


def stops(trace):
    """Each time that Python waits, also for a copy to the device: phase, FILE:LINE, and for what."""
    sent = [copy for copy in trace["copies"] if copy["blocking"] or not copy["pinned"]]
    waits = trace["waits"] + [{"what": "a copy to the device", "times": 1, **copy} for copy in sent]
    return [(wait["phase"], wait["place"], wait["what"]) for wait in waits for _ in range(wait["times"])]


@pytest.mark.parametrize("case", CASES)
def test_no_batch_mixes_devices_and_each_waits_once_after_the_decoder(traces, case):
    trace = traces["cases"][case]
    assert trace["errors"] == []
    # Words are weighed by compel, which looks at them; a new style's weights come from files.
    known = {"weights of words": "generation/text_encoder.py", "style": "lora/merge.py"}.get(case, "nowhere")
    found = [stop for stop in stops(trace) if stop[0] != "before" or not stop[1].startswith(known)]
    assert [(phase, what) for phase, _, what in found] == [("after", "synchronize")], found
    assert trace["results"] == ["GenerationResult"] * len(CASES[case])


def test_a_style_sends_the_weights_that_it_changes_and_its_own_matrices_once(traces):
    trace = traces["merge"]
    assert trace["errors"] == [] and trace["waits"] == []
    assert {copy["dtype"] for copy in trace["copies"]} == {"torch.float16"}
    sent = sum(copy["bytes"] for copy in trace["copies"])
    assert trace["matrices"] < sent <= trace["weights"] + trace["matrices"]


def test_a_mixture_of_devices_or_a_wait_in_the_loop_would_be_seen(traces):
    [error] = traces["faults"]["a tensor of the host"]["errors"]
    assert "to be on the same device" in error
    trace = traces["faults"]["a number that is read"]
    assert trace["errors"] == [] and [stop[0] for stop in stops(trace)].count("loop") == 4  # steps


@pytest.mark.parametrize("call", WAITING)
def test_what_waits_is_seen(traces, call):
    assert sum(wait["times"] for wait in traces["calls"][call]["waits"]) == (4 if call == "tolist" else 1)


@pytest.mark.parametrize("call", NOT_WAITING)
def test_what_does_not_wait_is_no_wait(traces, call):
    trace = traces["calls"][call]
    assert (trace["errors"], trace["waits"]) == ([], [])
    sent = {"to_device": [("torch.float32", True, False, 16)], "pages": [("torch.float64", False, True, 32)]}
    copies = [(copy["dtype"], copy["pinned"], copy["blocking"], copy["bytes"]) for copy in trace["copies"]]
    assert copies == sent.get(call, [])
