"""Triton kernel of pooling branches: Σ_s Σ_b x_b, or Σ_s x_b of each, one read of every branch."""
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tile
from ..layout import accumulator
from . import branches
from .branch_scale_triton import eight, steps
from .channel_pool_triton import _channel_pool_merge_kernel, pool_into


@triton.jit
def _branch_pool_kernel(
    x_ptr, x1_ptr, x2_ptr, x3_ptr, x4_ptr, x5_ptr, x6_ptr, x7_ptr, mean_ptr, A, B, STEPS, CHANNELS,
    x_sn, x_sr, x1_sn, x1_sr, x2_sn, x2_sr, x3_sn, x3_sr, x4_sn, x4_sr, x5_sn, x5_sr, x6_sn, x6_sr, x7_sn, x7_sr,
    COUNT: tl.constexpr, EACH: tl.constexpr, WHOLE: tl.constexpr,
    ACC: tl.constexpr, PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, V: tl.constexpr, BIG: tl.constexpr,
):  # fmt: skip
    xs = (x_ptr, x1_ptr, x2_ptr, x3_ptr, x4_ptr, x5_ptr, x6_ptr, x7_ptr)
    sn = (x_sn, x1_sn, x2_sn, x3_sn, x4_sn, x5_sn, x6_sn, x7_sn)
    sr = (x_sr, x1_sr, x2_sr, x3_sr, x4_sr, x5_sr, x6_sr, x7_sr)
    n, block = tile.sample(tl.cdiv(A, ROWS) if PLANES else tl.cdiv(B, COLS))
    SUMS: tl.constexpr = COUNT if EACH else 1
    sums = ()
    for _ in tl.static_range(SUMS):
        sums = sums + (tl.zeros((ROWS, COLS), ACC),)  # noqa: RUF005
    first, last = tile.share(A, B, STEPS, PLANES, ROWS, COLS, V)
    for step in range(first, last):
        a, col, head = tile.place(
            block if PLANES else step, step if PLANES else block, A, B, PLANES, ROWS, COLS, V, BIG
        )
        read, inside = tile.touched(a, col, head, A, B, V), tile.inside(a, col, head, A, B)
        if EACH:
            new = ()
            for b in tl.static_range(COUNT):
                x = tl.load(tile.at(xs[b], n, a, col, sn[b], sr[b], V), mask=read, other=0).to(ACC)
                new = new + (sums[b] + tl.where(inside, x, 0),)  # noqa: RUF005
            sums = new
        else:
            total = sums[0]
            for b in tl.static_range(COUNT):
                x = tl.load(tile.at(xs[b], n, a, col, sn[b], sr[b], V), mask=read, other=0).to(ACC)
                total += tl.where(inside, x, 0)
            sums = (total,)
    for b in tl.static_range(SUMS):
        to, mask = tile.channels(n * SUMS + b, block, A, B, CHANNELS, PLANES, ROWS, COLS)
        mean = tl.sum(sums[b], 1 if PLANES else 0)
        if WHOLE:
            mean = mean / (B if PLANES else A)
        tl.store(mean_ptr + to, mean, mask=mask)


def branch_pool(
    x: Tensor, x1: Tensor | None, x2: Tensor | None, x3: Tensor | None, x4: Tensor | None, x5: Tensor | None,
    x6: Tensor | None, x7: Tensor | None, splits: int, each: bool,
) -> Tensor:  # fmt: skip
    tensors = branches.given(x, (x1, x2, x3, x4, x5, x6, x7))
    count, n, channels = max(len(tensors), splits), x.shape[0], x.shape[1] // splits
    mean = torch.empty((n, count, channels) if each else (n, channels), dtype=accumulator(x.dtype), device=x.device)
    if len(tensors) == 1 and (each or splits == 1):  # whose channels are all of one map, in order
        pool_into(x, mean, None, None)
        return mean
    xs = branches.split(tensors, count)
    w = tile.walk(*xs, sums=True)
    whole, total = w.splits == 1, mean.numel()
    part = mean if whole else mean.new_empty((w.splits, total))
    tile.launch(
        _branch_pool_kernel, w.grid, x, *eight(xs), part, w.a, w.b, w.steps, total, *steps(w.strides),
        COUNT=count, EACH=each, WHOLE=whole, **w.meta,
    )  # fmt: skip
    if not whole:
        tile.launch(
            _channel_pool_merge_kernel, (triton.cdiv(total, 128),), x, part, None, None, mean, None, None, w.splits,
            total, w.b if w.planes else w.a, BLOCK=128, num_warps=1,
        )  # fmt: skip
    return mean


__all__ = ["branch_pool"]
