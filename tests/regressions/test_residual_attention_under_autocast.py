"""Under autocast the trunk's sum with a float32 x is float32 and the mask's last convolution isn't: ResidualAttention
raised where the plain equations don't."""

import pytest
import torch

from fused_attn import ResidualAttention


@pytest.mark.parametrize("gate", ["f1", "f2", "f3"])
def test_forward_and_backward(gate: str) -> None:
    torch.manual_seed(0)
    module = ResidualAttention(8, gate=gate, depth=1).eval()
    x = torch.randn(2, 8, 8, 6, requires_grad=True)
    want = module(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert module.trunk(x).dtype != module.mask(x).dtype  # else this test shows nothing
        y = module(x)
    assert y.dtype == torch.float32
    assert (y - want).norm() < 0.05 * want.norm()
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (x, *module.parameters()))
