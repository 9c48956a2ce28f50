"""Triton kernels of a gate behind a normalisation and an activation.

    pool    p = mean_s act(v)                                        reads x
    reduce  Σ dy·u, Σ dy·d, Σ d, Σ dy·d·t, Σ d·t                     reads x, dy

with v = scale·t + shift, t = x − centre, u = act(v), d = act'(v). The lanes of a sum hold elements of one channel each,
so that a channel's values stay in registers while its pixels pass.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl
from torch import Tensor

from .. import tile
from ..layout import accumulator
from . import affine_kernels


@triton.jit
def _affine_pool_kernel(
    x_ptr, scale_ptr, shift_ptr, centre_ptr, p_ptr, A, B, STEPS, CHANNELS, SIZE, x_sn, x_sr,
    ACT: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, V: tl.constexpr, BIG: tl.constexpr,
):  # fmt: skip
    n, block, a, col = affine_kernels.start(A, B, PLANES, ROWS, COLS, V, BIG)
    scale, _ = affine_kernels.values(scale_ptr, n, a, col, A, B, 1, ACC, PLANES)
    shift, _ = affine_kernels.values(shift_ptr, n, a, col, A, B, 0, ACC, PLANES)
    centre, _ = affine_kernels.values(centre_ptr, n, a, col, A, B, 0, ACC, PLANES)
    total = tl.zeros((ROWS, COLS), ACC)
    first, last = tile.share(A, B, STEPS, PLANES, ROWS, COLS, V)
    for step in range(first, last):
        a, col, head = affine_kernels.place(block, step, A, B, PLANES, ROWS, COLS, V, BIG)
        read, inside = tile.touched(a, col, head, A, B, V), tile.inside(a, col, head, A, B)
        x = tl.load(tile.at(x_ptr, n, a, col, x_sn, x_sr, V), mask=read, other=0).to(ACC)
        total += tl.where(inside, tile.activate(scale * (x - centre) + shift, ACT, SLOPE, None), 0)
    to, mask = tile.channels(n, block, A, B, CHANNELS, PLANES, ROWS, COLS)
    # Each part is divided: their sum is the mean, and nothing is left to do after it.
    tl.store(p_ptr + to, tl.sum(total, 1 if PLANES else 0) / SIZE, mask=mask)


@triton.jit
def _affine_pool_scale_reduce_kernel(
    x_ptr, dy_ptr, scale_ptr, shift_ptr, centre_ptr, sums_ptr, A, B, STEPS, CHANNELS, x_sn, x_sr, dy_sn, dy_sr,
    ACT: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, V: tl.constexpr, BIG: tl.constexpr,
):  # fmt: skip
    n, block, a, col = affine_kernels.start(A, B, PLANES, ROWS, COLS, V, BIG)
    scale, _ = affine_kernels.values(scale_ptr, n, a, col, A, B, 1, ACC, PLANES)
    shift, _ = affine_kernels.values(shift_ptr, n, a, col, A, B, 0, ACC, PLANES)
    centre, _ = affine_kernels.values(centre_ptr, n, a, col, A, B, 0, ACC, PLANES)
    dyu, dyd, dd = tl.zeros((ROWS, COLS), ACC), tl.zeros((ROWS, COLS), ACC), tl.zeros((ROWS, COLS), ACC)
    dydt, dt = tl.zeros((ROWS, COLS), ACC), tl.zeros((ROWS, COLS), ACC)
    first, last = tile.share(A, B, STEPS, PLANES, ROWS, COLS, V)
    for step in range(first, last):
        a, col, head = affine_kernels.place(block, step, A, B, PLANES, ROWS, COLS, V, BIG)
        read, inside = tile.touched(a, col, head, A, B, V), tile.inside(a, col, head, A, B)
        x = tl.load(tile.at(x_ptr, n, a, col, x_sn, x_sr, V), mask=read, other=0).to(ACC)
        g = tl.load(tile.at(dy_ptr, n, a, col, dy_sn, dy_sr, V), mask=read, other=0).to(ACC)
        t = x - centre
        u, d = affine_kernels.value_and_derivative(scale * t + shift, ACT, SLOPE)
        gd = tile.cut(g, d)
        dyu += tl.where(inside, g * u, 0)
        dyd += tl.where(inside, gd, 0)
        dd += tl.where(inside, d, 0)
        dydt += tl.where(inside, gd * t, 0)
        dt += tl.where(inside, tile.cut(t, d), 0)
    axis: tl.constexpr = 1 if PLANES else 0
    to, mask = tile.channels(n, block, A, B, 5 * CHANNELS, PLANES, ROWS, COLS)
    tl.store(sums_ptr + to, tl.sum(dyu, axis), mask=mask)
    tl.store(sums_ptr + CHANNELS + to, tl.sum(dyd, axis), mask=mask)
    tl.store(sums_ptr + 2 * CHANNELS + to, tl.sum(dd, axis), mask=mask)
    tl.store(sums_ptr + 3 * CHANNELS + to, tl.sum(dydt, axis), mask=mask)
    tl.store(sums_ptr + 4 * CHANNELS + to, tl.sum(dt, axis), mask=mask)


def affine_pool(x: Tensor, scale: Tensor, shift: Tensor, centre: Tensor | None, act: str, slope: float) -> Tensor:
    if not x.numel():
        return x.new_zeros(x.shape[:2], dtype=accumulator(x.dtype))
    w = tile.walk(x, sums=True)
    out, part = affine_kernels.parts(x, 1, w)
    dense = affine_kernels.dense
    tile.launch(
        _affine_pool_kernel, w.grid, x, x, dense(scale), dense(shift), dense(centre), part,
        w.a, w.b, w.steps, x.shape[0] * x.shape[1], w.b if w.planes else w.a, *w.strides[0],
        ACT=act, SLOPE=slope, **w.meta,
    )  # fmt: skip
    return affine_kernels.merged(out, part)[0]


def affine_pool_scale_reduce(
    x: Tensor, dy: Tensor, scale: Tensor, shift: Tensor, centre: Tensor | None, act: str, slope: float
) -> Tensor:
    if not x.numel():
        return x.new_zeros((5, *x.shape[:2]), dtype=accumulator(x.dtype))
    w = tile.walk(x, dy, sums=True)
    out, part = affine_kernels.parts(x, 5, w)
    dense = affine_kernels.dense
    tile.launch(
        _affine_pool_scale_reduce_kernel, w.grid, x, x, dy, dense(scale), dense(shift), dense(centre), part,
        w.a, w.b, w.steps, x.shape[0] * x.shape[1], *affine_kernels.flat(w), ACT=act, SLOPE=slope, **w.meta,
    )  # fmt: skip
    return affine_kernels.merged(out, part)


__all__ = ["affine_pool", "affine_pool_scale_reduce"]
