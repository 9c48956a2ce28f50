"""Triton kernels of scaling.

    forward   y = act(x·gate + residual)                         reads x (residual), writes y
    backward  e = dy·act'(v), dgate = Σ_s e·x, dx = e·gate       reads x, dy (aux), writes dx (e)

The backward kernel is every pass that sums over S for a gradient: `pool_scale_reduce` and the count of tied maxima are
the same pass with other outputs.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tile
from ..layout import accumulator
from . import pixel_kernels
from .activations import FROM_OUTPUT


@triton.jit
def _scale_fwd_kernel(
    x_ptr, gate_ptr, residual_ptr, y_ptr, A, B, x_sn, x_sr, residual_sn, residual_sr, y_sn, y_sr,
    ACT: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, V: tl.constexpr, BIG: tl.constexpr,
):  # fmt: skip
    n, a, col, head = tile.spot(A, B, PLANES, ROWS, COLS, V, BIG)
    mask = tile.owned(a, col, head, A, B, V)
    gate = tile.pick(tile.channel(gate_ptr, n, a, col, A, B, ACC, PLANES), col, head, B, PLANES, V)
    v = tl.load(tile.at(x_ptr, n, a, col, x_sn, x_sr, V), mask=mask, other=0).to(ACC) * gate
    if residual_ptr is not None:
        v += tl.load(tile.at(residual_ptr, n, a, col, residual_sn, residual_sr, V), mask=mask, other=0).to(ACC)
    y = tile.activate(v, ACT, SLOPE, None)
    tl.store(tile.at(y_ptr, n, a, col, y_sn, y_sr, V), y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def epilogue_gradient(dy, x, gate, aux, ACT: tl.constexpr, SLOPE: tl.constexpr, OUTPUT: tl.constexpr):
    """e = dy·act'(v) on a tile: v is x·gate (+ aux, the residual), or act' is read off aux, the output."""
    if ACT == "identity":
        return dy
    elif OUTPUT:
        return tile.cut(dy, tile.derivative(aux, ACT, SLOPE, None))
    elif aux is None:
        return tile.cut(dy, tile.derivative(x * gate, ACT, SLOPE, None))
    else:
        return tile.cut(dy, tile.derivative(x * gate + aux, ACT, SLOPE, None))


@triton.jit
def _scale_bwd_kernel(
    x_ptr, dy_ptr, gate_ptr, aux_ptr, maxima_ptr, dgate_ptr, count_ptr, e_ptr, dx_ptr, A, B, STEPS, CHANNELS,
    x_sn, x_sr, dy_sn, dy_sr, aux_sn, aux_sr, e_sn, e_sr, dx_sn, dx_sr,
    ACT: tl.constexpr, SLOPE: tl.constexpr, OUTPUT: tl.constexpr, ACC: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, V: tl.constexpr, BIG: tl.constexpr,
):  # fmt: skip
    n, block = tile.sample(tl.cdiv(A, ROWS) if PLANES else tl.cdiv(B, COLS))
    a, col, head = tile.place(block, block, A, B, PLANES, ROWS, COLS, V, BIG)
    if dy_ptr is not None:
        gates = tile.channel(gate_ptr, n, a, col, A, B, ACC, PLANES)
        dgate = tl.zeros((ROWS, COLS), ACC)
    if maxima_ptr is not None:
        maxima, _ = tile.channel(maxima_ptr, n, a, col, A, B, ACC, PLANES)
        count = tl.zeros((ROWS, COLS), ACC)
    first, last = tile.share(A, B, STEPS, PLANES, ROWS, COLS, V)
    for step in range(first, last):
        a, col, head = tile.place(
            block if PLANES else step, step if PLANES else block, A, B, PLANES, ROWS, COLS, V, BIG
        )
        read, inside = tile.touched(a, col, head, A, B, V), tile.inside(a, col, head, A, B)
        x = tl.load(tile.at(x_ptr, n, a, col, x_sn, x_sr, V), mask=read, other=0).to(ACC)
        if dy_ptr is not None:
            gate = tile.pick(gates, col, head, B, PLANES, V)
            dy = tl.load(tile.at(dy_ptr, n, a, col, dy_sn, dy_sr, V), mask=read, other=0).to(ACC)
            aux = None
            if aux_ptr is not None:
                aux = tl.load(tile.at(aux_ptr, n, a, col, aux_sn, aux_sr, V), mask=read, other=0).to(ACC)
            e = epilogue_gradient(dy, x, gate, aux, ACT, SLOPE, OUTPUT)
            dgate += tl.where(inside, e * x, 0)
            write = tile.owned(a, col, head, A, B, V)
            if e_ptr is not None:
                tl.store(tile.at(e_ptr, n, a, col, e_sn, e_sr, V), e.to(e_ptr.dtype.element_ty), mask=write)
            if dx_ptr is not None:
                dx = (e * gate).to(dx_ptr.dtype.element_ty)
                tl.store(tile.at(dx_ptr, n, a, col, dx_sn, dx_sr, V), dx, mask=write)
        if maxima_ptr is not None:
            count += (inside & (x == maxima)).to(ACC)
    to, mask = tile.channels(n, block, A, B, CHANNELS, PLANES, ROWS, COLS)
    if dy_ptr is not None:
        tl.store(dgate_ptr + to, tl.sum(dgate, 1 if PLANES else 0).to(dgate_ptr.dtype.element_ty), mask=mask)
    if maxima_ptr is not None:
        tl.store(count_ptr + to, tl.sum(count, 1 if PLANES else 0).to(count_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _merge_sums_kernel(part_ptr, out_ptr, SPLITS, CHANNELS, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(part_ptr + i, mask=i < CHANNELS, other=0)
    for split in range(1, SPLITS):
        total += tl.load(part_ptr + split * CHANNELS + i, mask=i < CHANNELS, other=0)
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=i < CHANNELS)


def merge_sums(part: Tensor, out: Tensor) -> None:
    """out (N, C) = the sum of part (splits, N, C), in order: the same bits every run."""
    channels = out.numel()
    tile.launch(
        _merge_sums_kernel,
        (triton.cdiv(channels, 128),),
        out,
        part,
        out,
        part.shape[0],
        channels,
        BLOCK=128,
        num_warps=1,
    )


def backward_sums(
    x: Tensor, dy: Tensor | None, gate: Tensor | None, aux: Tensor | None, maxima: Tensor | None, dtype: torch.dtype,
    act: str, slope: float, e: Tensor | None = None, dx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fills e and dx; returns dgate (N, C) in `dtype` and the count of maxima, each empty without its input."""
    w = tile.walk(x, dy, aux, e, dx, sums=True)
    acc, channels = accumulator(x.dtype), x.shape[0] * x.shape[1]

    def sums(wanted: bool, to: torch.dtype) -> tuple[Tensor, Tensor | None]:
        if not wanted:
            return x.new_empty((0,), dtype=to), None
        out = torch.empty(x.shape[:2], dtype=to, device=x.device)
        return out, out if w.splits == 1 else out.new_empty((w.splits, *out.shape), dtype=acc)

    dgate, dgate_part = sums(dy is not None, dtype)
    count, count_part = sums(maxima is not None, acc)
    strides = [step for pair in w.strides for step in pair]
    tile.launch(
        _scale_bwd_kernel, w.grid, x, x, dy, gate if gate is None else gate.contiguous(), aux, maxima,
        dgate_part, count_part, e, dx, w.a, w.b, w.steps, channels, *strides,
        ACT=act, SLOPE=slope, OUTPUT=aux is not None and act in FROM_OUTPUT, **w.meta,
    )  # fmt: skip
    if w.splits > 1:
        for part, out in ((dgate_part, dgate), (count_part, count)):
            if part is not None:
                merge_sums(part, out)
    return dgate, count


