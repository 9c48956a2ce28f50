"""The eager backward of an empty batch took its empty maxima for absent ones."""

import torch

from fused_attn import ops, use_backend


def test_backward():
    x = torch.rand(0, 3, 4, 4, requires_grad=True)
    with use_backend("eager"):
        ops.pool_mlp_scale(x, torch.rand(2, 3), None, torch.rand(3, 2), max_weight=0.5).sum().backward()
        ops.pool_scale(x, lambda p: torch.sigmoid(p.sum(0)), pool="mean_max").sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
