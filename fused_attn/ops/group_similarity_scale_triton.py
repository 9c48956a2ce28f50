"""Triton kernels of groups of channels scaled by one map each.

A program holds one group of one sample, and walks it with all of its channels at once, so that t, a sum over them, is
found again from each tile and never kept:

    forward   p; mean and deviation of t; y            reads x three times, writes y
    backward  e, h, Σ h, Σ h·d; Σ dt·x; dx             reads x, dy, then x, then e, writes dx

h, dt and the gate are kept as maps, one per group, between the backward's walks.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tile
from ..layout import accumulator
from .activations import FROM_OUTPUT
from .plane_gate_shuffle_triton import held, steps
from .pool_scale import keeps_e
from .scale_triton import epilogue_gradient


@triton.jit
def _group(G, C, CH: tl.constexpr):
    """This program's sample and group, its channels (CH, 1), and which of them there are."""
    n = tl.program_id(0) // G
    g = tl.program_id(0) - n * G
    per = C // G
    c = tl.arange(0, CH)[:, None]
    return n.to(tl.int64), g, (g * per + c).to(tl.int64), c < per


@triton.jit
def _gate(t, mean, std, weight, bias):
    """std: with eps."""
    return tile.sigmoid((t - mean) / std * weight + bias)


@triton.jit
def _group_similarity_scale_fwd_kernel(
    x_ptr, residual_ptr, y_ptr, p_ptr, mean_ptr, std_ptr, weight_ptr, bias_ptr, C, S, G,
    x_sn, x_sc, x_ss, residual_sn, residual_sc, residual_ss, y_sn, y_sc, y_ss, EPS: tl.constexpr,
    ACT: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr, CH: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    n, g, c, live = _group(G, C, CH)
    x_ptr += n * x_sn + c * x_sc
    lane = tl.arange(0, SP)[None, :]
    total = tl.zeros((CH, SP), ACC)
    for step in range(tl.cdiv(S, SP)):
        s = (step * SP + lane).to(tl.int64)
        total += tl.load(x_ptr + s * x_ss, mask=live & (s < S), other=0).to(ACC)
    p = tl.sum(total, 1)[:, None] / S
    tl.store(p_ptr + n * C + c, p, mask=live)
    mean, m2 = tl.zeros((1, SP), ACC), tl.zeros((1, SP), ACC)
    for step in range(tl.cdiv(S, SP)):  # as in plane_gate_shuffle_triton.moments
        s = (step * SP + lane).to(tl.int64)
        x = tl.load(x_ptr + s * x_ss, mask=live & (s < S), other=0).to(ACC)
        t = tl.sum(tl.where(live, x * p, 0), 0)[None, :]
        off = t - mean
        next_mean = mean + off / (step + 1)
        m2 += tl.where(s < S, off * (t - next_mean), 0)
        mean = tl.where(s < S, next_mean, mean)
    seen = tl.where(lane < S, (S - lane + SP - 1) // SP, 0).to(ACC)
    whole = tl.sum(mean * seen, 1)[:, None] / S
    apart = mean - whole
    # 0/0 for a single position, as in the formula
    std = tl.sqrt(tl.sum(m2 + seen * apart * apart, 1)[:, None] / ((S - 1) * tl.full((1, 1), 1, ACC)))
    one = tl.zeros((1, 1), tl.int64) + n * G + g
    tl.store(mean_ptr + one, whole)
    tl.store(std_ptr + one, std)
    weight, bias = tl.load(weight_ptr + g).to(ACC), tl.load(bias_ptr + g).to(ACC)
    for step in range(tl.cdiv(S, SP)):
        s = (step * SP + lane).to(tl.int64)
        inside = live & (s < S)
        x = tl.load(x_ptr + s * x_ss, mask=inside, other=0).to(ACC)
        t = tl.sum(tl.where(live, x * p, 0), 0)[None, :]
        v = x * _gate(t, whole, std + EPS, weight, bias)
        if residual_ptr is not None:
            v += tl.load(residual_ptr + n * residual_sn + c * residual_sc + s * residual_ss, mask=inside, other=0).to(
                ACC
            )
        y = tile.activate(v, ACT, SLOPE, None)
        tl.store(y_ptr + n * y_sn + c * y_sc + s * y_ss, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _group_similarity_scale_bwd_kernel(
    x_ptr, dy_ptr, aux_ptr, kept_ptr, dx_ptr, p_ptr, mean_ptr, std_ptr, weight_ptr, bias_ptr, dt_ptr, gate_ptr,
    dweight_ptr, dbias_ptr, C, S, G, x_sn, x_sc, x_ss, dy_sn, dy_sc, dy_ss, aux_sn, aux_sc, aux_ss,
    kept_sn, kept_sc, kept_ss, dx_sn, dx_sc, dx_ss, EPS: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr,
    OUTPUT: tl.constexpr, ACC: tl.constexpr, CH: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    n, g, c, live = _group(G, C, CH)
    x_ptr += n * x_sn + c * x_sc
    dy_ptr += n * dy_sn + c * dy_sc
    dx_ptr += n * dx_sn + c * dx_sc
    if aux_ptr is not None:
        aux_ptr += n * aux_sn + c * aux_sc
    if kept_ptr is not None:
        kept_ptr += n * kept_sn + c * kept_sc
    dt_ptr += (n * G + g) * S
    gate_ptr += (n * G + g) * S
    lane = tl.arange(0, SP)[None, :]
    p = tl.load(p_ptr + n * C + c, mask=live, other=0)
    one = tl.zeros((1, 1), tl.int64) + n * G + g
    mean, std = tl.load(mean_ptr + one), tl.load(std_ptr + one)
    weight, bias = tl.load(weight_ptr + g).to(ACC), tl.load(bias_ptr + g).to(ACC)
    total, along = tl.zeros((1, SP), ACC), tl.zeros((1, SP), ACC)
    for step in range(tl.cdiv(S, SP)):
        s = (step * SP + lane).to(tl.int64)
        inside = live & (s < S)
        x = tl.load(x_ptr + s * x_ss, mask=inside, other=0).to(ACC)
        e = tl.load(dy_ptr + s * dy_ss, mask=inside, other=0).to(ACC)
        t = tl.sum(tl.where(live, x * p, 0), 0)[None, :]
        gate = _gate(t, mean, std + EPS, weight, bias)
        aux = None
        if aux_ptr is not None:
            aux = tl.load(aux_ptr + s * aux_ss, mask=inside, other=0).to(ACC)
        e = epilogue_gradient(e, x, gate, aux, ACT, SLOPE, OUTPUT)
        if kept_ptr is not None:
            tl.store(kept_ptr + s * kept_ss, e.to(kept_ptr.dtype.element_ty), mask=inside)
        h = tl.sum(tl.where(inside, e * x, 0), 0)[None, :] * gate * (1 - gate)
        tl.store(dt_ptr + s, h, mask=s < S)
        tl.store(gate_ptr + s, gate, mask=s < S)
        total += tl.where(s < S, h, 0)
        along += tl.where(s < S, h * (t - mean), 0)
    total, along = tl.sum(total, 1)[:, None], tl.sum(along, 1)[:, None]
    tl.store(dbias_ptr + one, total)
    tl.store(dweight_ptr + one, along / (std + EPS))
    scale = weight / (std + EPS)
    # torch lets no gradient through a standard deviation of 0.
    back = tl.where(std == 0, 0, scale * along / ((std + EPS) * std * (S - 1)))
    shift = scale * total / S
    tl.debug_barrier()  # a thread may read what another has written
    inner = tl.zeros((CH, SP), ACC)
    for step in range(tl.cdiv(S, SP)):
        s = (step * SP + lane).to(tl.int64)
        inside = live & (s < S)
        x = tl.load(x_ptr + s * x_ss, mask=inside, other=0).to(ACC)
        t = tl.sum(tl.where(live, x * p, 0), 0)[None, :]
        dt = tl.load(dt_ptr + s, mask=s < S, other=0) * scale - shift - (t - mean) * back
        inner += tl.where(inside, dt * x, 0)
        tl.debug_barrier()
        tl.store(dt_ptr + s, dt, mask=s < S)
    inner = tl.sum(inner, 1)[:, None] / S
    tl.debug_barrier()
    for step in range(tl.cdiv(S, SP)):
        s = (step * SP + lane).to(tl.int64)
        inside = live & (s < S)
        gate = tl.load(gate_ptr + s, mask=s < S, other=0)
        if kept_ptr is not None:
            e = tl.load(kept_ptr + s * kept_ss, mask=inside, other=0).to(ACC)
        else:
            e = tl.load(dy_ptr + s * dy_ss, mask=inside, other=0).to(ACC)
            if ACT != "identity":
                x = tl.load(x_ptr + s * x_ss, mask=inside, other=0).to(ACC)
                e = epilogue_gradient(e, x, gate, None, ACT, SLOPE, OUTPUT)
        dx = e * gate + tl.load(dt_ptr + s, mask=s < S, other=0) * p + inner
        tl.store(dx_ptr + s * dx_ss, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _over_batch_kernel(dweights_ptr, dbiases_ptr, dweight_ptr, dbias_ptr, N, G, BLOCK: tl.constexpr):
    g = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dweight, dbias = tl.load(dweights_ptr + g, mask=g < G, other=0), tl.load(dbiases_ptr + g, mask=g < G, other=0)
    for n in range(1, N):
        dweight += tl.load(dweights_ptr + n * G + g, mask=g < G, other=0)
        dbias += tl.load(dbiases_ptr + n * G + g, mask=g < G, other=0)
    tl.store(dweight_ptr + g, dweight.to(dweight_ptr.dtype.element_ty), mask=g < G)
    tl.store(dbias_ptr + g, dbias.to(dbias_ptr.dtype.element_ty), mask=g < G)


def _split(state: Tensor, n: int, c: int) -> list[Tensor]:
    groups = (state.numel() // max(n, 1) - c) // 2
    return list(state.split([n * c, n * groups, n * groups]))


def group_similarity_scale(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float, act: str, slope: float
) -> tuple[Tensor, Tensor]:
    n, groups = x.shape[0], weight.numel()
    y = torch.empty_like(x)
    state = torch.empty(n * (x.shape[1] + 2 * groups), dtype=accumulator(x.dtype), device=x.device)
    kind, c, s, meta = held(x, x.shape[1] // groups)
    tile.launch(
        _group_similarity_scale_fwd_kernel, (n * groups,), x, x, residual, y, *_split(state, n, c),
        weight.contiguous(), bias.contiguous(), c, s, groups,
        *steps(x, kind), *steps(residual, kind), *steps(y, kind), EPS=eps, ACT=act, SLOPE=slope, **meta,
    )  # fmt: skip
    return y, state


def group_similarity_scale_bwd(
    x: Tensor, dy: Tensor, aux: Tensor | None, state: Tensor, weight: Tensor, bias: Tensor, eps: float,
    act: str, slope: float, residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n, groups = x.shape[0], weight.numel()
    dx = torch.empty_like(x)
    kept = torch.empty_like(x) if keeps_e(act, residual) else None
    kind, c, s, meta = held(x, x.shape[1] // groups)
    maps = torch.empty((2, n, groups, s), dtype=state.dtype, device=x.device)
    sums = torch.empty((2, n, groups), dtype=state.dtype, device=x.device)
    tile.launch(
        _group_similarity_scale_bwd_kernel, (n * groups,), x, x, dy, aux, kept, dx,
        *_split(state.contiguous(), n, c), weight.contiguous(), bias.contiguous(), maps[0], maps[1], sums[0], sums[1],
        c, s, groups, *steps(x, kind), *steps(dy, kind), *steps(aux, kind), *steps(kept, kind), *steps(dx, kind),
        EPS=eps, ACT=act, SLOPE=slope, OUTPUT=aux is not None and act in FROM_OUTPUT, **meta,
    )  # fmt: skip
    dweight = torch.zeros(weight.shape, dtype=weight.dtype, device=x.device)
    dbias = torch.zeros(bias.shape, dtype=bias.dtype, device=x.device)
    if n:
        tile.launch(
            _over_batch_kernel, (triton.cdiv(groups, 128),), x, sums[0], sums[1], dweight, dbias, n, groups,
            BLOCK=128, num_warps=1,
        )  # fmt: skip
    return dx, x.new_empty((0,)) if kept is None else kept, dweight, dbias


__all__ = ["group_similarity_scale", "group_similarity_scale_bwd"]
