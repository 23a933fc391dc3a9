"""Layers of 8 bits: near to what they stand for, in place, and undone without a trace."""

import pytest
import torch
from tiny import make_unet
from torch import nn

from fewstep.models import fp8
from fewstep.models.fp8 import Fp8Linear, StoredConv2d, StoredLinear, from_fp8, to_fp8


def kinds(unet) -> dict[str, int]:
    found: dict[str, int] = {}
    for layer in unet.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            found[type(layer).__name__] = found.get(type(layer).__name__, 0) + 1
    return found


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_a_stored_weight_is_within_a_16th_of_each_value_or_a_448th_of_the_rows_largest(scale):
    layer = nn.Linear(64, 32)
    weight = scale * torch.randn(32, 64) * torch.logspace(-3, 0, 32)[:, None]
    weight[3] = 0
    unet = nn.Module()
    unet.down_blocks, unet.mid_block, unet.up_blocks = [layer], None, []
    to_fp8(unet, multiply=False)
    layer.store(weight.double())
    error = (layer._loaded(torch.float32) - weight).abs()
    # e4m3 has 3 bits behind the first: half of the last is a 16th. Below 2**-6, steps are of 2**-9.
    steps = weight.abs().amax(1, keepdim=True) / 448 * 2**-10
    assert (error <= torch.maximum(weight.abs() / 16, steps) * 1.001).all()
    assert (error[3] == 0).all() and error.max() > 0


def test_layers_of_8_bits_multiply_like_the_values_that_they_stand_for():
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 32), torch.randn(2, 5, 64)
    exact = layer(x)
    layer.__class__ = Fp8Linear
    weight = layer.weight.data
    layer.weight = nn.Parameter(torch.empty_like(weight, dtype=fp8.FP8), requires_grad=False)
    layer.register_buffer("scale", torch.ones(32, 1))
    layer.store(weight)
    found = layer(x)
    rows = x.flatten(0, 1)
    scale = rows.abs().amax(1, keepdim=True) / 448
    expected = ((rows / scale).to(fp8.FP8).float() * scale) @ layer._loaded(torch.float32).T + layer.bias
    assert found.shape == exact.shape and found.dtype == x.dtype
    # bf16 keeps 8 bits of the product.
    torch.testing.assert_close(found.flatten(0, 1), expected, rtol=2**-7, atol=2**-7)
    share = ((found - exact).norm() / exact.norm()).item()
    assert 0 < share < 1 / 16


def test_in_place_for_memory_all_layers_of_the_blocks_and_for_speed_the_linear_ones_that_can():
    unet = make_unet()
    before = kinds(unet)
    to_fp8(unet, multiply=False)
    stored = kinds(unet)
    outside = sum(
        isinstance(layer, nn.Linear | nn.Conv2d)
        for part in (unet.conv_in, unet.conv_out, unet.time_embedding)
        for layer in part.modules()
    )
    assert stored["Linear"] + stored["Conv2d"] == outside
    assert stored["StoredLinear"] + stored["StoredConv2d"] + outside == sum(before.values())
    assert unet.dtype == torch.float32 and unet.conv_in.weight.dtype == torch.float32
    size = sum(
        layer.weight.nbytes for layer in unet.modules() if isinstance(layer, StoredLinear | StoredConv2d)
    )
    assert size == sum(layer.weight.numel() for layer in unet.modules() if isinstance(layer, fp8.Stored))
    multiplying = make_unet()
    to_fp8(multiplying, multiply=True)
    assert set(kinds(multiplying)) == {"Linear", "Conv2d", "Fp8Linear"}
    for layer in multiplying.modules():
        if isinstance(layer, Fp8Linear):
            assert not any(side % 16 for side in layer.weight.shape)


@torch.no_grad()
def test_a_network_of_8_bits_computes_nearly_the_same_and_is_undone():
    unet, other = make_unet(), make_unet()
    other.load_state_dict(unet.state_dict())
    latents, states = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    exact = unet(latents, 500, states).sample
    for multiply in (False, True):
        to_fp8(unet, multiply=multiply)
        found = unet(latents, 500, states).sample
        assert 0 < (found - exact).norm() < 0.1 * exact.norm()
        from_fp8(unet, torch.float32)
        assert kinds(unet) == kinds(other) and not any("scale" in name for name, _ in unet.named_buffers())
        unet.load_state_dict(other.state_dict())
        assert torch.equal(unet(latents, 500, states).sample, exact)
