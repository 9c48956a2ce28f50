"""Triton kernels of a batch normalisation out of moments: a program takes some channels of all samples.

    forward   μ, then the merged squares, then scale and shift       backward   the three sums, then dm and dm2

The arrays are small, (N, C), so what is read again comes from a cache.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tile
from ..layout import accumulator
from . import affine_kernels

# A program's tile: a cache line of channels, so that there are programs enough for few channels, by samples that are
# loaded at once.
ROWS, BLOCK = 16, 32


@triton.jit
def _batch_affine_fwd_kernel(
    moments_ptr, weight_ptr, bias_ptr, both_ptr, statistics_ptr, N, C, SIZE, EPS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask, rows = c < C, tl.arange(0, ROWS)
    far = N * C
    first = tl.load(moments_ptr + c, mask=mask, other=0)
    off = tl.zeros((ROWS, BLOCK), first.dtype)
    plain = tl.zeros((ROWS, BLOCK), first.dtype)
    for start in range(0, N, ROWS):  # differences to the first, which keep the digits of a mean that is far from 0
        at, live = _place(start + rows, c, N, C)
        mean = tl.load(moments_ptr + at, mask=live, other=0)
        off += tl.where(live, mean - first[None, :], 0)
        plain += mean
    mu = tl.sum(off, 0) / N + first
    mu = tl.where(mu - mu == 0, mu, tl.sum(plain, 0) / N)  # infinities have no difference
    squares = tl.zeros((ROWS, BLOCK), first.dtype)
    for start in range(0, N, ROWS):
        at, live = _place(start + rows, c, N, C)
        d = tl.load(moments_ptr + at, mask=live, other=0) - mu[None, :]
        squares += tl.where(live, tl.load(moments_ptr + far + at, mask=live, other=0) / SIZE + d * d, 0)
    var = tl.sum(squares, 0) / N
    a = 1 / tl.sqrt(var + EPS)
    if weight_ptr is not None:
        a = a * tl.load(weight_ptr + c, mask=mask, other=0).to(a.dtype)
    b = tl.zeros_like(first)
    if bias_ptr is not None:
        b = tl.load(bias_ptr + c, mask=mask, other=0).to(a.dtype)
    tl.store(statistics_ptr + c, mu, mask=mask)
    tl.store(statistics_ptr + C + c, var, mask=mask)
    for start in range(0, N, ROWS):
        at, live = _place(start + rows, c, N, C)
        d = tl.load(moments_ptr + at, mask=live, other=0) - mu[None, :]
        tl.store(both_ptr + at, tl.broadcast_to(a[None, :], (ROWS, BLOCK)), mask=live)
        tl.store(both_ptr + far + at, a[None, :] * d + b[None, :], mask=live)


@triton.jit
def _batch_affine_bwd_kernel(
    moments_ptr, dboth_ptr, statistics_ptr, weight_ptr, dmoments_ptr, dnorm_ptr, N, C, SIZE, EPS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask, rows = c < C, tl.arange(0, ROWS)
    far = N * C
    mu = tl.load(statistics_ptr + c, mask=mask, other=0)
    r = 1 / tl.sqrt(tl.load(statistics_ptr + C + c, mask=mask, other=1) + EPS)
    a = r
    if weight_ptr is not None:
        a = r * tl.load(weight_ptr + c, mask=mask, other=0).to(r.dtype)
    ts = tl.zeros((ROWS, BLOCK), mu.dtype)
    biases = tl.zeros((ROWS, BLOCK), mu.dtype)
    for start in range(0, N, ROWS):
        at, live = _place(start + rows, c, N, C)
        ds = tl.load(dboth_ptr + far + at, mask=live, other=0)
        d = tl.load(moments_ptr + at, mask=live, other=0) - mu[None, :]
        ts += tl.where(live, tl.load(dboth_ptr + at, mask=live, other=0) + ds * d, 0)
        biases += ds
    t, dbias = tl.sum(ts, 0), tl.sum(biases, 0)
    tl.store(dnorm_ptr + c, r * t, mask=mask)
    tl.store(dnorm_ptr + C + c, dbias, mask=mask)
    dvar = -0.5 * r * r * a * t
    for start in range(0, N, ROWS):
        at, live = _place(start + rows, c, N, C)
        ds = tl.load(dboth_ptr + far + at, mask=live, other=0)
        d = tl.load(moments_ptr + at, mask=live, other=0) - mu[None, :]
        tl.store(dmoments_ptr + at, a[None, :] * (ds - dbias[None, :] / N) + 2 * dvar[None, :] * d / N, mask=live)
        tl.store(dmoments_ptr + far + at, tl.broadcast_to((dvar / SIZE / N)[None, :], (ROWS, BLOCK)), mask=live)


@triton.jit
def _place(n, c, N, C):
    """Where the values of these samples and channels lie, and whether there are such."""
    return n[:, None] * C + c[None, :], (n < N)[:, None] & (c < C)[None, :]


def batch_affine(
    moments: Tensor, weight: Tensor | None, bias: Tensor | None, size: int, eps: float
) -> tuple[Tensor, Tensor]:
    moments = moments.to(accumulator(moments.dtype)).contiguous()
    _, n, c = moments.shape
    both, statistics = torch.empty_like(moments), moments.new_empty((2, c))
    if not n:  # as 0/0
        return both, statistics.fill_(float("nan"))
    tile.launch(
        _batch_affine_fwd_kernel, (triton.cdiv(c, BLOCK),), moments, moments, affine_kernels.dense(weight),
        affine_kernels.dense(bias), both, statistics, n, c, size, EPS=eps, ROWS=ROWS, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return both, statistics


def batch_affine_bwd(
    moments: Tensor, dboth: Tensor, statistics: Tensor, weight: Tensor | None, size: int, eps: float
) -> tuple[Tensor, Tensor]:
    acc, dtype = accumulator(moments.dtype), moments.dtype
    moments, dboth = moments.to(acc).contiguous(), dboth.to(acc).contiguous()
    _, n, c = moments.shape
    dmoments, dnorm = torch.empty_like(moments), moments.new_empty((2, c))
    if not n:
        dnorm[0], dnorm[1] = float("nan"), 0.0
        return dmoments.to(dtype), dnorm
    tile.launch(
        _batch_affine_bwd_kernel, (triton.cdiv(c, BLOCK),), moments, moments, dboth, statistics.contiguous(),
        affine_kernels.dense(weight), dmoments, dnorm, n, c, size, EPS=eps, ROWS=ROWS, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return dmoments.to(dtype), dnorm


__all__ = ["batch_affine", "batch_affine_bwd"]
