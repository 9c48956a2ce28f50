"""Triton kernels of the moments of every plane: mean, m2 = Σ (x − mean)², its extrema and their first places.

    forward   one read of x                                             backward   `moments_affine_apply`

A program sums d = x − origin and d², where the origin is about the mean of its first tile: mean = origin + Σd/n and
m2 = Σd² − (Σd)²/n. What cancels is at most as many times m2 as the program has tiles, because the first tile, however
far from the others, is one of them: (origin − mean)² ≤ var·tiles. Where a plane is split among programs, each has an
origin of its own, and they are merged by Chan, Golub and LeVeque's formula.

An extremum is NaN where there is a NaN, and its place is the first NaN, as in torch.max and torch.min.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tile
from ..layout import accumulator
from . import affine_kernels


@triton.jit
def _origin(x, inside, PLANES: tl.constexpr):
    """About the mean of a tile's rows, or columns; 0 where that isn't finite, or there is no element."""
    axis: tl.constexpr = 1 if PLANES else 0
    size = tl.sum(inside.to(x.dtype), axis, keep_dims=True)
    # Divided before they are added, large numbers don't overflow; and a few bits more or less don't matter.
    origin = tl.sum(tl.where(inside, x * (1 / tl.maximum(size, 1)), 0), axis, keep_dims=True)
    return tl.where(origin - origin == 0, origin, 0)


@triton.jit
def _larger(x, place, inside, best, where):
    """A lane's maximum and its place. Each meets its elements in order: the first of equals stays, NaN beats all but
    NaN."""
    better = inside & ((x > best) | ((x != x) & (best == best)) | ((x == best) & (where == tile.LAST)))
    return tl.where(better, x, best), tl.where(better, place.to(where.dtype), where)


@triton.jit
def _largest(best, where, PLANES: tl.constexpr):
    """The maximum of all lanes, and its first place."""
    axis: tl.constexpr = 1 if PLANES else 0
    most = tile.nan_max(best, axis)
    spread = most[:, None] if PLANES else most[None, :]
    hit = (best == spread) | ((best != best) & (spread != spread))
    return most, tl.min(tl.where(hit, where, tile.LAST), axis).to(tl.int64)


@triton.jit
def _channel_moments_kernel(
    x_ptr, moments_ptr, index_ptr, count_ptr, A, B, STEPS, CHANNELS, x_sn, x_sr, ACC: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, V: tl.constexpr, BIG: tl.constexpr,
):  # fmt: skip
    axis: tl.constexpr = 1 if PLANES else 0
    n, block, a, col = affine_kernels.start(A, B, PLANES, ROWS, COLS, V, BIG)
    total, square = tl.zeros((ROWS, COLS), ACC), tl.zeros((ROWS, COLS), ACC)
    origin = tl.zeros((ROWS, 1) if PLANES else (1, COLS), ACC)
    if index_ptr is not None:
        high, low = tl.full((ROWS, COLS), float("-inf"), ACC), tl.full((ROWS, COLS), float("-inf"), ACC)
        most = tl.full((ROWS, COLS), tile.LAST, tl.int64 if BIG else tl.int32)
        least = most
    first, last = tile.share(A, B, STEPS, PLANES, ROWS, COLS, V)
    for step in range(first, last):
        a, col, head = affine_kernels.place(block, step, A, B, PLANES, ROWS, COLS, V, BIG)
        inside = tile.inside(a, col, head, A, B)
        x = tl.load(tile.at(x_ptr, n, a, col, x_sn, x_sr, V), mask=tile.touched(a, col, head, A, B, V), other=0).to(ACC)
        if step == first:
            origin = _origin(x, inside, PLANES)
        d = tl.where(inside, x - origin, 0)
        total += d
        square += d * d
        if index_ptr is not None:
            place = col - head if PLANES else a
            high, most = _larger(x, place, inside, high, most)
            low, least = _larger(-x, place, inside, low, least)
    if BIG:
        first, last = tl.cast(first, tl.int64), tl.cast(last, tl.int64)
    if PLANES:
        a, col, head = affine_kernels.place(block, first, A, B, PLANES, ROWS, COLS, V, BIG)
        size = tl.minimum(tl.maximum(last * COLS - head, 0), B) - tl.minimum(tl.maximum(first * COLS - head, 0), B)
        size = tl.reshape(size, (ROWS,)).to(ACC)
    else:
        size = tl.full((COLS,), 0, ACC) + (tl.minimum(last * ROWS, A) - first * ROWS)
    count: tl.constexpr = 2 if index_ptr is None else 4
    to, mask = tile.channels(n, block, A, B, count * CHANNELS, PLANES, ROWS, COLS)
    total, square = tl.sum(total, axis), tl.sum(square, axis)
    mean = total / tl.maximum(size, 1)
    m2 = square - total * mean
    # Squares that overflow while the sum doesn't are an infinite m2, and not what their difference would be.
    m2 = tl.where((square == float("inf")) & (total - total == 0), square, tl.where(m2 < 0, 0, m2))
    tl.store(moments_ptr + to, mean + tl.sum(origin, axis), mask=mask)
    tl.store(moments_ptr + CHANNELS + to, m2, mask=mask)
    if count_ptr is not None:
        at, _ = tile.channels(n, block, A, B, CHANNELS, PLANES, ROWS, COLS)
        tl.store(count_ptr + at, size, mask=mask)
    if index_ptr is not None:
        at, _ = tile.channels(n, block, A, B, 2 * CHANNELS, PLANES, ROWS, COLS)
        largest, where = _largest(high, most, PLANES)
        tl.store(moments_ptr + 2 * CHANNELS + to, largest, mask=mask)
        tl.store(index_ptr + at, where, mask=mask)
        smallest, where = _largest(low, least, PLANES)
        tl.store(moments_ptr + 3 * CHANNELS + to, -smallest, mask=mask)
        tl.store(index_ptr + CHANNELS + at, where, mask=mask)


@triton.jit
def _merge_channel_moments_kernel(
    moments_part_ptr, index_part_ptr, count_ptr, moments_ptr, index_ptr, SPLITS, CHANNELS, BLOCK: tl.constexpr
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < CHANNELS
    mean = tl.load(moments_part_ptr + i, mask=mask, other=0)
    m2 = tl.load(moments_part_ptr + CHANNELS + i, mask=mask, other=0)
    size = tl.load(count_ptr + i, mask=mask, other=1)
    plain = mean * size
    if index_ptr is not None:
        high = tl.load(moments_part_ptr + 2 * CHANNELS + i, mask=mask, other=0)
        low = -tl.load(moments_part_ptr + 3 * CHANNELS + i, mask=mask, other=0)
        most = tl.load(index_part_ptr + i, mask=mask, other=0)
        least = tl.load(index_part_ptr + CHANNELS + i, mask=mask, other=0)
    for split in range(1, SPLITS):
        part = moments_part_ptr + split * (2 if index_ptr is None else 4) * CHANNELS + i
        more = tl.load(count_ptr + split * CHANNELS + i, mask=mask, other=1)
        its = tl.load(part, mask=mask, other=0)
        share = more / (size + more)
        m2 += tl.load(part + CHANNELS, mask=mask, other=0) + (its - mean) * (its - mean) * (size * share)
        mean += (its - mean) * share
        plain += its * more
        size += more
        if index_ptr is not None:
            at = index_part_ptr + split * 2 * CHANNELS + i
            # A part without elements has the maximum −∞, and so loses.
            high, most = _later(
                tl.load(part + 2 * CHANNELS, mask=mask, other=0), tl.load(at, mask=mask, other=0), high, most
            )
            low, least = _later(
                -tl.load(part + 3 * CHANNELS, mask=mask, other=0), tl.load(at + CHANNELS, mask=mask, other=0), low,
                least,
            )  # fmt: skip
    # Means of ±∞ have no difference: the plain sum says which infinity it is.
    tl.store(moments_ptr + i, tl.where(mean - mean == 0, mean, plain / size), mask=mask)
    tl.store(moments_ptr + CHANNELS + i, m2, mask=mask)
    if index_ptr is not None:
        tl.store(moments_ptr + 2 * CHANNELS + i, high, mask=mask)
        tl.store(moments_ptr + 3 * CHANNELS + i, -low, mask=mask)
        tl.store(index_ptr + i, most, mask=mask)
        tl.store(index_ptr + CHANNELS + i, least, mask=mask)


@triton.jit
def _later(x, place, best, where):
    """The larger of two parts' maxima, the earlier one's where they are equal."""
    better = (x > best) | ((x != x) & (best == best))
    return tl.where(better, x, best), tl.where(better, place, where)


def channel_moments(x: Tensor, extrema: bool) -> tuple[Tensor, Tensor]:
    count, acc = 4 if extrema else 2, accumulator(x.dtype)
    moments = torch.empty((count, *x.shape[:2]), dtype=acc, device=x.device)
    index = torch.empty((2, *x.shape[:2]) if extrema else 0, dtype=torch.int64, device=x.device)
    if not x.numel():
        return moments, index
    # Extrema as for two maps, in small tiles: each element keeps six numbers in registers.
    w = tile.walk(x, x if extrema else None, sums=True)
    channels = x.shape[0] * x.shape[1]
    part, where, size = moments, index, None
    if w.splits > 1:
        part, where = moments.new_empty((w.splits, *moments.shape)), index.new_empty((w.splits, *index.shape))
        size = moments.new_empty((w.splits, channels))
    tile.launch(
        _channel_moments_kernel, w.grid, x, x, part, where if extrema else None, size, w.a, w.b, w.steps, channels,
        *w.strides[0], **w.meta,
    )  # fmt: skip
    if w.splits > 1:
        tile.launch(
            _merge_channel_moments_kernel, (triton.cdiv(channels, 128),), x, part, where if extrema else None, size,
            moments, index if extrema else None, w.splits, channels, BLOCK=128, num_warps=1,
        )  # fmt: skip
    return moments, index


__all__ = ["channel_moments"]
