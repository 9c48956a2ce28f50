"""Triton kernels of a channel gate by a convolution over the channels: pool and scale are other ops' kernels.

u = b + Σ_h Σ_t w[h, t]·v[h, c + t − k//2]              one program per sample and block of channels
backward: dp, and what the block adds to the gradients of the weights, which are summed over blocks in order
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tile
from ..layout import accumulator
from .channel_pool_triton import pool_into
from .pool_scale import keeps_e
from .pool_scale_triton import pool_scale_apply, pool_scale_reduce
from .scale_triton import scale

_BLOCK = 128


@triton.jit
def _neighbour(c, C, offset, CIRCULAR: tl.constexpr):
    """Which channel lies `offset` from c, and whether there is one."""
    at = c + offset
    if CIRCULAR:
        at = tl.where(at < 0, at + C, tl.where(at >= C, at - C, at))
    return at, (at >= 0) & (at < C)


@triton.jit
def _value(p_ptr, at, inside, w1_ptr, b1_ptr, h, ACC: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr):
    """p, z and v of one hidden channel; zeros beyond the ends."""
    p = tl.load(p_ptr + at, mask=inside, other=0)
    z = p
    if w1_ptr is not None:
        z = p * tl.load(w1_ptr + h).to(ACC)
        if b1_ptr is not None:
            z += tl.load(b1_ptr + h).to(ACC)
    return p, z, tl.where(inside, tile.activate(z, ACT, SLOPE, None), 0)


@triton.jit
def _channel_conv_fwd_kernel(
    p_ptr, w_ptr, bias_ptr, w1_ptr, b1_ptr, u_ptr, gate_ptr, C, H, K: tl.constexpr, CIRCULAR: tl.constexpr,
    ACT: tl.constexpr, SLOPE: tl.constexpr, GATE: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    u = tl.zeros((BLOCK,), ACC)
    for h in range(H):
        for t in tl.static_range(K):
            at, inside = _neighbour(c, C, t - K // 2, CIRCULAR)
            _, _, v = _value(p_ptr + n * C, at, inside & (c < C), w1_ptr, b1_ptr, h, ACC, ACT, SLOPE)
            u += v * tl.load(w_ptr + h * K + t).to(ACC)
    if bias_ptr is not None:
        u += tl.load(bias_ptr).to(ACC)
    tl.store(u_ptr + n * C + c, u, mask=c < C)
    tl.store(gate_ptr + n * C + c, tile.activate(u, GATE, 0.0, None), mask=c < C)


@triton.jit
def _logit_gradient(u_ptr, dgate_ptr, at, inside, GATE: tl.constexpr):
    u = tl.load(u_ptr + at, mask=inside, other=0)
    return tl.where(inside, tl.load(dgate_ptr + at, mask=inside, other=0) * tile.derivative(u, GATE, 0.0, None), 0)


@triton.jit
def _channel_conv_bwd_kernel(
    p_ptr, u_ptr, dgate_ptr, w_ptr, w1_ptr, b1_ptr, dp_ptr, parts_ptr, C, H, SIZE, K: tl.constexpr,
    CIRCULAR: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr, GATE: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = c < C
    p_ptr += n * C
    u_ptr += n * C
    dgate_ptr += n * C
    parts_ptr += (n * tl.num_programs(1) + tl.program_id(1)) * SIZE  # dw (H, K), dw1 (H), db1 (H), dbias
    du = _logit_gradient(u_ptr, dgate_ptr, c, live, GATE)
    tl.store(parts_ptr + H * (K + 2), tl.sum(du, 0))
    dp = tl.zeros((BLOCK,), ACC)
    for h in range(H):
        dv = tl.zeros((BLOCK,), ACC)
        for t in tl.static_range(K):
            at, inside = _neighbour(c, C, t - K // 2, CIRCULAR)
            _, _, v = _value(p_ptr, at, inside & live, w1_ptr, b1_ptr, h, ACC, ACT, SLOPE)
            tl.store(parts_ptr + h * K + t, tl.sum(du * v, 0))
            back, there = _neighbour(c, C, K // 2 - t, CIRCULAR)
            dv += _logit_gradient(u_ptr, dgate_ptr, back, there & live, GATE) * tl.load(w_ptr + h * K + t).to(ACC)
        if w1_ptr is not None:
            p, z, _ = _value(p_ptr, c, live, w1_ptr, b1_ptr, h, ACC, ACT, SLOPE)
            dz = tl.where(live, dv * tile.derivative(z, ACT, SLOPE, None), 0)
            tl.store(parts_ptr + H * K + h, tl.sum(dz * p, 0))
            tl.store(parts_ptr + H * K + H + h, tl.sum(dz, 0))
            dv = dz * tl.load(w1_ptr + h).to(ACC)
        dp += dv
    tl.store(dp_ptr + c + n * C, dp, mask=live)


@triton.jit
def _sum_parts_kernel(
    parts_ptr, dw_ptr, dw1_ptr, db1_ptr, dbias_ptr, ROWS, H, SIZE, K: tl.constexpr, TALL: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * WIDE + tl.arange(0, WIDE)
    rows = tl.arange(0, TALL)
    totals = tl.zeros((TALL, WIDE), parts_ptr.dtype.element_ty)
    for start in range(0, ROWS, TALL):
        row = start + rows
        at = row.to(tl.int64)[:, None] * SIZE + i[None, :]
        totals += tl.load(parts_ptr + at, mask=(row < ROWS)[:, None] & (i < SIZE)[None, :], other=0)
    total = tl.sum(totals, 0)
    tl.store(dw_ptr + i, total.to(dw_ptr.dtype.element_ty), mask=i < H * K)
    if dw1_ptr is not None:
        tl.store(dw1_ptr + i - H * K, total.to(dw1_ptr.dtype.element_ty), mask=(i >= H * K) & (i < H * K + H))
    if db1_ptr is not None:
        at = i - H * K - H
        tl.store(db1_ptr + at, total.to(db1_ptr.dtype.element_ty), mask=(at >= 0) & (at < H))
    if dbias_ptr is not None:
        tl.store(dbias_ptr + i - H * (K + 2), total.to(dbias_ptr.dtype.element_ty), mask=i == H * (K + 2))


def _dense(*weights: Tensor | None) -> list[Tensor | None]:
    return [w if w is None else w.contiguous() for w in weights]


def pool_conv_scale(
    x: Tensor, weight: Tensor, bias: Tensor | None, w1: Tensor | None, b1: Tensor | None, residual: Tensor | None,
    act: str, gate: str, slope: float, circular: bool, epilogue: str, epilogue_slope: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n, c = x.shape[:2]
    saved = torch.empty(2 * n * c, dtype=accumulator(x.dtype), device=x.device)
    p, u = saved.view(2, n, c)
    g = torch.empty_like(p)
    pool_into(x, p, None, None)
    tile.launch(
        _channel_conv_fwd_kernel, (n, triton.cdiv(c, _BLOCK)), x, p, *_dense(weight, bias, w1, b1), u, g, c,
        weight.shape[1], K=weight.shape[2], CIRCULAR=circular, ACT=act if w1 is not None else "identity", SLOPE=slope,
        GATE=gate, ACC=tile.ACC.get(x.dtype, tl.float32), BLOCK=_BLOCK, num_warps=1,
    )  # fmt: skip
    return scale(x, g, residual, None, epilogue, epilogue_slope, "product"), saved


def pool_conv_scale_bwd(
    x: Tensor, dy: Tensor, aux: Tensor | None, saved: Tensor, weight: Tensor, bias: Tensor | None, w1: Tensor | None,
    b1: Tensor | None, act: str, gate: str, slope: float, circular: bool, epilogue: str, epilogue_slope: float,
    residual: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    n, c = x.shape[:2]
    h, k = weight.shape[1:]
    p, u = saved.contiguous().view(2, n, c)
    none, index = p.new_empty((0,)), p.new_empty((0,), dtype=torch.int64)
    g = torch.empty_like(u)
    tile.launch(_gates_kernel, (triton.cdiv(n * c, _BLOCK),), x, u, g, n * c, GATE=gate, BLOCK=_BLOCK, num_warps=1)
    dgate, e, _ = pool_scale_reduce(x, dy, g, aux, none, epilogue, epilogue_slope, "mean", "split", residual)
    dp, blocks, size = torch.empty_like(p), triton.cdiv(c, _BLOCK), h * (k + 2) + 1
    parts = torch.empty((n * blocks, size), dtype=p.dtype, device=x.device)
    tile.launch(
        _channel_conv_bwd_kernel, (n, blocks), x, p, u, dgate, *_dense(weight, w1, b1), dp, parts, c, h, size,
        K=k, CIRCULAR=circular, ACT=act if w1 is not None else "identity", SLOPE=slope, GATE=gate,
        ACC=tile.ACC.get(x.dtype, tl.float32), BLOCK=_BLOCK, num_warps=1,
    )  # fmt: skip
    given = (weight, w1, b1, bias)
    grads = [None if w is None else torch.zeros(w.shape, dtype=w.dtype, device=w.device) for w in given]
    if n:
        tile.launch(
            _sum_parts_kernel, (triton.cdiv(size, 16),), x, parts, *grads, n * blocks, h, size, K=k, TALL=64, WIDE=16,
            num_warps=4,
        )  # fmt: skip
    dweight, dw1, db1, dbias = (x.new_empty((0,)) if t is None else t for t in grads)
    written = keeps_e(epilogue, residual)
    through = "identity" if residual else epilogue
    dx = pool_scale_apply(x, e if written else dy, g, dp, none, index, none, through, epilogue_slope, "mean", "split")
    return dx, e, dweight, dbias, dw1, db1


@triton.jit
def _gates_kernel(u_ptr, gate_ptr, SIZE, GATE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    u = tl.load(u_ptr + i, mask=i < SIZE, other=0)
    tl.store(gate_ptr + i, tile.activate(u, GATE, 0.0, None), mask=i < SIZE)


__all__ = ["pool_conv_scale", "pool_conv_scale_bwd"]
