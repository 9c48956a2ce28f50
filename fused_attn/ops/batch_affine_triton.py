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

BLOCK = 128  # channels: a warp of four to a program, and some programs even for few channels


@triton.jit
def _batch_affine_fwd_kernel(
    moments_ptr, weight_ptr, bias_ptr, both_ptr, statistics_ptr, N, C, SIZE, EPS: tl.constexpr, BLOCK: tl.constexpr
):
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = c < C
    far = N * C
    first = tl.load(moments_ptr + c, mask=mask, other=0)
    mu, plain = tl.zeros_like(first), tl.zeros_like(first)
    for n in range(N):  # differences to the first, which keep the digits of a mean that is far from 0
        mean = tl.load(moments_ptr + n * C + c, mask=mask, other=0)
        mu += mean - first
        plain += mean
    mu = mu / N + first
    mu = tl.where(mu - mu == 0, mu, plain / N)  # infinities have no difference
    total = tl.zeros_like(first)
    for n in range(N):
        d = tl.load(moments_ptr + n * C + c, mask=mask, other=0) - mu
        total += tl.load(moments_ptr + far + n * C + c, mask=mask, other=0) / SIZE + d * d
    var = total / N
    a = 1 / tl.sqrt(var + EPS)
    if weight_ptr is not None:
        a = a * tl.load(weight_ptr + c, mask=mask, other=0).to(a.dtype)
    b = tl.zeros_like(first)
    if bias_ptr is not None:
        b = tl.load(bias_ptr + c, mask=mask, other=0).to(a.dtype)
    tl.store(statistics_ptr + c, mu, mask=mask)
    tl.store(statistics_ptr + C + c, var, mask=mask)
    for n in range(N):
        d = tl.load(moments_ptr + n * C + c, mask=mask, other=0) - mu
        tl.store(both_ptr + n * C + c, a, mask=mask)
        tl.store(both_ptr + far + n * C + c, a * d + b, mask=mask)


@triton.jit
def _batch_affine_bwd_kernel(
    moments_ptr,
    dboth_ptr,
    statistics_ptr,
    weight_ptr,
    dmoments_ptr,
    dnorm_ptr,
    N,
    C,
    SIZE,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    c = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = c < C
    far = N * C
    mu = tl.load(statistics_ptr + c, mask=mask, other=0)
    r = 1 / tl.sqrt(tl.load(statistics_ptr + C + c, mask=mask, other=1) + EPS)
    a = r
    if weight_ptr is not None:
        a = r * tl.load(weight_ptr + c, mask=mask, other=0).to(r.dtype)
    t, dbias = tl.zeros_like(mu), tl.zeros_like(mu)
    for n in range(N):
        ds = tl.load(dboth_ptr + far + n * C + c, mask=mask, other=0)
        d = tl.load(moments_ptr + n * C + c, mask=mask, other=0) - mu
        t += tl.load(dboth_ptr + n * C + c, mask=mask, other=0) + ds * d
        dbias += ds
    tl.store(dnorm_ptr + c, r * t, mask=mask)
    tl.store(dnorm_ptr + C + c, dbias, mask=mask)
    dvar = -0.5 * r * r * a * t
    for n in range(N):
        ds = tl.load(dboth_ptr + far + n * C + c, mask=mask, other=0)
        d = tl.load(moments_ptr + n * C + c, mask=mask, other=0) - mu
        tl.store(dmoments_ptr + n * C + c, a * (ds - dbias / N) + 2 * dvar * d / N, mask=mask)
        tl.store(dmoments_ptr + far + n * C + c, dvar / SIZE / N, mask=mask)


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
        affine_kernels.dense(bias), both, statistics, n, c, size, EPS=eps, BLOCK=BLOCK, num_warps=4,
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
        affine_kernels.dense(weight), dmoments, dnorm, n, c, size, EPS=eps, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return dmoments.to(dtype), dnorm


__all__ = ["batch_affine", "batch_affine_bwd"]
