"""Triton kernels of an affine map per sample and channel.

forward   y = gate·act(scale·(x − centre) + shift + residual)                      reads x (residual), writes y
backward  e = gate·dy·act'(v), dx = scale·e, Σ e·(x − centre), Σ e, Σ dy·act(v)    reads x, dy (aux), writes dx (e)
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tile
from . import affine_kernels


@triton.jit
def _affine_apply_kernel(
    x_ptr, scale_ptr, shift_ptr, centre_ptr, gate_ptr, residual_ptr, y_ptr, A, B, STEPS,
    x_sn, x_sr, residual_sn, residual_sr, y_sn, y_sr, ACT: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, V: tl.constexpr, BIG: tl.constexpr,
):  # fmt: skip
    n, block, a, col = affine_kernels.start(A, B, PLANES, ROWS, COLS, V, BIG)
    scales = affine_kernels.values(scale_ptr, n, a, col, A, B, 1, ACC, PLANES)
    shifts = affine_kernels.values(shift_ptr, n, a, col, A, B, 0, ACC, PLANES)
    centres = affine_kernels.values(centre_ptr, n, a, col, A, B, 0, ACC, PLANES)
    gates = affine_kernels.values(gate_ptr, n, a, col, A, B, 1, ACC, PLANES)
    first, last = tile.share(A, B, STEPS, PLANES, ROWS, COLS, V)
    for step in range(first, last):
        a, col, head = affine_kernels.place(block, step, A, B, PLANES, ROWS, COLS, V, BIG)
        mask = tile.owned(a, col, head, A, B, V)
        x = tl.load(tile.at(x_ptr, n, a, col, x_sn, x_sr, V), mask=mask, other=0).to(ACC)
        t = x - tile.pick(centres, col, head, B, PLANES, V)
        v = tile.pick(scales, col, head, B, PLANES, V) * t + tile.pick(shifts, col, head, B, PLANES, V)
        if residual_ptr is not None:
            v += tl.load(tile.at(residual_ptr, n, a, col, residual_sn, residual_sr, V), mask=mask, other=0).to(ACC)
        y = tile.activate(v, ACT, SLOPE, None) * tile.pick(gates, col, head, B, PLANES, V)
        tl.store(tile.at(y_ptr, n, a, col, y_sn, y_sr, V), y.to(y_ptr.dtype.element_ty), mask=mask)


def fill(
    x: Tensor, scale: Tensor, shift: Tensor, centre: Tensor | None, residual: Tensor | None, gate: Tensor | None,
    y: Tensor, act: str, slope: float,
) -> None:  # fmt: skip
    """Writes y, which may be channels of a larger map."""
    if not x.numel():
        return
    w = affine_kernels.walk(x, residual, y)
    dense = affine_kernels.dense
    tile.launch(
        _affine_apply_kernel, w.grid, x, x, dense(scale), dense(shift), dense(centre), dense(gate), residual, y,
        w.a, w.b, w.steps, *affine_kernels.flat(w), ACT=act, SLOPE=slope, **w.meta,
    )  # fmt: skip


def affine_apply(
    x: Tensor, scale: Tensor, shift: Tensor, centre: Tensor | None, residual: Tensor | None, gate: Tensor | None,
    act: str, slope: float,
) -> Tensor:  # fmt: skip
    y = torch.empty_like(x)
    fill(x, scale, shift, centre, residual, gate, y, act, slope)
    return y


def affine_apply_bwd(
    x: Tensor, dy: Tensor, scale: Tensor, shift: Tensor, centre: Tensor | None, aux: Tensor | None,
    gate: Tensor | None, act: str, slope: float, residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx = torch.empty_like(x)
    e = torch.empty_like(x) if residual and act != "identity" else None
    sums = affine_kernels.sums(x, dy, scale, shift, centre, aux, gate, act, slope, dx, e)
    return dx, sums, x.new_empty((0,)) if e is None else e


__all__ = ["affine_apply", "affine_apply_bwd", "fill"]
