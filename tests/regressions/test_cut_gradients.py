"""Where relu cuts a gradient it is 0 whatever was cut, on every backend, and at NaN relu passes it, as torch's does."""

import pytest
import torch

from fused_attn import ops, use_backend


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("residual", [False, True])
def test_infinite_gradient(backend, residual):
    x = torch.tensor([1.0, -1.0, float("nan"), -2.0]).view(1, 1, 4).requires_grad_()
    r = torch.zeros(1, 1, 4) if residual else None
    with use_backend(backend):
        y = ops.scale(x, torch.ones(1, 1), r, "relu")
        (dx,) = torch.autograd.grad(y, x, torch.full_like(x, float("inf")))
    (want,) = torch.autograd.grad(torch.relu(x), x, torch.full_like(x, float("inf")))
    torch.testing.assert_close(dx, want, equal_nan=True)
