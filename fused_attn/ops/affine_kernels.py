"""What the Triton kernels of affine maps share: v = scale·(x − centre) + shift, with values per sample and channel.

A program owns a block of channels, loads what belongs to them once, and walks along the pixels: in channels_last, where
each element of a vector has values of its own, they would otherwise be several times the traffic of the maps. None
stands for a value that isn't there.

    sums   e = gate·dy·act'(v): Σ e·(x − centre), Σ e (, Σ dy·act(v)), dx = scale·e    reads x, dy (aux), writes (dx, e)
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tile
from ..layout import accumulator
from .activations import FROM_OUTPUT
from .scale_triton import merge_sums


def dense(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.contiguous()


def walk(*maps: Tensor | None) -> tile.Walk:
    """The walk of a pointwise launch whose programs keep their channels.

    A program takes up to eight tiles: then the loads of its channels' values, in channels_last, are fewer than those of
    one map. It takes one where there would be less than eight programs for each of about 128 processors.
    """
    w = tile.walk(*maps)
    run = w.b + w.meta["V"] - 1 if w.planes else w.b
    down, across = triton.cdiv(w.a, w.meta["ROWS"]), triton.cdiv(run, w.meta["COLS"])
    blocks, tiles = (down, across) if w.planes else (across, down)
    steps = max(min(8, w.n * blocks * tiles // 1024), triton.cdiv(tiles, 65535), 1)  # a grid's second size ends there
    return w._replace(grid=(w.n * blocks, triton.cdiv(tiles, steps)), steps=steps)


def flat(w: tile.Walk) -> list[int]:
    """The strides of all maps, as the kernels take them."""
    return [step for pair in w.strides for step in pair]


@triton.jit
def start(A, B, PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, V: tl.constexpr, BIG: tl.constexpr):
    """This program's sample and block, and rows and columns that are right where they name channels."""
    n, block = tile.sample(tl.cdiv(A, ROWS) if PLANES else tl.cdiv(B, COLS))
    a, col, _ = tile.place(block, block, A, B, PLANES, ROWS, COLS, V, BIG)
    return n, block, a, col


@triton.jit
def place(block, step, A, B, PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, V: tl.constexpr,
          BIG: tl.constexpr):  # fmt: skip
    """The tile at `step` of a program's way."""
    return tile.place(block if PLANES else step, step if PLANES else block, A, B, PLANES, ROWS, COLS, V, BIG)


@triton.jit
def values(ptr, n, a, col, A, B, OTHER: tl.constexpr, ACC: tl.constexpr, PLANES: tl.constexpr):
    """A tensor (N, C) for `tile.pick`; OTHER where it is None, which the compiler folds away."""
    if ptr is None:
        none = tl.full((1, 1), OTHER, ACC)
        return none, none
    else:
        return tile.channel(ptr, n, a, col, A, B, ACC, PLANES)


@triton.jit
def value_and_derivative(v, ACT: tl.constexpr, SLOPE: tl.constexpr):
    """act(v) and act'(v), by one exponential and one division where a sigmoid is in both."""
    if ACT == "silu":
        s = tile.sigmoid(v)
        return v * s, s * (1 + v * (1 - s))
    else:
        return tile.activate(v, ACT, SLOPE, None), tile.derivative(v, ACT, SLOPE, None)


