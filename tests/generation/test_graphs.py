"""Recordings: at the second call of a shape, replayed on the caller's own inputs, given up when they fail."""

import logging

import pytest
import torch
from small import MINIATURE
from torch.utils._pytree import tree_leaves

from fewstep.generation.engines.compiled import CompiledEngine
from fewstep.generation.engines.graphs import Recorded, owned
from fewstep.generation.text_encoder import TextEncoder
from fewstep.request import Inputs


class Recorder:
    """Makes what is like a CUDA graph: its inputs and result have memory of their own, for every replay."""

    def __init__(self):
        self.recorded, self.replayed = [], 0

    def __call__(self, function, inputs):
        held = [None if one is None else one.clone() for one in inputs]
        result = owned(function(*held))
        self.recorded.append(tuple(one if one is None else tuple(one.shape) for one in inputs))

        def replay(*given):
            self.replayed += 1
            for mine, theirs in zip(held, given, strict=True):
                if mine is not None:
                    mine.copy_(theirs)
            for kept, made in zip(tree_leaves(result), tree_leaves(function(*held)), strict=True):
                if kept is not None:
                    kept.copy_(made)
            return result

        return replay


def counted(function, record):
    """As the text encoders are recorded: each call is a turn."""
    recorded = Recorded(function, record)

    def call(*inputs, **how):
        recorded.turn += 1
        return recorded(*inputs, **how)

    call.forget = recorded.forget
    return call


def test_the_first_turn_of_a_shape_runs_and_the_second_is_recorded_and_replayed():
    recorder = Recorder()
    call = Recorded(lambda x: x + 1, recorder)
    for turn in range(3):
        call.turn = turn
        for i in range(3):
            assert call(torch.full((2,), i)).tolist() == [i + 1] * 2
        assert len(recorder.recorded) == min(turn, 1) and recorder.replayed == 3 * turn
    call(torch.ones(2, dtype=int), anew=True)
    assert call(torch.ones(2, dtype=int)).tolist() == [2, 2] and recorder.replayed == 6
    call.turn += 1
    call(torch.ones(2, dtype=int))
    assert len(recorder.recorded) == 2 and recorder.replayed == 7


def test_shapes_are_recorded_each_and_forgotten_together():
    recorder = Recorder()
    call = counted(lambda x, y: 2 * x if y is None else x + y, recorder)
    for i in range(4):
        assert torch.equal(call(torch.full((2,), i), None), torch.full((2,), 2 * i))
    assert recorder.recorded == [((2,), None)] and recorder.replayed == 3
    for i in range(3):
        assert torch.equal(call(torch.full((2,), i), torch.ones(2, dtype=int)), torch.full((2,), i + 1))
    assert recorder.recorded == [((2,), None), ((2,), (2,))]
    assert call.forget() and not call.forget()
    for _ in range(2):
        call(torch.full((2,), 1), None)
    assert len(recorder.recorded) == 3


def test_a_dtype_is_part_of_a_shape():
    recorder = Recorder()
    call = counted(lambda x: x + 1, recorder)
    for dtype in (torch.float32, torch.int64) * 3:
        assert call(torch.ones(2, dtype=dtype)).dtype == dtype
    assert len(recorder.recorded) == 2


def test_what_is_owned_no_later_call_overwrites():
    call = counted(lambda x: x + 1, Recorder())
    call(torch.ones(2))
    first = call(torch.ones(2))
    kept = owned({"states": (first,)})["states"][0]
    call(torch.zeros(2))
    assert first.tolist() == [1, 1] and kept.tolist() == [2, 2]


def test_what_cannot_be_recorded_runs_as_it_is_and_is_not_tried_again(caplog):
    tried = []

    def fails(function, inputs):
        tried.append(inputs)
        raise torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing")

    call = counted(lambda x: x + 1, fails)
    with caplog.at_level(logging.WARNING):
        assert [call(torch.ones(1)).item() for _ in range(4)] == [2] * 4
        assert call(torch.ones(2)).tolist() == call(torch.ones(2)).tolist() == [2, 2]
    assert len(tried) == 2 and caplog.text.count("no CUDA graph") == 2  # each shape once


def test_a_lack_of_memory_in_a_recording_is_the_batchs_and_a_lost_device_everybodys():
    for error in (torch.OutOfMemoryError("CUDA out of memory"), torch.AcceleratorError("CUDA error: x")):

        def fails(function, inputs, error=error):
            raise error

        call = counted(lambda x: x + 1, fails)
        call(torch.ones(1))
        with pytest.raises(type(error)):
            call(torch.ones(1))


def test_an_engine_records_the_unet_by_padded_batches_and_the_decoder_by_sizes(miniature):
    recorder = Recorder()
    engine = CompiledEngine(miniature.diffusion.unet, miniature.decoder, lambda: recorder)
    plain, miniature.engine = miniature.engine, engine
    try:
        for count in (3, 4, 3, 1):
            prompts = [f"a red house {i}" for i in range(count)]
            size = {"aspect_ratio": "custom", "width": 64, "height": 64}
            found = miniature.images(prompts, range(count), steps=2, **size)
            miniature.engine = plain
            expected = miniature.images(prompts, range(count), steps=2, **size)
            miniature.engine = engine
            for one, other in zip(found, expected, strict=True):
                difference = torch.tensor(list(one.tobytes())) - torch.tensor(list(other.tobytes()))
                assert difference.abs().max() <= 1
    finally:
        miniature.engine = plain
    unets = {shapes[0][0] for shapes in recorder.recorded if len(shapes) > 1}
    assert unets == {4} and recorder.replayed > 0  # of one there was but one batch


def test_prompts_are_encoded_by_recordings_to_the_last_bit_and_kept_whatever_comes_after(miniature):
    recorder = Recorder()
    text = TextEncoder(miniature.diffusion)
    text.record(recorder)
    prompts = [
        "a red house",
        "a blue car at night",
        "a (white)1.3 castle",
        "a tree",
        "a red house in the snow",
    ]
    parts = [Inputs.create(MINIATURE, prompt=prompt).prompt_parts for prompt in prompts]
    found = [text.encode(each, 1, skip) for each in parts for skip in (0, 1)]
    plain = TextEncoder(miniature.diffusion)
    expected = [plain.encode(each, 1, skip) for each in parts for skip in (0, 1)]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.states, other.states) and torch.equal(one.pooled, other.pooled)
    assert recorder.replayed > 4 and all(shapes[1] is None for shapes in recorder.recorded)
