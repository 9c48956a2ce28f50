"""Triton kernels of soft-thresholding.

    forward   y = sign(x)·max(|x| − τ, 0) + residual                             reads x (residual), writes y
    backward  e = dy·sign(x)·[|x| > τ], dτ = −Σ_s e, dx = e·sign(x)              reads x, dy, writes dx

The backward kernel without dx is the first half of `pool_soft_threshold`'s.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tile
from ..layout import accumulator
from .scale_triton import merge_sums
from .soft_threshold import like_threshold, per_channel


@triton.jit
def sign_of(x):
    """0 at NaN, as torch.sign."""
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def passed(dy, x, tau):
    """e = dy·sign(x)·[|x| > τ] on a tile; a comparison that NaN passes."""
    return tl.where(tl.abs(x) - tau <= 0, 0.0, dy * sign_of(x))


@triton.jit
def _soft_threshold_kernel(
    x_ptr, tau_ptr, residual_ptr, y_ptr, A, B, x_sn, x_sr, residual_sn, residual_sr, y_sn, y_sr,
    ACC: tl.constexpr, PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, V: tl.constexpr, BIG: tl.constexpr,
):  # fmt: skip
    n, a, col, head = tile.spot(A, B, PLANES, ROWS, COLS, V, BIG)
    mask = tile.owned(a, col, head, A, B, V)
    tau = tile.pick(tile.channel(tau_ptr, n, a, col, A, B, ACC, PLANES), col, head, B, PLANES, V)
    x = tl.load(tile.at(x_ptr, n, a, col, x_sn, x_sr, V), mask=mask, other=0).to(ACC)
    over = tl.abs(x) - tau
    y = sign_of(x) * tl.where(over <= 0, 0.0, over)
    if residual_ptr is not None:
        y += tl.load(tile.at(residual_ptr, n, a, col, residual_sn, residual_sr, V), mask=mask, other=0).to(ACC)
    tl.store(tile.at(y_ptr, n, a, col, y_sn, y_sr, V), y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _soft_threshold_bwd_kernel(
    x_ptr, dy_ptr, tau_ptr, dtau_ptr, dx_ptr, A, B, STEPS, CHANNELS, x_sn, x_sr, dy_sn, dy_sr, dx_sn, dx_sr,
    ACC: tl.constexpr, PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, V: tl.constexpr, BIG: tl.constexpr,
):  # fmt: skip
    n, block = tile.sample(tl.cdiv(A, ROWS) if PLANES else tl.cdiv(B, COLS))
    a, col, head = tile.place(block, block, A, B, PLANES, ROWS, COLS, V, BIG)
    thresholds = tile.channel(tau_ptr, n, a, col, A, B, ACC, PLANES)
    total = tl.zeros((ROWS, COLS), ACC)
    first, last = tile.share(A, B, STEPS, PLANES, ROWS, COLS, V)
    for step in range(first, last):
        a, col, head = tile.place(
            block if PLANES else step, step if PLANES else block, A, B, PLANES, ROWS, COLS, V, BIG
        )
        read = tile.touched(a, col, head, A, B, V)
        x = tl.load(tile.at(x_ptr, n, a, col, x_sn, x_sr, V), mask=read, other=0).to(ACC)
        dy = tl.load(tile.at(dy_ptr, n, a, col, dy_sn, dy_sr, V), mask=read, other=0).to(ACC)
        e = passed(dy, x, tile.pick(thresholds, col, head, B, PLANES, V))
        total -= tl.where(tile.inside(a, col, head, A, B), e, 0)
        if dx_ptr is not None:
            dx = (e * sign_of(x)).to(dx_ptr.dtype.element_ty)
            tl.store(tile.at(dx_ptr, n, a, col, dx_sn, dx_sr, V), dx, mask=tile.owned(a, col, head, A, B, V))
    to, mask = tile.channels(n, block, A, B, CHANNELS, PLANES, ROWS, COLS)
    tl.store(dtau_ptr + to, tl.sum(total, 1 if PLANES else 0).to(dtau_ptr.dtype.element_ty), mask=mask)


def threshold_sums(x: Tensor, dy: Tensor, tau: Tensor, dx: Tensor | None) -> Tensor:
    """dtau (N, C) in the accumulation dtype, from tau (N, C); fills dx."""
    w = tile.walk(x, dy, dx, sums=True)
    out = torch.empty(x.shape[:2], dtype=accumulator(x.dtype), device=x.device)
    part = out if w.splits == 1 else out.new_empty((w.splits, *out.shape))
    strides = [step for pair in w.strides for step in pair]
    tile.launch(
        _soft_threshold_bwd_kernel, w.grid, x, x, dy, tau.contiguous(), part, dx,
        w.a, w.b, w.steps, out.numel(), *strides, **w.meta,
    )  # fmt: skip
    if w.splits > 1:
        merge_sums(part, out)
    return out


def soft_threshold(x: Tensor, tau: Tensor, residual: Tensor | None) -> Tensor:
    y = torch.empty_like(x)
    w = tile.walk(x, residual, y)
    strides = [step for pair in w.strides for step in pair]
    thresholds = per_channel(tau, x).contiguous()
    tile.launch(_soft_threshold_kernel, w.grid, x, x, thresholds, residual, y, w.a, w.b, *strides, **w.meta)
    return y


def soft_threshold_bwd(x: Tensor, tau: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x)
    return dx, like_threshold(threshold_sums(x, dy, per_channel(tau, x), dx), tau)
