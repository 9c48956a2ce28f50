"""Second derivatives that were silently missing.

torch.func: a backward's outputs but the first were marked as not differentiable, so grad of grad by a branch was 0.
torch.autograd.grad: it found no way from a gradient to the tensors it depends on, and called those unused, or zero.
"""

import pytest
import torch

from fused_attn import SqueezeExcite, ops

MATCH = r"fused_attn\.\w+: a second derivative"


def test_torch_func() -> None:
    a, b, gate = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.rand(2, 2, 3)
    inner = torch.func.grad(lambda a: ops.branch_scale(a, gate, b).square().sum())
    with pytest.raises(RuntimeError, match=MATCH):
        torch.func.grad(lambda a: inner(a).sum())(a)


@pytest.mark.parametrize("options", [{"allow_unused": True}, {"materialize_grads": True}], ids=str)
def test_autograd_grad(options: dict) -> None:
    """A gradient penalty, as it is usually written."""
    module = SqueezeExcite(16)
    x = torch.randn(2, 16, 5, 5, requires_grad=True)
    (dx,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=MATCH):
        torch.autograd.grad(dx.square().sum(), [*module.parameters()], **options)
