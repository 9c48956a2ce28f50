"""Triton kernels of the two halves of `pool_soft_threshold`'s backward.

reduce  dτ = −Σ_s e, e = dy·sign(x)·[|x| > τ]                     reads x, dy              soft_threshold_triton's pass
apply   dx = e·sign(x) + dm/S, times sign(x) for a mean of |x|    reads x, dy, writes dx
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tile
from .soft_threshold_triton import passed, sign_of, threshold_sums


@triton.jit
def _pool_soft_threshold_apply_kernel(
    x_ptr, dy_ptr, tau_ptr, dmean_ptr, dx_ptr, A, B, x_sn, x_sr, dy_sn, dy_sr, dx_sn, dx_sr, ABS: tl.constexpr,
    ACC: tl.constexpr, PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, V: tl.constexpr, BIG: tl.constexpr,
):  # fmt: skip
    n, a, col, head = tile.spot(A, B, PLANES, ROWS, COLS, V, BIG)
    mask = tile.owned(a, col, head, A, B, V)
    tau = tile.pick(tile.channel(tau_ptr, n, a, col, A, B, ACC, PLANES), col, head, B, PLANES, V)
    dmean = tile.pick(tile.channel(dmean_ptr, n, a, col, A, B, ACC, PLANES), col, head, B, PLANES, V)
    dmean = dmean / (B if PLANES else A)
    x = tl.load(tile.at(x_ptr, n, a, col, x_sn, x_sr, V), mask=mask, other=0).to(ACC)
    dy = tl.load(tile.at(dy_ptr, n, a, col, dy_sn, dy_sr, V), mask=mask, other=0).to(ACC)
    e, sign = passed(dy, x, tau), sign_of(x)
    if ABS:
        dx = (e + dmean) * sign
    else:
        dx = e * sign + dmean
    tl.store(tile.at(dx_ptr, n, a, col, dx_sn, dx_sr, V), dx.to(dx_ptr.dtype.element_ty), mask=mask)


def pool_soft_threshold_reduce(x: Tensor, tau: Tensor, dy: Tensor) -> Tensor:
    return threshold_sums(x, dy, tau, None)


def pool_soft_threshold_apply(x: Tensor, tau: Tensor, dy: Tensor, dpooled: Tensor, pool: str) -> Tensor:
    dx = torch.empty_like(x)
    w = tile.walk(x, dy, dx)
    strides = [step for pair in w.strides for step in pair]
    tile.launch(
        _pool_soft_threshold_apply_kernel, w.grid, x, x, dy, tau.contiguous(), dpooled.contiguous(), dx,
        w.a, w.b, *strides, ABS=pool == "mean_abs", **w.meta,
    )  # fmt: skip
    return dx
