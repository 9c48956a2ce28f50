"""Triton kernels of a map that is affine in its planes' moments, gates itself and is shuffled.

A program walks whole planes of a few channels, whose values it holds.

    forward   y = act(shuffle(u·s) + residual)                            reads x (residual), writes y
    reduce    e, Σ e·s·t, Σ e·s, Σ q·t, Σ q                               reads x, dy (aux), writes (e)
    apply     dx = e·s·(scale + steep·u·(1 − s)) + tilt·t + level         reads x, dy, writes dx
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tile
from ..layout import accumulator
from .activations import FROM_OUTPUT
from .plane_gate_shuffle_triton import _shuffled, planes, steps
from .plane_gate_shuffle_triton import held as tiles
from .pool_scale import keeps_e
from .scale_triton import epilogue_gradient


@triton.jit
def _held(mean_ptr, values_ptr, n, c, C, K, CHANNELS, live):
    """Mean, scale, shift, steep and offset of channels (CH, 1); steep is 0 in the first half of a group."""
    at = n * C + c
    mean = tl.load(mean_ptr + at, mask=live, other=0)
    scale = tl.load(values_ptr + at, mask=live, other=0)
    shift = tl.load(values_ptr + CHANNELS + at, mask=live, other=0)
    steep = tl.load(values_ptr + 2 * CHANNELS + at, mask=live & (c % (2 * K) >= K), other=0)
    offset = tl.load(values_ptr + 3 * CHANNELS + at, mask=live, other=0)
    return mean, scale, shift, steep, offset


@triton.jit
def _gate(t, steep, offset):
    return tile.sigmoid(tl.where(steep == 0, offset, t * steep + offset))


@triton.jit
def _gate_shuffle_kernel(
    x_ptr, residual_ptr, y_ptr, mean_ptr, values_ptr, C, S, K, CHANNELS,
    x_sn, x_sc, x_ss, residual_sn, residual_sc, residual_ss, y_sn, y_sc, y_ss,
    ACT: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr, CH: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    n, c = planes(C, CH)
    live = c < C
    mean, scale, shift, steep, offset = _held(mean_ptr, values_ptr, n, c, C, K, CHANNELS, live)
    to = _shuffled(c, C).to(tl.int64)
    x_ptr += n * x_sn + c.to(tl.int64) * x_sc
    y_ptr += n * y_sn + to * y_sc
    if residual_ptr is not None:
        residual_ptr += n * residual_sn + to * residual_sc
    for step in range(tl.cdiv(S, SP)):
        s = (step * SP + tl.arange(0, SP)[None, :]).to(tl.int64)
        inside = live & (s < S)
        t = tl.load(x_ptr + s * x_ss, mask=inside, other=0).to(ACC) - mean
        v = (scale * t + shift) * _gate(t, steep, offset)
        if residual_ptr is not None:
            v += tl.load(residual_ptr + s * residual_ss, mask=inside, other=0).to(ACC)
        y = tile.activate(v, ACT, SLOPE, None)
        tl.store(y_ptr + s * y_ss, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gate_shuffle_reduce_kernel(
    x_ptr, dy_ptr, aux_ptr, kept_ptr, mean_ptr, values_ptr, sums_ptr, C, S, K, CHANNELS,
    x_sn, x_sc, x_ss, dy_sn, dy_sc, dy_ss, aux_sn, aux_sc, aux_ss, kept_sn, kept_sc, kept_ss,
    ACT: tl.constexpr, SLOPE: tl.constexpr, OUTPUT: tl.constexpr, ACC: tl.constexpr, CH: tl.constexpr,
    SP: tl.constexpr,
):  # fmt: skip
    n, c = planes(C, CH)
    live = c < C
    mean, scale, shift, steep, offset = _held(mean_ptr, values_ptr, n, c, C, K, CHANNELS, live)
    to = _shuffled(c, C).to(tl.int64)
    x_ptr += n * x_sn + c.to(tl.int64) * x_sc
    dy_ptr += n * dy_sn + to * dy_sc
    if aux_ptr is not None:
        aux_ptr += n * aux_sn + to * aux_sc
    if kept_ptr is not None:
        kept_ptr += n * kept_sn + to * kept_sc
    dscale, dshift = tl.zeros((CH, SP), ACC), tl.zeros((CH, SP), ACC)
    dsteep, doffset = tl.zeros((CH, SP), ACC), tl.zeros((CH, SP), ACC)
    for step in range(tl.cdiv(S, SP)):
        s = (step * SP + tl.arange(0, SP)[None, :]).to(tl.int64)
        inside = live & (s < S)
        t = tl.load(x_ptr + s * x_ss, mask=inside, other=0).to(ACC) - mean
        e = tl.load(dy_ptr + s * dy_ss, mask=inside, other=0).to(ACC)
        u, gate = scale * t + shift, _gate(t, steep, offset)
        aux = None
        if aux_ptr is not None:
            aux = tl.load(aux_ptr + s * aux_ss, mask=inside, other=0).to(ACC)
        e = epilogue_gradient(e, u, gate, aux, ACT, SLOPE, OUTPUT)
        if kept_ptr is not None:
            tl.store(kept_ptr + s * kept_ss, e.to(kept_ptr.dtype.element_ty), mask=inside)
        own = e * gate
        q = own * u * (1 - gate)
        dscale += tl.where(inside, own * t, 0)
        dshift += tl.where(inside, own, 0)
        dsteep += tl.where(inside, q * t, 0)
        doffset += tl.where(inside, q, 0)
    at = sums_ptr + n * C + c
    second = c % (2 * K) >= K
    tl.store(at, tl.sum(dscale, 1)[:, None], mask=live)
    tl.store(at + CHANNELS, tl.sum(dshift, 1)[:, None], mask=live)
    tl.store(at + 2 * CHANNELS, tl.where(second, tl.sum(dsteep, 1)[:, None], 0), mask=live)
    tl.store(at + 3 * CHANNELS, tl.sum(doffset, 1)[:, None], mask=live)


@triton.jit
def _gate_shuffle_apply_kernel(
    x_ptr, dy_ptr, dx_ptr, mean_ptr, values_ptr, tilt_ptr, level_ptr, C, S, K, CHANNELS,
    x_sn, x_sc, x_ss, dy_sn, dy_sc, dy_ss, dx_sn, dx_sc, dx_ss,
    ACT: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr, CH: tl.constexpr, SP: tl.constexpr,
):  # fmt: skip
    n, c = planes(C, CH)
    live = c < C
    mean, scale, shift, steep, offset = _held(mean_ptr, values_ptr, n, c, C, K, CHANNELS, live)
    tilt = tl.load(tilt_ptr + n * C + c, mask=live, other=0)
    level = tl.load(level_ptr + n * C + c, mask=live, other=0)
    x_ptr += n * x_sn + c.to(tl.int64) * x_sc
    dx_ptr += n * dx_sn + c.to(tl.int64) * dx_sc
    dy_ptr += n * dy_sn + _shuffled(c, C).to(tl.int64) * dy_sc
    for step in range(tl.cdiv(S, SP)):
        s = (step * SP + tl.arange(0, SP)[None, :]).to(tl.int64)
        inside = live & (s < S)
        t = tl.load(x_ptr + s * x_ss, mask=inside, other=0).to(ACC) - mean
        e = tl.load(dy_ptr + s * dy_ss, mask=inside, other=0).to(ACC)
        u, gate = scale * t + shift, _gate(t, steep, offset)
        e = epilogue_gradient(e, u, gate, None, ACT, SLOPE, False)
        by = gate * (scale + tl.where(steep == 0, 0, steep * u * (1 - gate)))
        dx = e * by + (tilt * t + level)
        tl.store(dx_ptr + s * dx_ss, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def _small(x: Tensor, *tensors: Tensor) -> list[Tensor]:
    acc = accumulator(x.dtype)
    return [t.to(acc).contiguous() for t in tensors]


def gate_shuffle(
    x: Tensor, mean: Tensor, values: Tensor, residual: Tensor | None, k: int, act: str, slope: float
) -> Tensor:
    y = torch.empty_like(x)
    if not x.numel():
        return y
    kind, c, s, meta = tiles(x)
    tile.launch(
        _gate_shuffle_kernel, (x.shape[0] * triton.cdiv(c, meta["CH"]),), x, x, residual, y, *_small(x, mean, values),
        c, s, k, mean.numel(), *steps(x, kind), *steps(residual, kind), *steps(y, kind), ACT=act, SLOPE=slope, **meta,
    )  # fmt: skip
    return y


def gate_shuffle_reduce(
    x: Tensor, dy: Tensor, mean: Tensor, values: Tensor, aux: Tensor | None, k: int, act: str, slope: float,
    residual: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    kept = torch.empty_like(x) if keeps_e(act, residual) else None
    sums = torch.empty(values.shape, dtype=accumulator(x.dtype), device=x.device)
    if x.numel():
        kind, c, s, meta = tiles(x)
        tile.launch(
            _gate_shuffle_reduce_kernel, (x.shape[0] * triton.cdiv(c, meta["CH"]),), x, x, dy, aux, kept,
            *_small(x, mean, values), sums, c, s, k, mean.numel(), *steps(x, kind), *steps(dy, kind),
            *steps(aux, kind), *steps(kept, kind), ACT=act, SLOPE=slope,
            OUTPUT=aux is not None and act in FROM_OUTPUT, **meta,
        )  # fmt: skip
    return sums, x.new_empty((0,)) if kept is None else kept


def gate_shuffle_apply(
    x: Tensor, dy: Tensor, mean: Tensor, values: Tensor, tilt: Tensor, level: Tensor, k: int, act: str, slope: float
) -> Tensor:
    dx = torch.empty_like(x)
    if not x.numel():
        return dx
    kind, c, s, meta = tiles(x)
    tile.launch(
        _gate_shuffle_apply_kernel, (x.shape[0] * triton.cdiv(c, meta["CH"]),), x, x, dy, dx,
        *_small(x, mean, values, tilt, level), c, s, k, mean.numel(), *steps(x, kind), *steps(dy, kind),
        *steps(dx, kind), ACT=act, SLOPE=slope, **meta,
    )  # fmt: skip
    return dx


__all__ = ["gate_shuffle", "gate_shuffle_apply", "gate_shuffle_reduce"]
