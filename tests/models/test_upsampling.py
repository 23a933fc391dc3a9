"""Folded upsampling: diffusers' own pixels from 4/9 of the multiplications."""

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from torch.utils.flop_counter import FlopCounterMode

from fewstep.generation.load import load_pipeline
from fewstep.models.specs import get_model
from fewstep.models.upsampling import FoldedUpsample, fold_upsamplers
from fewstep.settings import Settings


@pytest.fixture(autouse=True)
def no_grad():
    with torch.inference_mode():
        yield


def flops_of(module, pixels):
    with FlopCounterMode(display=False) as counter:
        module(pixels)
    return counter.get_total_flops()


@pytest.mark.parametrize("shape", [(1, 5, 1, 1), (2, 5, 1, 7), (3, 5, 8, 6)])
@pytest.mark.numeric
def test_it_is_diffusers_upsampling_at_the_borders_too(shape):
    upsample = Upsample2D(5, use_conv=True, out_channels=4).double()
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    upsample.conv.weight.copy_(upsample.conv.weight.float())  # what is summed in fp32 is exact enough then
    folded = FoldedUpsample(upsample)
    torch.testing.assert_close(folded(pixels), upsample(pixels), rtol=0, atol=1e-6)


def test_it_takes_four_ninths_of_the_work():
    upsample = Upsample2D(8, use_conv=True, out_channels=8)
    pixels = torch.zeros(1, 8, 64, 64)
    share = flops_of(FoldedUpsample(upsample), pixels) / flops_of(upsample, pixels)
    assert share == pytest.approx(4 / 9 * (65 / 64) ** 2)  # a row and a column more than is kept


def test_another_size_than_the_double_is_refused():
    with pytest.raises(ValueError, match="doubles"):
        FoldedUpsample(Upsample2D(4, use_conv=True))(torch.zeros(1, 4, 2, 2), output_size=(3, 3))


@pytest.mark.parametrize(
    "other",
    [
        Upsample2D(4),
        Upsample2D(4, use_conv=True, kernel_size=5, padding=2),
        Upsample2D(4, use_conv=True, bias=False),
        Upsample2D(4, use_conv_transpose=True),
        Upsample2D(4, use_conv=True, interpolate=False),
        Upsample2D(4, use_conv=True, norm_type="rms_norm", eps=1e-6, elementwise_affine=True),
    ],
)
def test_what_is_another_operation_stays(other):
    module = torch.nn.Sequential(other)
    fold_upsamplers(module)
    assert module[0] is other


def test_the_decoder_of_a_loaded_model_is_folded_and_nothing_else():
    diffusion = load_pipeline(get_model("miniature"), Settings(verify="size")).diffusion
    folded = [name for name, part in diffusion.vae.named_modules() if isinstance(part, FoldedUpsample)]
    assert len(folded) == 3 and all(name.startswith("decoder.") for name in folded)
    assert not any(isinstance(part, FoldedUpsample) for part in diffusion.unet.modules())