@triton.jit
def _affine_sums_kernel(
    x_ptr, dy_ptr, scale_ptr, shift_ptr, centre_ptr, gate_ptr, aux_ptr, sums_ptr, dx_ptr, e_ptr, A, B, STEPS, CHANNELS,
    x_sn, x_sr, dy_sn, dy_sr, aux_sn, aux_sr, dx_sn, dx_sr, e_sn, e_sr,
    ACT: tl.constexpr, SLOPE: tl.constexpr, OUTPUT: tl.constexpr, ACC: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, V: tl.constexpr, BIG: tl.constexpr,
):  # fmt: skip
    n, block, a, col = start(A, B, PLANES, ROWS, COLS, V, BIG)
    scales = values(scale_ptr, n, a, col, A, B, 1, ACC, PLANES)
    shifts = values(shift_ptr, n, a, col, A, B, 0, ACC, PLANES)
    centres = values(centre_ptr, n, a, col, A, B, 0, ACC, PLANES)
    gates = values(gate_ptr, n, a, col, A, B, 1, ACC, PLANES)
    by_scale, by_shift = tl.zeros((ROWS, COLS), ACC), tl.zeros((ROWS, COLS), ACC)
    by_gate = by_shift
    first, last = tile.share(A, B, STEPS, PLANES, ROWS, COLS, V)
    for step in range(first, last):
        a, col, head = place(block, step, A, B, PLANES, ROWS, COLS, V, BIG)
        read, inside = tile.touched(a, col, head, A, B, V), tile.inside(a, col, head, A, B)
        e = tl.load(tile.at(dy_ptr, n, a, col, dy_sn, dy_sr, V), mask=read, other=0).to(ACC)
        x = tl.load(tile.at(x_ptr, n, a, col, x_sn, x_sr, V), mask=read, other=0).to(ACC)
        scale = tile.pick(scales, col, head, B, PLANES, V)
        t = x - tile.pick(centres, col, head, B, PLANES, V)
        if gate_ptr is not None:
            u, d = value_and_derivative(scale * t + tile.pick(shifts, col, head, B, PLANES, V), ACT, SLOPE)
            by_gate += tl.where(inside, e * u, 0)
            if ACT != "identity":
                e = tile.cut(e, d)
            e *= tile.pick(gates, col, head, B, PLANES, V)
        elif ACT != "identity":
            v = t
            if not OUTPUT:
                v = scale * t + tile.pick(shifts, col, head, B, PLANES, V)
            if aux_ptr is not None:
                aux = tl.load(tile.at(aux_ptr, n, a, col, aux_sn, aux_sr, V), mask=read, other=0).to(ACC)
                v = aux if OUTPUT else v + aux
            e = tile.cut(e, tile.derivative(v, ACT, SLOPE, None))
        by_scale += tl.where(inside, e * t, 0)
        by_shift += tl.where(inside, e, 0)
        write = tile.owned(a, col, head, A, B, V)
        if e_ptr is not None:
            tl.store(tile.at(e_ptr, n, a, col, e_sn, e_sr, V), e.to(e_ptr.dtype.element_ty), mask=write)
        if dx_ptr is not None:
            dx = (e * scale).to(dx_ptr.dtype.element_ty)
            tl.store(tile.at(dx_ptr, n, a, col, dx_sn, dx_sr, V), dx, mask=write)
    axis: tl.constexpr = 1 if PLANES else 0
    count: tl.constexpr = 2 if gate_ptr is None else 3
    to, mask = tile.channels(n, block, A, B, count * CHANNELS, PLANES, ROWS, COLS)
    tl.store(sums_ptr + to, tl.sum(by_scale, axis), mask=mask)
    tl.store(sums_ptr + CHANNELS + to, tl.sum(by_shift, axis), mask=mask)
    if gate_ptr is not None:
        tl.store(sums_ptr + 2 * CHANNELS + to, tl.sum(by_gate, axis), mask=mask)


def parts(x: Tensor, count: int, w: tile.Walk) -> tuple[Tensor, Tensor]:
    """Sums (count, N, C), and what a launch writes: the sums themselves, or (splits, count, N, C)."""
    out = torch.empty((count, *x.shape[:2]), dtype=accumulator(x.dtype), device=x.device)
    return out, out if w.splits == 1 else out.new_empty((w.splits, *out.shape))


def merged(out: Tensor, part: Tensor) -> Tensor:
    """The sums, their parts added in order."""
    if part is not out:
        merge_sums(part, out)
    return out


def sums(
    x: Tensor, dy: Tensor, scale: Tensor, shift: Tensor, centre: Tensor | None, aux: Tensor | None,
    gate: Tensor | None, act: str, slope: float, dx: Tensor | None, e: Tensor | None,
) -> Tensor:  # fmt: skip
    """Fills dx and e; returns the sums (2, N, C), with a gate (3, N, C)."""
    if not x.numel():
        return x.new_zeros((2 if gate is None else 3, *x.shape[:2]), dtype=accumulator(x.dtype))
    w = tile.walk(x, dy, aux, dx, e, sums=True)
    out, part = parts(x, 2 if gate is None else 3, w)
    tile.launch(
        _affine_sums_kernel, w.grid, x, x, dy, dense(scale), dense(shift), dense(centre), dense(gate), aux,
        part, dx, e, w.a, w.b, w.steps, x.shape[0] * x.shape[1], *flat(w),
        ACT=act, SLOPE=slope, OUTPUT=aux is not None and act in FROM_OUTPUT, **w.meta,
    )  # fmt: skip
    return merged(out, part)
