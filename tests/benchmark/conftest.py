"""What several modules here measure."""

import pytest
from tiny import SHARED, WIDTHS
from tiny import UNETS as TINY_UNETS

from fewstep.benchmark import full_size
from fewstep.models.specs import MODELS


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """Full size at toy size: the same making, of smaller networks."""
    unets = {name: {**SHARED, **TINY_UNETS[MODELS[name].family]} for name in ("sdxl", "sd15")}
    monkeypatch.setattr(full_size, "UNETS", unets)
    vae = {**full_size.VAE, "block_out_channels": (8, 8, 16, 16), "norm_num_groups": 8}
    monkeypatch.setattr(full_size, "VAE", vae)
    for name, width in (("CLIP_L", WIDTHS[0]), ("BIG_G", WIDTHS[1])):
        sizes = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 2}
        monkeypatch.setattr(full_size, name, {**sizes, "num_attention_heads": 2})
    return tmp_path / "weights"
