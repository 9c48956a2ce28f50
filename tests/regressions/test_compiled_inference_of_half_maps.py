"""Compiled without gradients, a gate whose weights are float32 raised on a bfloat16 map, which it takes otherwise."""

import pytest
import torch

import fused_attn


@pytest.mark.parametrize("make", [fused_attn.SqueezeExcite, fused_attn.EffectiveSE, fused_attn.ECA])
def test_as_uncompiled(make):
    torch._dynamo.reset()
    gate, x = make(16), torch.randn(2, 16, 5, 5).bfloat16()
    with torch.no_grad():
        y, want = torch.compile(gate, backend="eager", fullgraph=True)(x), gate(x)
        with torch.autocast("cpu"):
            assert torch.compile(gate, backend="eager", fullgraph=True)(x).dtype == want.dtype
    assert y.dtype == want.dtype
    torch.testing.assert_close(y, want, rtol=2e-2, atol=1e-3)
