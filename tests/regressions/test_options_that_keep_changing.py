"""After 4096 different options an op failed for good: a slope on a schedule ended a training run."""

import pytest
import torch

from fused_attn import backend, ops


def test_a_slope_on_a_schedule(monkeypatch):
    x, gate = torch.randn(1, 2, 3, 3), torch.rand(1, 2)
    monkeypatch.setattr(backend, "MOST_CALLS", 0)
    for slope in (0.1, 0.2, 0.3):
        want = torch.nn.functional.leaky_relu(x * gate[..., None, None], slope)
        torch.testing.assert_close(ops.scale(x, gate, None, "leaky_relu", slope), want)


def test_the_table_stays_small():
    if (why := backend.extension()) is not None:
        pytest.skip(f"no kernels, no table: {why}")
    x, gate = torch.randn(1, 2, 3, 3), torch.rand(1, 2)
    for i in range(5000):
        ops.scale(x, gate, None, "leaky_relu", i * 1e-5)
    assert backend.implementation(ops.scale, "cpp").registered <= backend.MOST_CALLS
    assert len(ops.scale._calls) <= backend.MOST_CALLS
