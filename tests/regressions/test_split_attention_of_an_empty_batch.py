"""Backward of split attention of an empty batch read the number of gates off the first sample. Found by fuzzing."""

import pytest
from torch import nn

from fused_attn import testing
from tests.fuzzing import Example, check


@pytest.mark.parametrize("backend", testing.candidates())
def test_split_attention(backend: str) -> None:
    args = {"in_channels": 16, "norm_layer": nn.BatchNorm2d}
    check(Example("split_attention", args, x=(0, 16, 7, 7), wanted=("x",), backend=backend))
