"""A residual of another memory format kept one pass of the backward from the C++ kernels. The eager form rounds u
differently, so it found no maximum where they had one, and divided by their number: NaN."""

import pytest
import torch
from support import relative
from test_affine_dual_scale import F64, draw, formula, fused
from test_affine_dual_scale import arguments as drawn


@pytest.mark.parametrize("act", ["silu", "relu"])
def test_gradients(act):
    x, *small, _ = drawn((2, 32, 9, 7), torch.float32, "contiguous", False)
    residual = draw(*x.shape, seed=3).float().contiguous(memory_format=torch.channels_last)
    args = [t.requires_grad_() for t in (x, *small, residual)]
    exact = [t.detach().to(F64).requires_grad_() for t in args]
    pools = ("mean_max", "mean_max")
    got = torch.autograd.grad(fused(*args, pools, "split", act).square().sum(), args)
    want = torch.autograd.grad(formula(*exact, pools, "split", act).square().sum(), exact)
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < 1e-4
