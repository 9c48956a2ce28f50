"""Triton kernels of pooling over channels.

    forward   Σ_c x·gate, max_c x·gate and its first channel    reads x once
    backward  dx = gate·h, dgate = Σ_s x·h                      pixel_kernels's apply, after a count of tied maxima

A maximum is NaN where there is one, and its channel the first NaN, as in torch.max.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tile
from ..layout import accumulator
from .channel_pool import has_max
from .pixel_kernels import apply, centred, per_channel, per_pixel, spot, walk


@triton.jit
def _spatial_pool_kernel(
    x_ptr, gate_ptr, centre_ptr, shift_ptr, mean_ptr, max_ptr, index_ptr,
    A, B, STEPS, BLOCKS, P, x_sn, x_sr, ACC: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, V: tl.constexpr, BIG: tl.constexpr,
):  # fmt: skip
    n, block = tile.sample(BLOCKS)
    total = tl.zeros((ROWS, COLS), ACC)
    best = tl.full((ROWS, COLS), float("-inf"), ACC)
    where = tl.full((ROWS, COLS), tile.LAST, tl.int32)
    for step in range(STEPS):
        a, col = spot(block, step, PLANES, ROWS, COLS, BIG, False)
        inside = (a < A) & (col < B)
        mask = (a < A) & (col // V * V < B)
        x = tl.load(tile.at(x_ptr, n, a, col, x_sn, x_sr, V), mask=mask, other=0).to(ACC)
        if shift_ptr is not None:
            gate = per_channel(gate_ptr, n, a, col, A, B, ACC, PLANES)
            x -= per_channel(centre_ptr, n, a, col, A, B, ACC, PLANES)
            x = tl.fma(gate, x, per_channel(shift_ptr, n, a, col, A, B, ACC, PLANES))
        elif gate_ptr is not None:
            x *= per_channel(gate_ptr, n, a, col, A, B, ACC, PLANES)
        total += tl.where(inside, x, 0)
        if index_ptr is not None:
            # Each lane meets its channels in order, so the first of equals stays; NaN beats all but an earlier NaN.
            better = inside & ((x > best) | ((x != x) & (best == best)) | ((x == best) & (where == tile.LAST)))
            best = tl.where(better, x, best)
            where = tl.where(better, (a if PLANES else col).to(where.dtype), where)
        elif max_ptr is not None:
            best = tl.maximum(best, tl.where(inside, x, float("-inf")), propagate_nan=tl.PropagateNan.ALL)
    S = B if PLANES else A
    s = block * (COLS if PLANES else ROWS) + tl.arange(0, COLS if PLANES else ROWS)
    if mean_ptr is not None:
        tl.store(mean_ptr + n * P * S + s, tl.sum(total, 0 if PLANES else 1) / (A if PLANES else B), mask=s < S)
    if max_ptr is not None:
        largest = tile.nan_max(best, 0 if PLANES else 1)
        tl.store(max_ptr + n * P * S + s, largest, mask=s < S)
        if index_ptr is not None:
            spread = largest[None, :] if PLANES else largest[:, None]
            hit = (best == spread) | ((best != best) & (spread != spread))
            place = tl.min(tl.where(hit, where, tile.LAST), 0 if PLANES else 1)
            tl.store(index_ptr + n * S + s, place.to(tl.int64), mask=s < S)


@triton.jit
def _count_top_kernel(
    x_ptr, gate_ptr, top_ptr, count_ptr, A, B, STEPS, BLOCKS, x_sn, x_sr, ACC: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, V: tl.constexpr, BIG: tl.constexpr,
):  # fmt: skip
    n, block = tile.sample(BLOCKS)
    count = tl.zeros((ROWS, COLS), ACC)
    for step in range(STEPS):
        a, col = spot(block, step, PLANES, ROWS, COLS, BIG, False)
        mask = (a < A) & (col // V * V < B)
        x = tl.load(tile.at(x_ptr, n, a, col, x_sn, x_sr, V), mask=mask, other=0).to(ACC)
        if gate_ptr is not None:
            x *= per_channel(gate_ptr, n, a, col, A, B, ACC, PLANES)
        top = per_pixel(top_ptr, n, a, col, A, B, ACC, PLANES)
        count += ((a < A) & (col < B) & (x == top)).to(ACC)
    S = B if PLANES else A
    s = block * (COLS if PLANES else ROWS) + tl.arange(0, COLS if PLANES else ROWS)
    tl.store(count_ptr + n * S + s, tl.sum(count, 0 if PLANES else 1), mask=s < S)


def spatial_pool(x: Tensor, gate: Tensor | None, pool: str, ties: str, return_index: bool) -> tuple[Tensor, Tensor]:
    return pooled(x, gate, None, pool, has_max(pool) and (ties == "first" or return_index))


def pooled(x: Tensor, gate: Tensor | None, affine: Tensor | None, pool: str, indexed: bool) -> tuple[Tensor, Tensor]:
    """Planes of x·gate, or of gate·(x − centre) + shift with affine (2, N, C); and the maxima's channels, or empty."""
    acc, both = accumulator(x.dtype), pool == "mean_max"
    planes = torch.empty((x.shape[0], 1 + both, *x.shape[2:]), dtype=acc, device=x.device)
    index = torch.empty((x.shape[0], *x.shape[2:]) if indexed else 0, dtype=torch.int64, device=x.device)
    w = walk(x, along="channels")
    tile.launch(
        _spatial_pool_kernel, (w.n * w.blocks,), x, x, gate if gate is None else gate.contiguous(), *centred(affine),
        planes if pool != "max" else None, planes[:, int(both) :] if has_max(pool) else None,
        index if indexed else None, w.a, w.b, w.steps, w.blocks, 1 + both, *w.strides, **w.meta,
    )  # fmt: skip
    return planes, index


def spatial_pool_bwd(
    x: Tensor, gate: Tensor | None, dplanes: Tensor, planes: Tensor, index: Tensor, pool: str, ties: str
) -> tuple[Tensor, Tensor]:
    acc = accumulator(x.dtype)
    dplanes, mean, most, top, place = dplanes.to(acc), None, None, None, None
    if pool != "max":
        mean = dplanes[:, 0] / x.shape[1]
    if has_max(pool):
        most = dplanes[:, -1]
        if ties == "first":
            place = index
        else:
            top = planes[:, -1].contiguous()
            count = torch.empty_like(top)
            w = walk(x, along="channels")
            tile.launch(
                _count_top_kernel, (w.n * w.blocks,), x, x, gate if gate is None else gate.contiguous(), top, count,
                w.a, w.b, w.steps, w.blocks, *w.strides, **w.meta,
            )  # fmt: skip
            most = most / count
    dx = torch.empty_like(x)
    reads = gate is not None or top is not None
    dgate, _ = apply(
        x, None, gate, None, mean, most, top, place, None, None, None, None, "identity", 0.01, False, dx,
        None if gate is None else gate.dtype, reads,
    )  # fmt: skip
    return dx, dgate
