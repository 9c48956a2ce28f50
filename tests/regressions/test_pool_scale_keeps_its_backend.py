"""`pool_scale`'s backward ran on whatever backend was current then, and trained nothing that its excite closed over."""

import pytest
import torch

from fused_attn import backend, ops, use_backend


def test_backward_runs_where_forward_did():
    seen = []
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    with backend.observe(lambda choice: seen.append(choice.backend)):
        with use_backend("eager"):
            y = ops.pool_scale(x, torch.sigmoid)
        y.sum().backward()
    assert set(seen) == {"eager"}


def test_a_closure_that_would_not_train_is_refused():
    layer = torch.nn.Linear(3, 3)
    with pytest.raises(ValueError, match="params"):
        ops.pool_scale(torch.randn(2, 3, 4, 4), lambda p: torch.sigmoid(layer(p)))
