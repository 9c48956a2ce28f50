"""Triton kernels of channel pooling.

    forward   Σ_s x or Σ_s |x|, max_s x, and the first place of the maximum    reads x once
              mean and variance: plane_gate_shuffle_triton.moments
    backward  dx = dp/S, sign(x)·dp/S, dp at the maxima                        `pool_scale_apply` without its gate

A maximum is NaN where there is one, and its place the first NaN, as in torch.max.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tile
from ..layout import accumulator
from .channel_pool import has_max
from .plane_gate_shuffle_triton import launch_moments
from .pool_scale_triton import launch_apply
from .scale_triton import backward_sums


@triton.jit
def _channel_pool_fwd_kernel(
    x_ptr, mean_ptr, max_ptr, index_ptr, A, B, STEPS, CHANNELS, x_sn, x_sr, ABS: tl.constexpr, WHOLE: tl.constexpr,
    ACC: tl.constexpr, PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, V: tl.constexpr, BIG: tl.constexpr,
):  # fmt: skip
    n, block = tile.sample(tl.cdiv(A, ROWS) if PLANES else tl.cdiv(B, COLS))
    total = tl.zeros((ROWS, COLS), ACC)
    best = tl.full((ROWS, COLS), float("-inf"), ACC)
    where = tl.full((ROWS, COLS), tile.LAST, tl.int64 if BIG else tl.int32)
    first, last = tile.share(A, B, STEPS, PLANES, ROWS, COLS, V)
    for step in range(first, last):
        a, col, head = tile.place(
            block if PLANES else step, step if PLANES else block, A, B, PLANES, ROWS, COLS, V, BIG
        )
        inside = tile.inside(a, col, head, A, B)
        x = tl.load(tile.at(x_ptr, n, a, col, x_sn, x_sr, V), mask=tile.touched(a, col, head, A, B, V), other=0).to(ACC)
        if mean_ptr is not None:
            total += tl.where(inside, tl.abs(x) if ABS else x, 0)
        if index_ptr is not None:
            # Each lane meets its elements in order, so the first of equals stays; NaN beats all but an earlier NaN.
            better = inside & ((x > best) | ((x != x) & (best == best)) | ((x == best) & (where == tile.LAST)))
            best = tl.where(better, x, best)
            where = tl.where(better, (col - head if PLANES else a).to(where.dtype), where)
        elif max_ptr is not None:
            best = tl.maximum(best, tl.where(inside, x, float("-inf")), propagate_nan=tl.PropagateNan.ALL)
    to, mask = tile.channels(n, block, A, B, CHANNELS, PLANES, ROWS, COLS)
    if mean_ptr is not None:
        mean = tl.sum(total, 1 if PLANES else 0)
        if WHOLE:
            mean = mean / (B if PLANES else A)
        tl.store(mean_ptr + to, mean, mask=mask)
    if max_ptr is not None:
        largest = tile.nan_max(best, 1 if PLANES else 0)
        tl.store(max_ptr + to, largest, mask=mask)
        if index_ptr is not None:
            spread = largest[:, None] if PLANES else largest[None, :]
            hit = (best == spread) | ((best != best) & (spread != spread))
            place = tl.min(tl.where(hit, where, tile.LAST), 1 if PLANES else 0)
            tl.store(index_ptr + to, place.to(tl.int64), mask=mask)


@triton.jit
def _channel_pool_merge_kernel(
    mean_part_ptr, max_part_ptr, index_part_ptr, mean_ptr, max_ptr, index_ptr, SPLITS, CHANNELS, S, BLOCK: tl.constexpr
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < CHANNELS
    if mean_ptr is not None:
        total = tl.load(mean_part_ptr + i, mask=mask, other=0)
        for split in range(1, SPLITS):
            total += tl.load(mean_part_ptr + split * CHANNELS + i, mask=mask, other=0)
        tl.store(mean_ptr + i, total / S, mask=mask)
    if max_ptr is not None:
        best = tl.load(max_part_ptr + i, mask=mask, other=0)
        if index_ptr is not None:
            where = tl.load(index_part_ptr + i, mask=mask, other=0)
        for split in range(1, SPLITS):
            x = tl.load(max_part_ptr + split * CHANNELS + i, mask=mask, other=0)
            better = (x > best) | ((x != x) & (best == best))
            best = tl.where(better, x, best)
            if index_ptr is not None:
                at = tl.load(index_part_ptr + split * CHANNELS + i, mask=mask, other=0)
                where = tl.where(better, at, where)
        tl.store(max_ptr + i, best, mask=mask)
        if index_ptr is not None:
            tl.store(index_ptr + i, where, mask=mask)


def pool_into(
    x: Tensor, mean: Tensor | None, largest: Tensor | None, index: Tensor | None, absolute: bool = False
) -> None:
    """Fills the descriptors wanted, each (N, C) and contiguous, in one read of x; `index` only beside `largest`."""
    w = tile.walk(x, sums=True)
    channels, outs = x.shape[0] * x.shape[1], (mean, largest, index)
    parts = outs
    if w.splits > 1:
        parts = tuple(o if o is None else o.new_empty((w.splits, channels)) for o in outs)  # type: ignore[assignment]
    tile.launch(
        _channel_pool_fwd_kernel, w.grid, x, x, *parts, w.a, w.b, w.steps, channels, *w.strides[0],
        ABS=absolute, WHOLE=w.splits == 1, **w.meta,
    )  # fmt: skip
    if w.splits > 1:
        tile.launch(
            _channel_pool_merge_kernel, (triton.cdiv(channels, 128),), x, *parts, *outs, w.splits, channels,
            w.b if w.planes else w.a, BLOCK=128, num_warps=1,
        )  # fmt: skip


def channel_pool(x: Tensor, pool: str, ties: str, return_index: bool) -> tuple[Tensor, Tensor]:
    acc, shape = accumulator(x.dtype), tuple(x.shape[:2])
    if pool == "mean_var":
        value = torch.empty((2, *shape), dtype=acc, device=x.device)
        launch_moments(x, value[0], value[1])
        return value, torch.empty(0, dtype=torch.int64, device=x.device)
    value = torch.empty((2, *shape) if pool == "mean_max" else shape, dtype=acc, device=x.device)
    mean, largest = (value[0], value[1]) if pool == "mean_max" else (None, value) if pool == "max" else (value, None)
    indexed = has_max(pool) and (ties == "first" or return_index)
    index = torch.empty(shape if indexed else 0, dtype=torch.int64, device=x.device)
    pool_into(x, mean, largest, index if indexed else None, pool == "mean_abs")
    return value, index


def channel_pool_bwd(x: Tensor, dpooled: Tensor, values: Tensor, index: Tensor, pool: str, ties: str) -> Tensor:
    maxima, count = values[1] if pool == "mean_max" else values[0] if pool == "mean_var" else values, None
    if has_max(pool) and ties == "split":
        _, count = backward_sums(x, None, None, None, maxima, accumulator(x.dtype), "identity", 0.0)
    return launch_apply(x, None, None, dpooled, maxima, index, count, "identity", 0.0, pool, ties)


__all__ = ["channel_pool", "channel_pool_bwd", "pool_into"]
