"""Where nothing needs a gradient, pool_scale is its parts: the same numbers, and the same complaints."""

import pytest
import torch

from fused_attn import ops


def excite(p, w):
    return torch.sigmoid(p @ w), p.mean(0)


def test_same_bits_without_a_graph():
    x, w, r = torch.randn(2, 6, 5, 3), torch.randn(6, 6), torch.randn(2, 6, 5, 3)
    y, mean = ops.pool_scale(x, excite, w, residual=r, act="relu")
    recorded, recorded_mean = ops.pool_scale(x.clone().requires_grad_(), excite, w, residual=r, act="relu")
    with torch.no_grad():
        silent, _ = ops.pool_scale(x.clone().requires_grad_(), excite, w, residual=r, act="relu")
    assert torch.equal(y, recorded)
    assert torch.equal(y, silent)
    assert torch.equal(mean, recorded_mean)
    assert y.grad_fn is None
    assert recorded.grad_fn is not None


def test_a_weight_that_excite_closes_over_is_refused():
    """Its gradient would be lost without a word."""
    x, w = torch.randn(2, 6, 5, 3), torch.randn(6, 6, requires_grad=True)
    with pytest.raises(ValueError, match="closes over"):
        ops.pool_scale(x, lambda p: torch.sigmoid(p @ w))
    with torch.no_grad():
        ops.pool_scale(x, lambda p: torch.sigmoid(p @ w))
    with pytest.raises(ValueError, match="gate must have shape"):
        ops.pool_scale(x, lambda p: p[:, :3])
