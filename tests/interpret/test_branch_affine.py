"""Branches that are merged, gated and normalised, in Triton's interpreter: values, gradients, strides, budgets."""

import pytest
import torch
from test_passes import SHAPES, SLACK, launches  # noqa: F401  (the fixture)
from test_tail_ops import maps
from test_tails_ahead import excited, parameters, tail

from fused_attn import ops, testing

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy, at NaN and infinity

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("shape", "count", "merge", "act", "layout"),
    [
        ((2, 8, 7, 7), 4, "concat_reversed", "relu", "contiguous"),
        ((2, 8, 7, 7), 4, "concat_reversed", "relu", "channels_last"),
        ((2, 5, 3, 3), 4, "concat", "silu", "channels_last"),
        ((2, 3, 11), 3, "concat_reversed", "silu", "contiguous"),
        ((3, 2, 2, 3, 2), 2, "concat", "identity", "channels_last"),
        ((2, 1, 1400), 4, "concat_reversed", "relu", "contiguous"),
    ],
)
def test_values(shape, count, merge, act, layout):
    """Against autograd over the equations in float64; outputs and gradients lie as their maps; the same bits twice."""
    branches, weights = maps(shape, F64, layout, count), parameters(count * shape[1])
    want = tail(branches, merge, act, *weights)
    dy = torch.randn(want.shape, generator=torch.Generator().manual_seed(4), dtype=F64)
    dy = torch.empty_like(want).copy_(dy)
    true = torch.autograd.grad(want, [*branches, *weights], dy)
    for dtype, within in ((F64, 1e-9), (F32, 2e-4), (BF16, 0.1)):
        small = dtype if dtype == F64 else F32
        own = [t.detach().to(dtype).requires_grad_() for t in branches]
        mine = [t.detach().to(small).requires_grad_() for t in weights]
        size = own[0][0, 0].numel()
        run = lambda: ops.branch_moments_affine(*own, excite=excited(size), params=mine, merge=merge, act=act)[0]  # noqa: B023
        y = run()
        assert testing.error(y, want) < within
        found = torch.autograd.grad(y, [*own, *mine], dy.to(dtype))
        if dtype == F32:
            again = torch.autograd.grad(run(), [*own, *mine], dy.to(dtype))
            assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
        assert [d.stride() for d in found[:count]] == [torch.empty_like(t).stride() for t in own]
        if dtype != BF16:  # the mask of a half-precision relu is read off rounded numbers
            for a, b in zip(found, true, strict=True):
                assert testing.error(a, b) < within


def test_empty_batch():
    branches = [torch.zeros(0, 4, 5, 5).requires_grad_() for _ in range(4)]
    y = ops.branch_moments_affine(*branches, excite=lambda m: torch.stack([m[0], m[1]]), act="relu")
    y.sum().backward()
    assert y.shape == (0, 16, 5, 5)
    assert branches[0].grad.shape == (0, 4, 5, 5)


@pytest.mark.parametrize("kind", SHAPES)
def test_budget(launches, kind):  # noqa: F811
    """2R+1W forward and 4R+1W backward of the whole map, whose four parts have a quarter each."""
    branches = maps(SHAPES[kind], F32, "channels_last" if kind == "pixels" else "contiguous", 4)
    weights = parameters(4 * branches[0].shape[1], F32)
    y, _ = ops.branch_moments_affine(
        *branches, excite=excited(branches[0][0, 0].numel()), params=weights, merge="concat_reversed", act="relu"
    )
    torch.autograd.grad(y, branches, torch.randn_like(y))
    names = ["branch_moments", "branch_affine", "branch_affine_reduce", "branch_affine_apply"]
    assert [name for name, *_ in launches] == names
    for name, reads, writes, budget in launches:  # small tensors are read for each of the four
        assert reads <= budget[0] + 4 * SLACK, name
        assert budget[1] - 0.01 < writes <= budget[1] + 4 * SLACK, name
    total = lambda some: tuple(sum(budget[i] for *_, budget in some) for i in (0, 1))
    assert total(launches[:2]) == (8, 4)
    assert total(launches[2:]) == (16, 4)