def scale(
    x: Tensor, gate: Tensor | None, residual: Tensor | None, pixel: Tensor | None, act: str, slope: float, merge: str
) -> Tensor:
    if pixel is not None or gate is None or merge.startswith("sigmoid"):
        return pixel_kernels.scale(x, gate, residual, pixel, act, slope, merge)
    y = torch.empty_like(x)
    w = tile.walk(x, residual, y)
    strides = [step for pair in w.strides for step in pair]
    tile.launch(
        _scale_fwd_kernel, w.grid, x, x, gate.contiguous(), residual, y, w.a, w.b, *strides,
        ACT=act, SLOPE=slope, **w.meta,
    )  # fmt: skip
    return y


def scale_bwd(
    x: Tensor, gate: Tensor | None, aux: Tensor | None, pixel: Tensor | None, dy: Tensor,
    act: str, slope: float, merge: str, residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, none = torch.empty_like(x), x.new_empty((0,))
    dresidual = torch.empty_like(x) if residual and act != "identity" else None
    if pixel is not None or gate is None or merge.startswith("sigmoid"):
        dtypes = gate if gate is None else gate.dtype, pixel if pixel is None else pixel.dtype
        dgate, dpixel, _ = pixel_kernels.sums(x, dy, aux, gate, pixel, None, act, slope, merge, dresidual, dx, *dtypes)
        return dx, dgate, none if dresidual is None else dresidual, dpixel
    dgate, _ = backward_sums(x, dy, gate, aux, None, gate.dtype, act, slope, dresidual, dx)
    return dx, dgate, none if dresidual is None else dresidual, none
