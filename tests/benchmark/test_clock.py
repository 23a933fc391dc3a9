"""A clock that is read has waited for the GPU, and what takes long is timed less often."""

from types import SimpleNamespace

import pytest
import torch

from fewstep.benchmark import clock


@pytest.fixture
def gpu(monkeypatch):
    """What is asked of a GPU that this machine need not have, in order."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: asked.append(name))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 9_876_000_000)
    # Its own clock only: a thread of another test may read the time meanwhile.
    read = SimpleNamespace(perf_counter=lambda: asked.append("clock") or float(len(asked)))
    monkeypatch.setattr(clock, "time", read)
    return asked


def test_the_clock_is_read_when_the_gpu_is_done(gpu):
    assert clock.seconds_of(lambda: gpu.append("work")) > 0
    assert gpu == ["synchronize", "clock", "work", "synchronize", "clock"]


def test_a_stopwatch_waits_before_and_after_what_it_times_and_is_taken_off(gpu):
    class Network:
        def decode(self, latents):
            gpu.append("work")
            return -latents

    network = Network()
    with clock.stopwatches({"vae": [(network, "decode")], "unet": []}) as spent:
        assert network.decode(3) == -3
    assert gpu == ["synchronize", "clock", "work", "synchronize", "clock"]
    assert spent["vae"] > 0 == spent["unet"]
    assert not vars(network)


def test_memory_is_the_gpus_and_begins_anew(gpu):
    clock.forget_peak()
    assert gpu == ["empty_cache", "reset_peak_memory_stats"] and clock.peak_gb() == 9.88


def test_on_a_cpu_memory_is_the_processs():
    clock.forget_peak()
    assert 0.01 < clock.peak_gb() < 1000


def test_calls_are_counted_but_the_first_and_end_early_when_they_are_slow(monkeypatch):
    called = []
    times = iter((0.0, 0.3, 0.0, 0.1, 0.0, 0.2, 0.0, 0.2))
    monkeypatch.setattr(clock, "now", lambda: next(times))
    figures = clock.milliseconds(lambda: called.append(1), 3, warm_up=2)
    assert figures == {"ms": 200, "least": 100, "most": 300, "n": 3} and len(called) == 5
    monkeypatch.setattr(clock, "now", iter((0.0, 6.0, 6.0, 12.0)).__next__)
    assert clock.milliseconds(str, 9, warm_up=0)["n"] == 2
