"""Something else where a tensor is expected gave an AttributeError, or the name of an inner function."""

import pytest
import torch

from fused_attn import ops

X, GATE, P = torch.rand(2, 3, 4, 4), torch.rand(2, 3), torch.rand(2, 3)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: ops.scale(None, GATE), "x"),
        (lambda: ops.scale(1.0, GATE), "x"),
        (lambda: ops.channel_pool(None), "x"),
        (lambda: ops.scale(X, None), "gate"),
        (lambda: ops.scale(X, "a"), "gate"),
        (lambda: ops.scale(X, GATE, slope=None), "slope"),
        (lambda: ops.shared_mlp(P, None), "w1"),
        (
            lambda: ops.shared_mlp(
                P, torch.rand(3, 3), act="prelu", w2=torch.rand(3, 3), act_weight=torch.ones(1).int()
            ),
            "act_weight",
        ),
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_the_argument_is_named(call, named, grad):
    with torch.set_grad_enabled(grad), pytest.raises((TypeError, ValueError), match=rf"\b{named}\b"):
        call()
