"""`bam_scale` waited for its spatial branch to ask for the gradient of x; a branch that doesn't depend on x never did,
and x silently got none."""

import pytest
import torch

from fused_attn import ops

BRANCHES = {
    "constant": lambda x, v: torch.full((2, 5, 4), 0.5),
    "detached": lambda x, v: x.detach().mean(1),
    "a parameter": lambda x, v: v.expand(2, 5, 4),
    "usual": lambda x, v: x.mean(1) * v[0],
}


@pytest.mark.parametrize("name", BRANCHES)
def test_gradients(name: str) -> None:
    x, w, v = (torch.randn(s, requires_grad=True) for s in ((2, 8, 5, 4), (8, 8), (5, 4)))
    branch = lambda x: BRANCHES[name](x, v)
    excite = lambda p, w: torch.sigmoid(p @ w)
    y = ops.bam_scale(x, excite, branch, w)
    z = x * (1 + torch.sigmoid(excite(x.mean((2, 3)), w)[..., None, None] * branch(x)[:, None]))
    found, expected = (torch.autograd.grad(t.square().sum(), (x, w, v), allow_unused=True) for t in (y, z))
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)
