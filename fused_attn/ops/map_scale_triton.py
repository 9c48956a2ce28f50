"""Triton kernels of scaling by a map of logits.

    moments    Σ z², or mean and Σ (z − mean)², of what is normalised together    reads z
    forward    y = (1 + f(z))·x                                                   reads x, z, writes y
    sums       Σ e and Σ e·ẑ                                                      reads x, z, dy
    backward   dx = dy·(1 + f), dz                                                reads x, z, dy, writes dx, dz

Kernels normalise over the positions of each channel. A norm over the channels of each position is that of the map with
C and S exchanged, which is a view: planes are its pixels.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tile
from ..layout import accumulator
from .scale_triton import merge_sums


@triton.jit
def _finish(mean, square, size, NORM: tl.constexpr, EPS: tl.constexpr, CORRECTION: tl.constexpr):
    """What is kept: the norm, or mean and 1/std."""
    if NORM == "channels":
        return tl.sqrt(square), mean
    else:
        return mean, 1 / tl.sqrt(square / (size - CORRECTION) + EPS)


@triton.jit
def _moments_kernel(
    z_ptr, first_ptr, second_ptr, count_ptr, A, B, STEPS, CHANNELS, z_sn, z_sr,
    NORM: tl.constexpr, EPS: tl.constexpr, CORRECTION: tl.constexpr, WHOLE: tl.constexpr, ACC: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, V: tl.constexpr, BIG: tl.constexpr,
):  # fmt: skip
    n, block = tile.sample(tl.cdiv(A, ROWS) if PLANES else tl.cdiv(B, COLS))
    count, mean, square = tl.zeros((ROWS, COLS), ACC), tl.zeros((ROWS, COLS), ACC), tl.zeros((ROWS, COLS), ACC)
    first, last = tile.share(A, B, STEPS, PLANES, ROWS, COLS, V)
    for step in range(first, last):
        a, col, head = tile.place(
            block if PLANES else step, step if PLANES else block, A, B, PLANES, ROWS, COLS, V, BIG
        )
        inside = tile.inside(a, col, head, A, B)
        z = tl.load(tile.at(z_ptr, n, a, col, z_sn, z_sr, V), mask=tile.touched(a, col, head, A, B, V), other=0).to(ACC)
        if NORM == "channels":
            square += tl.where(inside, z * z, 0)
        else:  # Welford's update, in each lane: a mean far from 0 costs no digits
            count += inside.to(ACC)
            off = z - mean
            mean = tl.where(inside, mean + off / count, mean)
            square = tl.where(inside, square + off * (z - mean), square)
    axis: tl.constexpr = 1 if PLANES else 0
    to, mask = tile.channels(n, block, A, B, CHANNELS, PLANES, ROWS, COLS)
    if NORM == "channels":
        total = tl.sum(square, axis)
        if WHOLE:
            total, _ = _finish(total, total, 1, NORM, EPS, CORRECTION)
        tl.store(first_ptr + to, total, mask=mask)
    else:
        size = tl.sum(count, axis)
        whole = tl.sum(count * mean, axis) / tl.maximum(size, 1)  # the last share may have nothing of a plane
        off = mean - (whole[:, None] if PLANES else whole[None, :])
        total = tl.sum(square + count * off * off, axis)
        if WHOLE:
            whole, total = _finish(whole, total, size, NORM, EPS, CORRECTION)
        else:
            tl.store(count_ptr + to, size, mask=mask)
        tl.store(first_ptr + to, whole, mask=mask)
        tl.store(second_ptr + to, total, mask=mask)


@triton.jit
def _merge_moments_kernel(
    first_part_ptr, second_part_ptr, count_ptr, first_ptr, second_ptr, SPLITS, CHANNELS,
    NORM: tl.constexpr, EPS: tl.constexpr, CORRECTION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < CHANNELS
    if NORM == "channels":
        square = tl.load(first_part_ptr + i, mask=mask, other=0)
        for split in range(1, SPLITS):
            square += tl.load(first_part_ptr + split * CHANNELS + i, mask=mask, other=0)
        norm, _ = _finish(square, square, 1, NORM, EPS, CORRECTION)
        tl.store(first_ptr + i, norm, mask=mask)
    else:
        mean = tl.load(first_part_ptr + i, mask=mask, other=0)
        square = tl.load(second_part_ptr + i, mask=mask, other=0)
        size = tl.load(count_ptr + i, mask=mask, other=1)
        for split in range(1, SPLITS):
            more = tl.load(count_ptr + split * CHANNELS + i, mask=mask, other=1)
            off = tl.load(first_part_ptr + split * CHANNELS + i, mask=mask, other=0) - mean
            share = more / (size + more)
            mean += off * share
            square += tl.load(second_part_ptr + split * CHANNELS + i, mask=mask, other=0) + off * off * size * share
            size += more
        first, second = _finish(mean, square, size, NORM, EPS, CORRECTION)
        tl.store(first_ptr + i, first, mask=mask)
        tl.store(second_ptr + i, second, mask=mask)


@triton.jit
def _hat(z, first, second, NORM: tl.constexpr, EPS: tl.constexpr):
    """ẑ; where there is no norm, z."""
    if NORM == "channels":
        return z / tl.where(first < EPS, EPS, first)
    elif NORM == "positions":
        return (z - first) * second
    else:
        return z


@triton.jit
def _kept(first_ptr, second_ptr, n, a, col, head, A, B, NORM: tl.constexpr, ACC: tl.constexpr, PLANES: tl.constexpr,
          V: tl.constexpr):  # fmt: skip
    """What forward kept, for every element of the owned vectors; 0 where there is none of it."""
    first = a * 0.0
    second = first
    if NORM != "none":
        first = tile.pick(tile.channel(first_ptr, n, a, col, A, B, ACC, PLANES), col, head, B, PLANES, V)
    if NORM == "positions":
        second = tile.pick(tile.channel(second_ptr, n, a, col, A, B, ACC, PLANES), col, head, B, PLANES, V)
    return first, second


@triton.jit
def _map_scale_kernel(
    x_ptr, z_ptr, first_ptr, second_ptr, y_ptr, A, B, x_sn, x_sr, z_sn, z_sr, y_sn, y_sr,
    NORM: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, V: tl.constexpr, BIG: tl.constexpr,
):  # fmt: skip
    n, a, col, head = tile.spot(A, B, PLANES, ROWS, COLS, V, BIG)
    mask = tile.owned(a, col, head, A, B, V)
    first, second = _kept(first_ptr, second_ptr, n, a, col, head, A, B, NORM, ACC, PLANES, V)
    x = tl.load(tile.at(x_ptr, n, a, col, x_sn, x_sr, V), mask=mask, other=0).to(ACC)
    z = tl.load(tile.at(z_ptr, n, a, col, z_sn, z_sr, V), mask=mask, other=0).to(ACC)
    f = _hat(z, first, second, NORM, EPS)
    if NORM != "channels":
        f = tile.sigmoid(f)
    y = (1 + f) * x
    tl.store(tile.at(y_ptr, n, a, col, y_sn, y_sr, V), y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _map_sums_kernel(
    x_ptr, z_ptr, dy_ptr, first_ptr, second_ptr, e_ptr, dot_ptr, A, B, STEPS, CHANNELS,
    x_sn, x_sr, z_sn, z_sr, dy_sn, dy_sr, NORM: tl.constexpr, EPS: tl.constexpr, ACC: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, V: tl.constexpr, BIG: tl.constexpr,
):  # fmt: skip
    n, block = tile.sample(tl.cdiv(A, ROWS) if PLANES else tl.cdiv(B, COLS))
    a, col, head = tile.place(block, block, A, B, PLANES, ROWS, COLS, V, BIG)
    first, _ = tile.channel(first_ptr, n, a, col, A, B, ACC, PLANES)
    second = first
    if NORM == "positions":
        second, _ = tile.channel(second_ptr, n, a, col, A, B, ACC, PLANES)
    e_sum, dot = tl.zeros((ROWS, COLS), ACC), tl.zeros((ROWS, COLS), ACC)
    begin, end = tile.share(A, B, STEPS, PLANES, ROWS, COLS, V)
    for step in range(begin, end):
        a, col, head = tile.place(
            block if PLANES else step, step if PLANES else block, A, B, PLANES, ROWS, COLS, V, BIG
        )
        read, inside = tile.touched(a, col, head, A, B, V), tile.inside(a, col, head, A, B)
        e = tl.load(tile.at(x_ptr, n, a, col, x_sn, x_sr, V), mask=read, other=0).to(ACC)
        e *= tl.load(tile.at(dy_ptr, n, a, col, dy_sn, dy_sr, V), mask=read, other=0).to(ACC)
        z = tl.load(tile.at(z_ptr, n, a, col, z_sn, z_sr, V), mask=read, other=0).to(ACC)
        hat = _hat(z, first, second, NORM, EPS)
        if NORM == "positions":
            f = tile.sigmoid(hat)
            e *= f * (1 - f)
            e_sum += tl.where(inside, e, 0)
        dot += tl.where(inside, e * hat, 0)
    axis: tl.constexpr = 1 if PLANES else 0
    to, mask = tile.channels(n, block, A, B, CHANNELS, PLANES, ROWS, COLS)
    if NORM == "positions":
        tl.store(e_ptr + to, tl.sum(e_sum, axis), mask=mask)
    tl.store(dot_ptr + to, tl.sum(dot, axis), mask=mask)


@triton.jit
def _map_scale_bwd_kernel(
    x_ptr, z_ptr, dy_ptr, first_ptr, second_ptr, e_ptr, dot_ptr, dx_ptr, dz_ptr, A, B,
    x_sn, x_sr, z_sn, z_sr, dy_sn, dy_sr, dx_sn, dx_sr, dz_sn, dz_sr,
    NORM: tl.constexpr, EPS: tl.constexpr, CORRECTION: tl.constexpr, ACC: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, V: tl.constexpr, BIG: tl.constexpr,
):  # fmt: skip
    n, a, col, head = tile.spot(A, B, PLANES, ROWS, COLS, V, BIG)
    mask = tile.owned(a, col, head, A, B, V)
    first, second = _kept(first_ptr, second_ptr, n, a, col, head, A, B, NORM, ACC, PLANES, V)
    x = tl.load(tile.at(x_ptr, n, a, col, x_sn, x_sr, V), mask=mask, other=0).to(ACC)
    z = tl.load(tile.at(z_ptr, n, a, col, z_sn, z_sr, V), mask=mask, other=0).to(ACC)
    dy = tl.load(tile.at(dy_ptr, n, a, col, dy_sn, dy_sr, V), mask=mask, other=0).to(ACC)
    hat = _hat(z, first, second, NORM, EPS)
    f = hat
    dz = dy * x
    if NORM != "channels":
        f = tile.sigmoid(hat)
        dz *= f * (1 - f)
    if NORM != "none":
        dot = tile.pick(tile.channel(dot_ptr, n, a, col, A, B, ACC, PLANES), col, head, B, PLANES, V)
        if NORM == "channels":
            dz = (dz - hat * tl.where(first < EPS, 0.0, dot)) / tl.where(first < EPS, EPS, first)
        else:
            size = B if PLANES else A
            less = tile.pick(tile.channel(e_ptr, n, a, col, A, B, ACC, PLANES), col, head, B, PLANES, V)
            dz = (dz - less / size - hat * (dot / (size - CORRECTION))) * second
    dx = dy * (1 + f)
    tl.store(tile.at(dx_ptr, n, a, col, dx_sn, dx_sr, V), dx.to(dx_ptr.dtype.element_ty), mask=mask)
    tl.store(tile.at(dz_ptr, n, a, col, dz_sn, dz_sr, V), dz.to(dz_ptr.dtype.element_ty), mask=mask)


def _turned(norm: str, *maps: Tensor) -> tuple[Tensor, ...]:
    """The maps with what is normalised together as positions: a view."""
    if norm != "channels":
        return maps
    return tuple(m.view(*m.shape[:2], m.shape[2:].numel()).transpose(1, 2) for m in maps)


def _parts(stats: Tensor, norm: str) -> tuple[Tensor | None, Tensor | None]:
    if norm == "none":
        return None, None
    return stats[0], stats[1] if norm == "positions" else None


def _moments(z: Tensor, stats: Tensor, norm: str, eps: float, correction: float) -> None:
    """Fills what forward keeps, in one read of z, which is turned."""
    w = tile.walk(
        z, z, sums=True
    )  # as for two maps: small tiles, because each element keeps three numbers in registers
    channels, outs = z.shape[0] * z.shape[1], _parts(stats, norm)
    count = None
    parts = outs
    if w.splits > 1:
        new = lambda o: None if o is None else o.new_empty((w.splits, channels))
        parts, count = (new(outs[0]), new(outs[1])), new(outs[1])
    how = dict(NORM=norm, EPS=eps, CORRECTION=correction)
    tile.launch(
        _moments_kernel, w.grid, z, z, *parts, count, w.a, w.b, w.steps, channels, *w.strides[0],
        WHOLE=w.splits == 1, **how, **w.meta,
    )  # fmt: skip
    if w.splits > 1:
        tile.launch(
            _merge_moments_kernel, (triton.cdiv(channels, 128),), z, *parts, count, *outs, w.splits, channels,
            BLOCK=128, num_warps=1, **how,
        )  # fmt: skip


def map_scale(x: Tensor, z: Tensor, norm: str, eps: float, correction: float) -> tuple[Tensor, Tensor]:
    y, acc = torch.empty_like(x), accumulator(x.dtype)
    shapes = {"none": (0,), "channels": (1, x.shape[0], x.shape[2:].numel()), "positions": (2, *x.shape[:2])}
    stats = torch.empty(shapes[norm], dtype=acc, device=x.device)
    from_, logits, to = _turned(norm, x, z, y)
    if norm != "none":
        _moments(logits, stats, norm, eps, correction)
    w = tile.walk(from_, logits, to)
    strides = [step for pair in w.strides for step in pair]
    tile.launch(
        _map_scale_kernel, w.grid, x, from_, logits, *_parts(stats, norm), to, w.a, w.b, *strides,
        NORM=norm, EPS=eps, **w.meta,
    )  # fmt: skip
    return y, stats


def map_scale_bwd(
    x: Tensor, z: Tensor, stats: Tensor, dy: Tensor, norm: str, eps: float, correction: float
) -> tuple[Tensor, Tensor]:
    dx, dz = torch.empty_like(x), torch.empty_like(x)
    maps = _turned(norm, x, z, dy, dx, dz)
    kept = _parts(stats.contiguous(), norm)
    e_sum = dot = None
    if norm != "none":
        w = tile.walk(*maps[:3], sums=True)
        dot = kept[0].new_empty(maps[0].shape[:2])  # type: ignore[union-attr]
        e_sum = torch.empty_like(dot) if norm == "positions" else None
        parts = [o if o is None or w.splits == 1 else o.new_empty((w.splits, *o.shape)) for o in (e_sum, dot)]
        strides = [step for pair in w.strides for step in pair]
        tile.launch(
            _map_sums_kernel, w.grid, x, *maps[:3], *kept, *parts, w.a, w.b, w.steps, dot.numel(), *strides,
            NORM=norm, EPS=eps, **w.meta,
        )  # fmt: skip
        if w.splits > 1:
            for part, out in zip(parts, (e_sum, dot), strict=True):
                if part is not None and out is not None:
                    merge_sums(part, out)
    w = tile.walk(*maps)
    strides = [step for pair in w.strides for step in pair]
    tile.launch(
        _map_scale_bwd_kernel, w.grid, x, *maps[:3], *kept, e_sum, dot, *maps[3:], w.a, w.b, *strides,
        NORM=norm, EPS=eps, CORRECTION=correction, **w.meta,
    )  # fmt: skip
    return dx, dz


__all__ = ["map_scale", "map_scale_bwd"]
