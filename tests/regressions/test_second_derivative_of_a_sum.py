"""A second derivative passed as 0 where the incoming gradient was a constant: `once_differentiable` lets it through."""

import pytest
import torch

from fused_attn import ops


@pytest.mark.parametrize("run", ["scale", "pool_scale"])
def test_it_raises(run):
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    gate = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    y = ops.scale(x, gate, None, "silu") if run == "scale" else ops.pool_scale(x, torch.sigmoid)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        dx.square().sum().backward()
