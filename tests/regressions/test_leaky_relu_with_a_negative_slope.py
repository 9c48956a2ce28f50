"""The epilogue's derivative was read off its output, whose sign a negative slope turns round."""

import pytest
import torch

from fused_attn import ops, use_backend


@pytest.mark.parametrize("backend", ["eager", "auto"])
def test_gradient(backend):
    x, r = (torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    gate = torch.rand(2, 3, dtype=torch.float64)
    want = torch.nn.functional.leaky_relu(x * gate[..., None, None] + r, -0.5)
    with use_backend(backend):
        got = ops.scale(x, gate, r, "leaky_relu", -0.5)
        dy = torch.randn_like(x)
        for a, b in zip(torch.autograd.grad(got, [x, r], dy), torch.autograd.grad(want, [x, r], dy), strict=True):
            torch.testing.assert_close(a, b)
