"""Triton kernels of planes gated by their own statistics.

A program holds whole planes of a few channels: it walks them for the statistics, or the gradient's sums, and again for
the result, which then comes from a cache. One launch each for forward and backward, besides sums over the batch.

    forward   mean, 1/σ; y = act(shuffle(x·s) + residual)                 reads x twice, writes y
    backward  e, Σ q, Σ q·x̂; dx                                           reads x, dy, then e and half of x, writes dx
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tile
from ..layout import accumulator, layout
from .activations import FROM_OUTPUT
from .pool_scale import keeps_e
from .scale_triton import epilogue_gradient


@triton.jit
def moments(x_ptr, live, S, ss, ACC: tl.constexpr, CH: tl.constexpr, SP: tl.constexpr):
    """Mean, biased variance, and the mean by a plain sum, of planes.

    x_ptr: (CH, 1) where each starts; live: (CH, 1) which are there

    Each lane updates its own (Welford, 1962), relative to the plane's first value; lanes are merged at the end (Chan,
    Golub & LeVeque, 1979). A mean that isn't finite is what the plain sum says.
    """
    shift = tl.load(x_ptr, mask=live, other=0).to(ACC)
    shift = tl.where(shift - shift == 0, shift, 0)
    mean, m2, total = tl.zeros((CH, SP), ACC), tl.zeros((CH, SP), ACC), tl.zeros((CH, SP), ACC)
    lane = tl.arange(0, SP)[None, :]
    for step in range(tl.cdiv(S, SP)):
        s = step * SP + lane
        inside = live & (s < S)
        x = tl.load(x_ptr + s.to(tl.int64) * ss, mask=inside, other=0).to(ACC)
        total += x
        off = x - shift - mean
        next_mean = mean + off / (step + 1)
        m2 += tl.where(inside, off * (x - shift - next_mean), 0)
        mean = tl.where(inside, next_mean, mean)
    seen = (S - lane + SP - 1) // SP
    seen = tl.where(lane < S, seen, 0).to(ACC)
    whole = tl.sum(mean * seen, 1)[:, None] / S
    apart = mean - whole
    var = tl.sum(m2 + seen * apart * apart, 1)[:, None] / S
    whole += shift
    plain = tl.sum(total, 1)[:, None] / S
    return tl.where(whole - whole == 0, whole, plain), var, plain


@triton.jit
def planes(C, CH: tl.constexpr):
    """This program's sample, and its channels (CH, 1)."""
    n, block = tile.sample(tl.cdiv(C, CH))
    return n, block * CH + tl.arange(0, CH)[:, None]


@triton.jit
def _plane_moments_kernel(
    x_ptr, mean_ptr, var_ptr, C, S, sn, sc, ss, ACC: tl.constexpr, CH: tl.constexpr, SP: tl.constexpr
):
    n, c = planes(C, CH)
    mean, var, _ = moments(x_ptr + n * sn + c.to(tl.int64) * sc, c < C, S, ss, ACC, CH, SP)
    tl.store(mean_ptr + n * C + c, mean, mask=c < C)
    tl.store(var_ptr + n * C + c, var, mask=c < C)


@triton.jit
def _parameter(ptr, k, live, ACC: tl.constexpr, OTHER: tl.constexpr):
    """A parameter for each channel; OTHER where there is none."""
    if ptr is None:
        return tl.full(k.shape, OTHER, ACC)
    else:
        return tl.load(ptr + k, mask=live, other=0).to(ACC)


@triton.jit
def _logit(cw_ptr, cb_ptr, sw_ptr, sb_ptr, nw_ptr, nb_ptr, c, live, mean, rstd, K, ACC: tl.constexpr):
    """slope and offset of each channel's logit slope·(x − mean) + offset; slope is 0 in the first half of a group."""
    k, second = c % K, c % (2 * K) >= K
    cw, cb = _parameter(cw_ptr, k, live, ACC, 0), _parameter(cb_ptr, k, live, ACC, 0)
    sw, sb = _parameter(sw_ptr, k, live, ACC, 0), _parameter(sb_ptr, k, live, ACC, 0)
    nw, nb = _parameter(nw_ptr, k, live, ACC, 1), _parameter(nb_ptr, k, live, ACC, 0)
    return tl.where(second, sw * nw * rstd, 0), tl.where(second, sw * nb + sb, cw * mean + cb), second, cw


@triton.jit
def _gate(x, mean, slope, offset):
    return tile.sigmoid(tl.where(slope == 0, offset, (x - mean) * slope + offset))


