"""dual_scale, bam_scale and scse_scale in Triton's interpreter, against the eager forms in float64."""

import pytest
import torch

from fused_attn import ops, testing, use_backend


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def channel(p, w):
    p = p.sum(0) if p.dim() == 3 else p
    return torch.sigmoid(p @ w.to(p.dtype))


def planar(q, k):
    return torch.sigmoid((q * k.to(q.dtype).view(1, -1, 1, 1)).sum(1))


# 7·15 elements leave no room for vectors; in 8·15, rows of planes start inside of vectors, and in 8·20 they don't.
@pytest.mark.parametrize(("c", "width"), [(7, 3), (8, 3)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("act", ["identity", "relu", "silu"])
@pytest.mark.parametrize("ties", ["split", "first"])
def test_dual_scale(ties, act, layout, c, width):
    args = [testing.arrange(draw(2, c, 5, width, seed=1).round(), layout), draw(c, c, seed=2), draw(2, seed=3)]
    residual = None if act == "silu" else testing.arrange(draw(2, c, 5, width, seed=4), layout)
    run = lambda x, w, k, r: ops.dual_scale(x, channel, planar, (w,), (k,), ties=ties, residual=r, act=act)
    with use_backend("eager"):
        want = testing.answer(run, (*args, residual))
    with use_backend("triton"):
        half = tuple(a if a is None else a.float() for a in (*args, residual))
        got = testing.answer(run, half, cotangents=[c.float() for c in want.cotangents])
    for mine, theirs in zip(got.outs + got.grads, want.outs + want.grads, strict=True):
        assert testing.error(mine, theirs) < 1e-5


@pytest.mark.parametrize(("c", "width"), [(7, 3), (8, 3), (8, 4)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("which", ["bam", "scse"])
def test_merges(which, layout, c, width):
    args = testing.arrange(draw(2, c, 5, width, seed=1), layout), draw(c, c, seed=2), draw(c, seed=3)
    if which == "bam":
        run = lambda x, w, k: ops.bam_scale(x, channel, lambda x: planar(x, k), w)
    else:
        run = lambda x, w, k: ops.scse_scale(x, k, channel, torch.sigmoid, (w,))
    with use_backend("eager"):
        want = testing.answer(run, args)
    with use_backend("triton"):
        got = testing.answer(run, tuple(a.float() for a in args), cotangents=[c.float() for c in want.cotangents])
    for mine, theirs in zip(got.outs + got.grads, want.outs + want.grads, strict=True):
        assert testing.error(mine, theirs) < 1e-5
