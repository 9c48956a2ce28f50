"""Modules that run by their own equations, because a hook wants to see the children, read the size of a plane off the
first sample, which an empty batch hasn't. Found by fuzzing."""

import pytest
import torch

from fused_attn import ShuffleAttention, SpatialGroupEnhance
from tests.fuzzing import by_its_children


@pytest.mark.parametrize("module", [ShuffleAttention(8, groups=2), SpatialGroupEnhance(groups=2)])
def test_empty_batch(module: torch.nn.Module) -> None:
    x = torch.randn(0, 8, 3, 4, requires_grad=True)
    with by_its_children():
        y = module(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape
