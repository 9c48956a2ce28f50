"""Triton kernel of the last half of the backward of what an affine map by a plane's own moments made.

e = (gate·dy + spread)·act'(v),   dx = scale·e + tilt·(x − centre) + level, and dvalues at their places
                                                                                         reads dy (x), writes dx
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tile
from . import affine_kernels
from .moments_affine_apply import reads_x


@triton.jit
def _moments_affine_apply_kernel(
    x_ptr, dy_ptr, scale_ptr, shift_ptr, centre_ptr, gate_ptr, spread_ptr, tilt_ptr, level_ptr, largest_ptr,
    smallest_ptr, most_ptr, least_ptr, dx_ptr, A, B, STEPS, x_sn, x_sr, dy_sn, dy_sr, dx_sn, dx_sr,
    ACT: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, V: tl.constexpr, BIG: tl.constexpr,
):  # fmt: skip
    n, block, a, col = affine_kernels.start(A, B, PLANES, ROWS, COLS, V, BIG)
    scales = affine_kernels.values(scale_ptr, n, a, col, A, B, 1, ACC, PLANES)
    shifts = affine_kernels.values(shift_ptr, n, a, col, A, B, 0, ACC, PLANES)
    centres = affine_kernels.values(centre_ptr, n, a, col, A, B, 0, ACC, PLANES)
    gates = affine_kernels.values(gate_ptr, n, a, col, A, B, 1, ACC, PLANES)
    spreads = affine_kernels.values(spread_ptr, n, a, col, A, B, 0, ACC, PLANES)
    tilts = affine_kernels.values(tilt_ptr, n, a, col, A, B, 0, ACC, PLANES)
    levels = affine_kernels.values(level_ptr, n, a, col, A, B, 0, ACC, PLANES)
    first, last = tile.share(A, B, STEPS, PLANES, ROWS, COLS, V)
    for step in range(first, last):
        a, col, head = affine_kernels.place(block, step, A, B, PLANES, ROWS, COLS, V, BIG)
        mask = tile.owned(a, col, head, A, B, V)
        dx = tl.zeros((ROWS, COLS), ACC)
        t = dx
        if x_ptr is not None:
            x = tl.load(tile.at(x_ptr, n, a, col, x_sn, x_sr, V), mask=mask, other=0).to(ACC)
            t = x - tile.pick(centres, col, head, B, PLANES, V)
        if dy_ptr is not None or spread_ptr is not None:
            e = dx
            if dy_ptr is not None:
                e = tl.load(tile.at(dy_ptr, n, a, col, dy_sn, dy_sr, V), mask=mask, other=0).to(ACC)
                e *= tile.pick(gates, col, head, B, PLANES, V)
            if spread_ptr is not None:
                e += tile.pick(spreads, col, head, B, PLANES, V)
            scale = tile.pick(scales, col, head, B, PLANES, V)
            if ACT != "identity":
                v = scale * t + tile.pick(shifts, col, head, B, PLANES, V)
                e = tile.cut(e, tile.derivative(v, ACT, SLOPE, None))
            dx = scale * e
        if tilt_ptr is not None:
            dx += tile.pick(tilts, col, head, B, PLANES, V) * t
        if level_ptr is not None:
            dx += tile.pick(levels, col, head, B, PLANES, V)
        if largest_ptr is not None:
            # Loaded here and not before the loop: held through it, they would be the registers of a third map.
            where: tl.constexpr = tl.int64 if BIG else tl.int32
            spot = a
            if PLANES:
                spot = tl.where(col < head + B, col - head, col - head - B)
            most = tile.pick(tile.channel(most_ptr, n, a, col, A, B, where, PLANES), col, head, B, PLANES, V)
            largest = tile.pick(tile.channel(largest_ptr, n, a, col, A, B, ACC, PLANES), col, head, B, PLANES, V)
            dx += tl.where(spot == most, largest, 0)
            least = tile.pick(tile.channel(least_ptr, n, a, col, A, B, where, PLANES), col, head, B, PLANES, V)
            smallest = tile.pick(tile.channel(smallest_ptr, n, a, col, A, B, ACC, PLANES), col, head, B, PLANES, V)
            dx += tl.where(spot == least, smallest, 0)
        tl.store(tile.at(dx_ptr, n, a, col, dx_sn, dx_sr, V), dx.to(dx_ptr.dtype.element_ty), mask=mask)


def moments_affine_apply(
    x: Tensor, dy: Tensor | None, scale: Tensor | None, shift: Tensor | None, centre: Tensor | None,
    gate: Tensor | None, spread: Tensor | None, tilt: Tensor | None, level: Tensor | None, dvalues: Tensor | None,
    index: Tensor | None, act: str, slope: float,
) -> Tensor:  # fmt: skip
    dx = torch.empty_like(x)
    if not x.numel():
        return dx
    read = x if reads_x(tilt, dy, spread, act) else None
    w = affine_kernels.walk(dx, read, dy)
    strides = [*w.strides[1], *w.strides[2], *w.strides[0]]
    dense = affine_kernels.dense
    ends: list[Tensor | None] = [None] * 4
    if dvalues is not None:
        assert index is not None
        ends = [*dvalues.contiguous().unbind(), *index.contiguous().unbind()]
    tile.launch(
        _moments_affine_apply_kernel, w.grid, x, read, dy, dense(scale), dense(shift), dense(centre), dense(gate),
        dense(spread), dense(tilt), dense(level), *ends, dx, w.a, w.b, w.steps, *strides,
        ACT=act, SLOPE=slope, **w.meta,
    )  # fmt: skip
    return dx


__all__ = ["moments_affine_apply"]
