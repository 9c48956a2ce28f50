"""fuse_ raised KeyError on a model pickled by a version of its library whose modules didn't have an attribute yet.

Cause: plans and rules read attributes that decide the maths from `__dict__`, and took it that they are there.
Found in review of "Every squeeze-and-excitation in production".
"""

import importlib

import pytest
from torch import nn

import tests.support  # noqa: F401  (makes timm importable beside a CPU torch)
from fused_attn import fuse_


@pytest.mark.parametrize(
    ("where", "name", "attribute"),
    [
        ("timm.layers.squeeze_excite", "SEModule", "add_maxpool"),
        ("pytorchcv.models.common.att", "SEBlock", "use_conv"),
        ("pytorchcv.models.sinet", "SEBlock", "use_conv2"),
        ("monai.networks.blocks.squeeze_and_excitation", "ChannelSELayer", "add_residual"),
    ],
)
def test_refused(where: str, name: str, attribute: str) -> None:
    pytest.importorskip(where.partition(".")[0])
    cls = getattr(importlib.import_module(where), name)
    old: nn.Module = cls(2, 24) if name == "ChannelSELayer" else cls(24)
    del old.__dict__[attribute]
    assert fuse_(old).refused == [("", f"has no attribute {attribute}")]


def test_an_option_of_an_activation() -> None:
    squeeze_excite = pytest.importorskip("timm.layers.squeeze_excite")
    old = squeeze_excite.SEModule(24, act_layer=nn.LeakyReLU)
    del old.act.__dict__["negative_slope"]
    assert "has no attribute negative_slope" in fuse_(old).refused[0][1]
