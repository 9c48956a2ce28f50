"""A norm before shuffle attention, in Triton's interpreter: values, gradients, strides, budgets."""

import pytest
import torch
from test_passes import SHAPES, launches, within_budget  # noqa: F401  (the fixture)
from test_tail_ops import maps
from test_tails_shuffle import excited, parameters, tail

from fused_attn import ops, testing

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy, at NaN and infinity

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("shape", "k", "act", "with_residual", "layout"),
    [
        ((2, 8, 7, 7), 2, "relu", True, "contiguous"),
        ((2, 8, 7, 7), 1, "silu", True, "channels_last"),
        ((2, 12, 11), 3, "relu6", False, "contiguous"),
        ((2, 4, 2, 3, 2), 1, "identity", True, "channels_last"),
        ((1, 34, 3, 2), 17, "silu", False, "contiguous"),
        ((1, 2, 1400), 1, "relu", True, "contiguous"),
    ],
)
def test_values(shape, k, act, with_residual, layout):
    """Against autograd over the equations in float64; outputs and gradients lie as their maps; the same bits twice."""
    x, residual = maps(shape, F64, layout)
    weights = parameters(shape[1], k)
    leaves = [x, residual, *weights] if with_residual else [x, *weights]
    want = tail(x, residual if with_residual else None, act, k, *weights)
    dy = torch.empty_like(want).copy_(torch.randn(want.shape, generator=torch.Generator().manual_seed(4), dtype=F64))
    true = torch.autograd.grad(want, leaves, dy)
    for dtype, within in ((F64, 1e-9), (F32, 2e-4), (BF16, 0.1)):
        own = [t.detach().to(F32 if t.dim() == 1 and dtype == BF16 else dtype).requires_grad_() for t in leaves]
        short, mine = (own[1], own[2:]) if with_residual else (None, own[1:])

        def run(own=own, short=short, mine=mine):
            how = dict(k=k, residual=short, act=act)
            return ops.moments_gate_shuffle(own[0], excited(own[0][0, 0].numel(), k), *mine, **how)[0]

        y = run()
        assert testing.error(y, want) < within
        found = torch.autograd.grad(y, own, dy.to(dtype))
        assert found[0].stride() == torch.empty_like(own[0]).stride()
        if dtype == F32:
            again = torch.autograd.grad(run(), own, dy.to(dtype))
            assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
        if dtype != BF16:  # the mask of a half-precision relu is read off rounded numbers
            for a, b in zip(found, true, strict=True):
                assert testing.error(a, b) < within


def test_empty_batch():
    x = torch.zeros(0, 8, 5, 5).requires_grad_()
    y = ops.moments_gate_shuffle(x, lambda m: torch.cat([m, m]), k=2, act="relu")
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 8, 5, 5)


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_budget(launches, with_residual, kind):  # noqa: F811
    """3R+1W forward and 5R+2W backward with a residual, 2R+1W and 4R+1W without."""
    x, residual = maps(SHAPES[kind], F32, "channels_last" if kind == "pixels" else "contiguous")
    if x.shape[1] % 2:
        x, residual = (t.detach()[:, 1:].clone(memory_format=torch.preserve_format) for t in (x, residual))
        x, residual = x.requires_grad_(), residual.requires_grad_()
    k = x.shape[1] // 2
    y, _ = ops.moments_gate_shuffle(
        x, excited(x[0, 0].numel(), k), *parameters(x.shape[1], k, F32), k=k,
        residual=residual if with_residual else None, act="relu",
    )  # fmt: skip
    torch.autograd.grad(y, [x, residual] if with_residual else [x], torch.randn_like(y))
    within_budget(launches, "channel_moments", "gate_shuffle", "gate_shuffle_reduce", "gate_shuffle_apply")
    total = lambda some: tuple(sum(budget[i] for *_, budget in some) for i in (0, 1))
    assert total(launches[:2]) == ((3, 1) if with_residual else (2, 1))
    assert total(launches[2:]) == ((5, 2) if with_residual else (4, 1))
