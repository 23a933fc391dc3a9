"""Requests that come together, and a model that only notes them: a result carries the seed of its request."""

import asyncio
import functools
import threading
from collections.abc import Hashable
from dataclasses import dataclass

import pytest

from fewstep.errors import Stopped


@dataclass(frozen=True)
class Wish:
    """What the batcher must know of a request."""

    seed: int
    num_outputs: int = 1
    shape_key: Hashable = None
    weights_key: Hashable = None


def wish(seed, num_outputs=1, **inputs):
    return Wish(seed, num_outputs, tuple(inputs.items()))


def styled(seed, weights):
    return Wish(seed, 1, weights, weights)


FIRST = wish(0)


class Result:
    def __init__(self, seed):
        self.seed = seed


class Model:
    """Stands in for the model: notes every batch and its thread, and can be held in the middle of one."""

    limit = 8

    def __init__(self):
        self.batches, self.heads, self.threads = [], [], set()
        self.gate = threading.Event()
        self.gate.set()
        self.saw_stopped = False
        self._inside = threading.Lock()

    def max_images(self, request):
        self.heads.append(request.seed)
        return self.limit

    def encode(self, request):
        return request

    def generate(self, requests, stopped):
        assert self._inside.acquire(blocking=False), "two batches at once"
        try:
            self.batches.append([request.seed for request in requests])
            self.threads.add(threading.get_ident())
            return self.make(requests, stopped)
        finally:
            self._inside.release()

    def make(self, requests, stopped):
        while not self.gate.wait(0.001):
            if stopped():
                self.saw_stopped = True
                raise Stopped("every caller has left")
        return [Result(request.seed) for request in requests]


def options(**given):
    return pytest.mark.parametrize("batcher", [given], indirect=True)


def play(scene, seconds=20):
    """Run the coroutine `scene` to its end; fail rather than hang."""
    return asyncio.run(asyncio.wait_for(scene, seconds))


def scene(test):
    """A test that is a coroutine."""

    @functools.wraps(test)
    def run(**given):
        play(test(**given))

    return run


async def until(condition):
    while not condition():
        await asyncio.sleep(0.001)


async def held(model, batcher, request=FIRST):
    """Hold the model in a batch with that one request, so that all that comes next queues up."""
    model.gate.clear()
    task = asyncio.create_task(batcher.submit(request))
    await until(lambda: model.batches and model.batches[-1] == [request.seed])
    return task


async def queued(batcher, *requests):
    tasks = [asyncio.create_task(batcher.submit(request)) for request in requests]
    await asyncio.sleep(0)  # each has now run up to its wait
    return tasks


async def called(batcher, function):
    task = asyncio.create_task(batcher.run(function))
    await asyncio.sleep(0)
    return task


async def seeds_of(tasks):
    return [result.seed for result in await asyncio.gather(*tasks)]


async def ends_of(tasks):
    return [type(end) for end in await asyncio.gather(*tasks, return_exceptions=True)]


def listen():
    """What the running loop will have to say of errors that nobody has read."""
    reports = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reports.append(context))
    return reports