@triton.jit
def _shuffled(c, C):
    """Where a channel goes."""
    return tl.where(c < C // 2, 2 * c, 2 * c - C + 1)


@triton.jit
def _plane_gate_shuffle_fwd_kernel(
    x_ptr, residual_ptr, y_ptr, stats_ptr, cw_ptr, cb_ptr, sw_ptr, sb_ptr, nw_ptr, nb_ptr, C, S, K, CHANNELS,
    x_sn, x_sc, x_ss, residual_sn, residual_sc, residual_ss, y_sn, y_sc, y_ss, EPS: tl.constexpr,
    ACT: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr, CH: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    n, c = planes(C, CH)
    live = c < C
    x_ptr += n * x_sn + c.to(tl.int64) * x_sc
    mean, var, plain = moments(x_ptr, live, S, x_ss, ACC, CH, SP)
    # A mean to be subtracted needs the digits below the plane's own size; one to be multiplied, those below its own.
    mean = tl.where(c % (2 * K) >= K, mean, plain)
    rstd = tl.where(c % (2 * K) >= K, 1 / tl.sqrt(var + EPS), 0)
    slope, offset, _, _ = _logit(cw_ptr, cb_ptr, sw_ptr, sb_ptr, nw_ptr, nb_ptr, c, live, mean, rstd, K, ACC)
    tl.store(stats_ptr + n * C + c, mean, mask=live)
    tl.store(stats_ptr + CHANNELS + n * C + c, rstd, mask=live)
    to = _shuffled(c, C).to(tl.int64)
    for step in range(tl.cdiv(S, SP)):
        s = (step * SP + tl.arange(0, SP)[None, :]).to(tl.int64)
        inside = live & (s < S)
        x = tl.load(x_ptr + s * x_ss, mask=inside, other=0).to(ACC)
        v = x * _gate(x, mean, slope, offset)
        if residual_ptr is not None:
            v += tl.load(residual_ptr + n * residual_sn + to * residual_sc + s * residual_ss, mask=inside, other=0).to(
                ACC
            )
        y = tile.activate(v, ACT, SLOPE, None)
        tl.store(y_ptr + n * y_sn + to * y_sc + s * y_ss, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _plane_gate_shuffle_bwd_kernel(
    x_ptr, dy_ptr, aux_ptr, kept_ptr, dx_ptr, stats_ptr, cw_ptr, cb_ptr, sw_ptr, sb_ptr, nw_ptr, nb_ptr,
    q0_ptr, q1_ptr, C, S, K, CHANNELS, x_sn, x_sc, x_ss, dy_sn, dy_sc, dy_ss, aux_sn, aux_sc, aux_ss,
    kept_sn, kept_sc, kept_ss, dx_sn, dx_sc, dx_ss, ACT: tl.constexpr, SLOPE: tl.constexpr, OUTPUT: tl.constexpr,
    ACC: tl.constexpr, CH: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    n, c = planes(C, CH)
    live = c < C
    mean = tl.load(stats_ptr + n * C + c, mask=live, other=0)
    rstd = tl.load(stats_ptr + CHANNELS + n * C + c, mask=live, other=0)
    slope, offset, second, cw = _logit(cw_ptr, cb_ptr, sw_ptr, sb_ptr, nw_ptr, nb_ptr, c, live, mean, rstd, K, ACC)
    to = _shuffled(c, C).to(tl.int64)
    x_ptr += n * x_sn + c.to(tl.int64) * x_sc
    dx_ptr += n * dx_sn + c.to(tl.int64) * dx_sc
    dy_ptr += n * dy_sn + to * dy_sc
    if aux_ptr is not None:
        aux_ptr += n * aux_sn + to * aux_sc
    if kept_ptr is not None:
        kept_ptr += n * kept_sn + to * kept_sc
    q0, q1 = tl.zeros((CH, SP), ACC), tl.zeros((CH, SP), ACC)
    for step in range(tl.cdiv(S, SP)):
        s = (step * SP + tl.arange(0, SP)[None, :]).to(tl.int64)
        inside = live & (s < S)
        x = tl.load(x_ptr + s * x_ss, mask=inside, other=0).to(ACC)
        e = tl.load(dy_ptr + s * dy_ss, mask=inside, other=0).to(ACC)
        gate = _gate(x, mean, slope, offset)
        aux = None
        if aux_ptr is not None:
            aux = tl.load(aux_ptr + s * aux_ss, mask=inside, other=0).to(ACC)
        e = epilogue_gradient(e, x, gate, aux, ACT, SLOPE, OUTPUT)
        if kept_ptr is not None:
            tl.store(kept_ptr + s * kept_ss, e.to(kept_ptr.dtype.element_ty), mask=inside)
        q = tl.where(inside, e * x * gate * (1 - gate), 0)
        q0 += q
        q1 += tl.where(inside, q * ((x - mean) * rstd), 0)
    q0, q1 = tl.sum(q0, 1)[:, None], tl.sum(q1, 1)[:, None]
    tl.store(q0_ptr + n * C + c, q0, mask=live)
    tl.store(q1_ptr + n * C + c, q1, mask=live)
    add, along = q0 / S, q1 / S * rstd
    if kept_ptr is not None:
        tl.debug_barrier()  # a thread may read what another has written
    for step in range(tl.cdiv(S, SP)):
        s = (step * SP + tl.arange(0, SP)[None, :]).to(tl.int64)
        inside = live & (s < S)
        if kept_ptr is not None:
            e = tl.load(kept_ptr + s * kept_ss, mask=inside, other=0).to(ACC)
            x = tl.load(x_ptr + s * x_ss, mask=inside & second, other=0).to(ACC)
            gate = _gate(x, mean, slope, offset)
        elif ACT == "identity":
            e = tl.load(dy_ptr + s * dy_ss, mask=inside, other=0).to(ACC)
            x = tl.load(x_ptr + s * x_ss, mask=inside & second, other=0).to(ACC)
            gate = _gate(x, mean, slope, offset)
        else:
            e = tl.load(dy_ptr + s * dy_ss, mask=inside, other=0).to(ACC)
            x = tl.load(x_ptr + s * x_ss, mask=inside, other=0).to(ACC)
            gate = _gate(x, mean, slope, offset)
            e = epilogue_gradient(e, x, gate, None, ACT, SLOPE, OUTPUT)
        back = (e * x * gate * (1 - gate) - add - (x - mean) * along) * slope
        dx = e * gate + tl.where(second, back, cw * add)
        tl.store(dx_ptr + s * dx_ss, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _plane_gate_shuffle_merge_kernel(
    q0_ptr, q1_ptr, stats_ptr, sw_ptr, nw_ptr, nb_ptr, dcw_ptr, dcb_ptr, dsw_ptr, dsb_ptr, dnw_ptr, dnb_ptr,
    K, GROUPS, ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program per element k: sums over samples and groups, GROUPS = N·G of them, in order."""
    k = tl.program_id(0)
    c0, c1, s0, s1 = (tl.zeros((ROWS,), ACC), tl.zeros((ROWS,), ACC), tl.zeros((ROWS,), ACC), tl.zeros((ROWS,), ACC))
    for step in range(tl.cdiv(GROUPS, ROWS)):
        row = (step * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        live, at = row < GROUPS, row * 2 * K + k
        q = tl.load(q0_ptr + at, mask=live, other=0)
        c0 += q
        c1 += q * tl.load(stats_ptr + at, mask=live, other=0)
        s0 += tl.load(q0_ptr + at + K, mask=live, other=0)
        s1 += tl.load(q1_ptr + at + K, mask=live, other=0)
    c0, c1, s0, s1 = tl.sum(c0, 0), tl.sum(c1, 0), tl.sum(s0, 0), tl.sum(s1, 0)
    sw = tl.load(sw_ptr + k).to(ACC)
    nw, nb = 1.0, 0.0
    if nw_ptr is not None:
        nw = tl.load(nw_ptr + k).to(ACC)
        tl.store(dnw_ptr + k, (sw * s1).to(dnw_ptr.dtype.element_ty))
    if nb_ptr is not None:
        nb = tl.load(nb_ptr + k).to(ACC)
        tl.store(dnb_ptr + k, (sw * s0).to(dnb_ptr.dtype.element_ty))
    tl.store(dcw_ptr + k, c1.to(dcw_ptr.dtype.element_ty))
    tl.store(dcb_ptr + k, c0.to(dcb_ptr.dtype.element_ty))
    tl.store(dsw_ptr + k, (nw * s1 + nb * s0).to(dsw_ptr.dtype.element_ty))
    tl.store(dsb_ptr + k, s0.to(dsb_ptr.dtype.element_ty))


def steps(x: Tensor | None, kind: str) -> list[int]:
    """(sn, sc, ss) of a map in the kind of x; zeros where there is none."""
    if x is None:
        return [0, 0, 0]
    found = layout(x, kind)
    assert found is not None
    return [found.sn, found.sc, found.ss]


def held(x: Tensor, channels: int | None = None) -> tuple[str, int, int, dict[str, Any]]:
    """The kind of x, C, S, and a program's tile: `channels` of them, or as many as fill it."""
    found = layout(x)
    assert found is not None
    s = triton.next_power_of_2(found.s)
    # A float64 takes two registers, and its divisions and exponentials many: fewer elements, as many threads.
    double = x.dtype == torch.float64
    elements = 512 if double else 1024 if channels is None else 2048
    if channels is not None:
        ch = triton.next_power_of_2(channels)
        sp = min(s, max(4, elements // ch))
    elif found.kind == "planes":
        sp = min(s, elements)
        ch = min(triton.next_power_of_2(found.c), elements // sp)
    else:
        ch = min(triton.next_power_of_2(found.c), 32)
        sp = min(s, elements // ch)
    warps = max(1, min(8, ch * sp // ((2 if double else 4) * tile.WARP)))
    acc = tile.ACC.get(x.dtype, tl.float32)
    return found.kind, found.c, found.s, dict(ACC=acc, CH=ch, SP=sp, num_warps=warps, **tile.OPTIONS)


def launch_moments(x: Tensor, mean: Tensor, var: Tensor) -> None:
    """Fills mean and var (N, C), contiguous, in one read of x."""
    kind, c, s, meta = held(x)
    grid = (x.shape[0] * triton.cdiv(c, meta["CH"]),)
    tile.launch(_plane_moments_kernel, grid, x, x, mean, var, c, s, *steps(x, kind), **meta)


def _dense(weights: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [w if w is None else w.contiguous() for w in weights]


def plane_gate_shuffle(
    x: Tensor, cweight: Tensor, cbias: Tensor, sweight: Tensor, sbias: Tensor, norm_weight: Tensor | None,
    norm_bias: Tensor | None, residual: Tensor | None, eps: float, act: str, slope: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = torch.empty_like(x)
    stats = torch.empty((2, *x.shape[:2]), dtype=accumulator(x.dtype), device=x.device)
    kind, c, s, meta = held(x)
    tile.launch(
        _plane_gate_shuffle_fwd_kernel, (x.shape[0] * triton.cdiv(c, meta["CH"]),), x, x, residual, y, stats,
        *_dense((cweight, cbias, sweight, sbias, norm_weight, norm_bias)), c, s, cweight.numel(), stats[0].numel(),
        *steps(x, kind), *steps(residual, kind), *steps(y, kind), EPS=eps, ACT=act, SLOPE=slope, **meta,
    )  # fmt: skip
    return y, stats


def plane_gate_shuffle_bwd(
    x: Tensor, dy: Tensor, aux: Tensor | None, stats: Tensor, cweight: Tensor, cbias: Tensor, sweight: Tensor,
    sbias: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None, act: str, slope: float, residual: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    dx = torch.empty_like(x)
    kept = torch.empty_like(x) if keeps_e(act, residual) else None
    sums = torch.empty_like(stats)
    given = (cweight, cbias, sweight, sbias, norm_weight, norm_bias)
    weights = _dense(given)
    kind, c, s, meta = held(x)
    k = cweight.numel()
    tile.launch(
        _plane_gate_shuffle_bwd_kernel, (x.shape[0] * triton.cdiv(c, meta["CH"]),), x, x, dy, aux, kept, dx,
        stats.contiguous(), *weights, sums[0], sums[1], c, s, k, stats[0].numel(), *steps(x, kind), *steps(dy, kind),
        *steps(aux, kind), *steps(kept, kind), *steps(dx, kind), ACT=act, SLOPE=slope,
        OUTPUT=aux is not None and act in FROM_OUTPUT, **meta,
    )  # fmt: skip
    grads = [x.new_empty((0,)) if g is None else torch.empty(g.shape, dtype=g.dtype, device=g.device) for g in given]
    filled = [g if w is not None else None for g, w in zip(grads, given, strict=True)]
    tile.launch(
        _plane_gate_shuffle_merge_kernel, (k,), x, sums[0], sums[1], stats.contiguous(), weights[2], *weights[4:],
        *filled, k, x.shape[0] * c // (2 * k), ROWS=128, ACC=meta["ACC"], num_warps=1,
    )  # fmt: skip
    return dx, x.new_empty((0,)) if kept is None else kept, *grads


__all__ = ["launch_moments", "plane_gate_shuffle", "plane_gate_shuffle_bwd"]
