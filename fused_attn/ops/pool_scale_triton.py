"""Triton kernels of the two halves of a backward around an excite.

reduce  e = dy·act'(v), dgate = Σ_s e·x, count of the maxima      reads x, dy (aux), writes (e)      scale_triton's pass
apply   dx = e·act'(x·gate)·gate + pool'(x)·dpooled               reads e (x), writes dx
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tile
from ..layout import accumulator
from .channel_pool import has_max, is_pair
from .pool_scale import keeps_e, reads_x
from .scale_triton import backward_sums, epilogue_gradient


@triton.jit
def _pool_scale_apply_kernel(
    x_ptr, e_ptr, gate_ptr, dmean_ptr, dvar_ptr, dmax_ptr, maxima_ptr, count_ptr, index_ptr, dx_ptr, A, B,
    x_sn, x_sr, e_sn, e_sr, dx_sn, dx_sr, ABS: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, V: tl.constexpr, BIG: tl.constexpr,
):  # fmt: skip
    n, a, col, head = tile.spot(A, B, PLANES, ROWS, COLS, V, BIG)
    mask = tile.owned(a, col, head, A, B, V)
    dx = tl.zeros((ROWS, COLS), ACC)
    x = dx
    if x_ptr is not None:
        x = tl.load(tile.at(x_ptr, n, a, col, x_sn, x_sr, V), mask=mask, other=0).to(ACC)
    if e_ptr is not None:
        gate = tile.pick(tile.channel(gate_ptr, n, a, col, A, B, ACC, PLANES), col, head, B, PLANES, V)
        e = tl.load(tile.at(e_ptr, n, a, col, e_sn, e_sr, V), mask=mask, other=0).to(ACC)
        dx = epilogue_gradient(e, x, gate, None, ACT, SLOPE, False) * gate
    if dmean_ptr is not None:
        dmean = tile.pick(tile.channel(dmean_ptr, n, a, col, A, B, ACC, PLANES), col, head, B, PLANES, V)
        dmean = dmean / (B if PLANES else A)
        if ABS:
            dmean *= (x > 0).to(ACC) - (x < 0).to(ACC)
        dx += dmean
    if dvar_ptr is not None:
        mean = tile.pick(tile.channel(maxima_ptr, n, a, col, A, B, ACC, PLANES), col, head, B, PLANES, V)
        dvar = tile.pick(tile.channel(dvar_ptr, n, a, col, A, B, ACC, PLANES), col, head, B, PLANES, V)
        dx += (x - mean) * (2 * dvar / (B if PLANES else A))
    if dmax_ptr is not None:
        dmax = tile.pick(tile.channel(dmax_ptr, n, a, col, A, B, ACC, PLANES), col, head, B, PLANES, V)
        if index_ptr is not None:
            index = tile.pick(tile.channel(index_ptr, n, a, col, A, B, tl.int64, PLANES), col, head, B, PLANES, V)
            place = a
            if PLANES:
                place = tl.where(col < head + B, col - head, col - head - B)
            dx += tl.where(place == index, dmax, 0)
        else:
            maxima = tile.pick(tile.channel(maxima_ptr, n, a, col, A, B, ACC, PLANES), col, head, B, PLANES, V)
            count = tile.pick(tile.channel(count_ptr, n, a, col, A, B, ACC, PLANES), col, head, B, PLANES, V)
            # A product and not a choice: where the maximum is NaN nothing equals it, and 0·(dmax/0) says so.
            dx += (x == maxima).to(ACC) * (dmax / count)
    tl.store(tile.at(dx_ptr, n, a, col, dx_sn, dx_sr, V), dx.to(dx_ptr.dtype.element_ty), mask=mask)


def launch_apply(
    x: Tensor, e: Tensor | None, gate: Tensor | None, dpooled: Tensor, maxima: Tensor, index: Tensor,
    count: Tensor | None, act: str, slope: float, pool: str, ties: str,
) -> Tensor:  # fmt: skip
    """dx; without e, the pooling's part alone."""
    dx = torch.empty_like(x)
    dpooled = dpooled.contiguous()
    dmean, dmax = (dpooled[0], dpooled[1]) if is_pair(pool) else (dpooled, dpooled)
    split, first = has_max(pool) and ties == "split", has_max(pool) and ties == "first"
    read = x if reads_x(act, pool, ties) else None
    w = tile.walk(dx, read, e)
    strides = [*w.strides[1], *w.strides[2], *w.strides[0]]
    tile.launch(
        _pool_scale_apply_kernel, w.grid, x, read, e, gate if gate is None else gate.contiguous(),
        None if pool == "max" else dmean, dmax if pool == "mean_var" else None, dmax if has_max(pool) else None,
        maxima.contiguous() if split or pool == "mean_var" else None, count if split else None,
        index.contiguous() if first else None,
        dx, w.a, w.b, *strides, ABS=pool == "mean_abs", ACT=act, SLOPE=slope, **w.meta,
    )  # fmt: skip
    return dx


def pool_scale_reduce(
    x: Tensor, dy: Tensor, gate: Tensor, aux: Tensor | None, values: Tensor,
    act: str, slope: float, pool: str, ties: str, residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    e = torch.empty_like(x) if keeps_e(act, residual) else None
    maxima = values.contiguous() if has_max(pool) and ties == "split" else None
    dgate, count = backward_sums(x, dy, gate, aux, maxima, accumulator(x.dtype), act, slope, e)
    return dgate, x.new_empty((0,)) if e is None else e, count


def pool_scale_apply(
    x: Tensor, e: Tensor, gate: Tensor, dpooled: Tensor, values: Tensor, index: Tensor, count: Tensor,
    act: str, slope: float, pool: str, ties: str,
) -> Tensor:  # fmt: skip
    return launch_apply(x, e, gate, dpooled, values, index, count, act, slope, pool, ties)
