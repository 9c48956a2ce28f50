"""Triton kernels with a value per pixel beside the one per channel; the launchers are in the ops' own files.

    scale   y = act(x·f + residual)                                                 reads x (residual), writes y
    sums    e = dy·act'(v), dgate = Σ_s e·x·∂f/∂gate, dpixel = Σ_c e·x·∂f/∂pixel    reads x, dy (aux), writes (dx, e)
    apply   h = e·pixel + what pooling over channels adds, dgate = Σ_s x·h,
            dx = gate·h + what pooling over pixels adds                             reads e (x), writes (dx)

With a centre and a shift per channel, gate·(x − centre) + shift stands for x·gate: f is the pixel's then, dgate =
Σ_s h·(x − centre), dshift = Σ_s h, and dx has tilt·(x − centre) beside.

A program of sums and apply owns a block of channels and walks along the pixels: the sum over pixels stays in registers,
the sum over its channels is written per block, and the blocks are added in order.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tile
from ..layout import accumulator
from .activations import FROM_OUTPUT


class Walk(NamedTuple):
    """How a launch walks its maps: rows and columns as in tile.py, with whole vectors in every row."""

    planes: bool
    n: int
    a: int
    b: int
    blocks: int
    splits: int
    steps: int
    strides: list[int]
    meta: dict[str, Any]


def walk(*maps: Tensor | None, along: str = "pixels", aligned: bool = True) -> Walk:
    """along: what a program walks through; its block is of the other one.

    aligned: whether a column must be one pixel, as sums over channels need it. Else rows may start inside of a vector.
    """
    w = tile.walk(*maps, sums=True)
    heads = w.planes and w.b % w.meta["V"] != 0
    v = 1 if heads and aligned else w.meta["V"]
    heads = heads and not aligned
    two = triton.next_power_of_2
    channels_down = w.planes
    # An address for each element takes the registers of two; so do three sums for each of a tile that has heads.
    elements = 512 if v == 1 or (heads and v < 8) else 1024
    if w.planes:
        rows = min(two(w.a), elements // 16 if along == "pixels" else 16)
        cols = min(two(w.b), elements // rows)
    else:
        cols = min(two(w.b), 128)
        rows = min(two(w.a), elements // cols)
    down, across = triton.cdiv(w.a, rows), triton.cdiv(w.b + (v - 1 if heads else 0), cols)
    owned_down = channels_down == (along == "pixels")
    blocks, tiles = (down, across) if owned_down else (across, down)
    splits = 1
    if along == "pixels" and w.n * blocks < 256:
        splits = max(1, min(triton.cdiv(512, max(w.n * blocks, 1)), tiles // 4))
    steps = triton.cdiv(tiles, splits)
    warps = max(1, min(4, rows * cols // (elements // 4)))
    meta = {**w.meta, "V": v, "ROWS": rows, "COLS": cols, "num_warps": warps, **({} if aligned else {"HEADS": heads})}
    return Walk(w.planes, w.n, w.a, w.b, blocks, triton.cdiv(tiles, steps), steps,
                [step for pair in w.strides for step in pair], meta)  # fmt: skip


@triton.jit
def spot(
    block, step, PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, BIG: tl.constexpr, CHANNELS: tl.constexpr
):
    """Rows and columns of a tile. CHANNELS: whether `block` counts channels, and `step` pixels."""
    if BIG:
        block, step = block.to(tl.int64), tl.cast(step, tl.int64)
    down = block if PLANES == CHANNELS else step
    across = step if PLANES == CHANNELS else block
    return down * ROWS + tl.arange(0, ROWS)[:, None], across * COLS + tl.arange(0, COLS)[None, :]


@triton.jit
def per_channel(ptr, n, a, col, A, B, ACC: tl.constexpr, PLANES: tl.constexpr):
    """A tensor (N, C) beside a tile."""
    if PLANES:
        return tl.load(ptr + n * A + a, mask=a < A, other=0).to(ACC)
    else:
        return tl.load(ptr + n * B + col, mask=col < B, other=0).to(ACC)


@triton.jit
def per_pixel(ptr, n, a, col, A, B, ACC: tl.constexpr, PLANES: tl.constexpr):
    """A tensor (N, S) beside a tile."""
    if PLANES:
        return tl.load(ptr + n * B + col, mask=col < B, other=0).to(ACC)
    else:
        return tl.load(ptr + n * A + a, mask=a < A, other=0).to(ACC)


@triton.jit
def pixels(col, head, B, HEADS: tl.constexpr):
    """The pixel in each column of planes: where rows start inside of a vector, those past a row's end are the next's.

    Before a row's start are lanes of which nothing is kept; they get any pixel that there is.
    """
    if HEADS:
        s = col - head
        return tl.where(s < 0, 0, tl.where(s < B, s, s - B))
    else:
        return col


@triton.jit
def beside(ptr, n, a, col, head, A, B, ACC: tl.constexpr, PLANES: tl.constexpr, HEADS: tl.constexpr):
    """`per_channel`, where rows may start inside of a vector."""
    if HEADS:
        return tile.pick(tile.channel(ptr, n, a, col, A, B, ACC, True), col, head, B, True, 2)
    else:
        return per_channel(ptr, n, a, col, A, B, ACC, PLANES)


@triton.jit
def merged(gate, pixel, MERGE: tl.constexpr):
    """The factor f; a gate that is None isn't there."""
    if gate is None:
        both = pixel
    elif pixel is None:
        both = gate
    elif MERGE == "product" or MERGE == "sigmoid_product":
        both = gate * pixel
    else:
        both = gate + pixel
    if MERGE == "sigmoid_product" or MERGE == "sigmoid_sum":
        return 1 + tile.sigmoid(both)
    else:
        return both


@triton.jit
def gradient(
    e_ptr, aux_ptr, x, f, n, a, col, mask, e_sn, e_sr, aux_sn, aux_sr,
    ACT: tl.constexpr, SLOPE: tl.constexpr, OUTPUT: tl.constexpr, ACC: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """e = dy·act'(v) on a tile."""
    e = tl.load(tile.at(e_ptr, n, a, col, e_sn, e_sr, V), mask=mask, other=0).to(ACC)
    if ACT == "identity":
        return e
    elif aux_ptr is None:
        return tile.cut(e, tile.derivative(x * f, ACT, SLOPE, None))
    else:
        aux = tl.load(tile.at(aux_ptr, n, a, col, aux_sn, aux_sr, V), mask=mask, other=0).to(ACC)
        return tile.cut(e, tile.derivative(aux if OUTPUT else x * f + aux, ACT, SLOPE, None))


@triton.jit
def _pixel_scale_kernel(
    x_ptr, gate_ptr, pixel_ptr, residual_ptr, add_ptr, weight_ptr, plane_ptr, centre_ptr, shift_ptr, y_ptr, A, B,
    x_sn, x_sr, residual_sn, residual_sr, y_sn, y_sr,
    MERGE: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, V: tl.constexpr, BIG: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    n, a, col, head = tile.spot(A, B, PLANES, ROWS, COLS, V, BIG)
    mask = tile.owned(a, col, head, A, B, V)
    s = pixels(col, head, B, HEADS)
    gate, pixel = None, None
    if gate_ptr is not None:
        gate = beside(gate_ptr, n, a, col, head, A, B, ACC, PLANES, HEADS)
    if pixel_ptr is not None:
        pixel = per_pixel(pixel_ptr, n, a, s, A, B, ACC, PLANES)
    v = tl.load(tile.at(x_ptr, n, a, col, x_sn, x_sr, V), mask=mask, other=0).to(ACC)
    if shift_ptr is not None:
        centre = beside(centre_ptr, n, a, col, head, A, B, ACC, PLANES, HEADS)
        v = pixel * tl.fma(gate, v - centre, beside(shift_ptr, n, a, col, head, A, B, ACC, PLANES, HEADS))
    else:
        v *= merged(gate, pixel, MERGE)
    if residual_ptr is not None:
        v += tl.load(tile.at(residual_ptr, n, a, col, residual_sn, residual_sr, V), mask=mask, other=0).to(ACC)
    if add_ptr is not None:
        v += beside(add_ptr, n, a, col, head, A, B, ACC, PLANES, HEADS)
    if plane_ptr is not None:
        weight = beside(weight_ptr, 0, a, col, head, A, B, ACC, PLANES, HEADS)
        v += weight * per_pixel(plane_ptr, n, a, s, A, B, ACC, PLANES)
    y = tile.activate(v, ACT, SLOPE, None)
    tl.store(tile.at(y_ptr, n, a, col, y_sn, y_sr, V), y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _pixel_sums_kernel(
    x_ptr, dy_ptr, aux_ptr, gate_ptr, pixel_ptr, top_ptr, centre_ptr, shift_ptr, dgate_ptr, dpixel_ptr, shared_ptr,
    e_ptr, dx_ptr,
    A, B, STEPS, BLOCKS, N, x_sn, x_sr, dy_sn, dy_sr, aux_sn, aux_sr, e_sn, e_sr, dx_sn, dx_sr,
    MERGE: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr, OUTPUT: tl.constexpr, ACC: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, V: tl.constexpr, BIG: tl.constexpr,
):  # fmt: skip
    n, block = tile.sample(BLOCKS)
    dgate = tl.zeros((ROWS, COLS), ACC)
    first = tl.program_id(1) * STEPS
    last = tl.minimum(first + STEPS, tl.cdiv(B, COLS) if PLANES else tl.cdiv(A, ROWS))
    for step in range(first, last):
        a, col = spot(block, step, PLANES, ROWS, COLS, BIG, True)
        inside = (a < A) & (col < B)
        mask = (a < A) & (col // V * V < B)
        gate, pixel = None, None
        if gate_ptr is not None:
            gate = per_channel(gate_ptr, n, a, col, A, B, ACC, PLANES)
        if pixel_ptr is not None:
            pixel = per_pixel(pixel_ptr, n, a, col, A, B, ACC, PLANES)
        f = merged(gate, pixel, MERGE)
        x = tl.full((ROWS, COLS), 1, ACC)
        if x_ptr is not None:
            x = tl.load(tile.at(x_ptr, n, a, col, x_sn, x_sr, V), mask=mask, other=0).to(ACC)
        if shift_ptr is not None:  # what was x·gate takes x's place, and no pass wants dgate of it
            centre = per_channel(centre_ptr, n, a, col, A, B, ACC, PLANES)
            x = tl.fma(gate, x - centre, per_channel(shift_ptr, n, a, col, A, B, ACC, PLANES))
            f = pixel
        e = gradient(dy_ptr, aux_ptr, x, f, n, a, col, mask, dy_sn, dy_sr, aux_sn, aux_sr, ACT, SLOPE, OUTPUT, ACC, V)
        if e_ptr is not None:
            tl.store(tile.at(e_ptr, n, a, col, e_sn, e_sr, V), e.to(e_ptr.dtype.element_ty), mask=mask)
        if dx_ptr is not None:
            tl.store(tile.at(dx_ptr, n, a, col, dx_sn, dx_sr, V), (e * f).to(dx_ptr.dtype.element_ty), mask=mask)
        t = tl.where(inside, e * x, 0)
        if MERGE == "sigmoid_product" or MERGE == "sigmoid_sum":
            t *= (f - 1) * (2 - f)
        by_gate, by_pixel = t, t
        if (MERGE == "product" or MERGE == "sigmoid_product") and gate_ptr is not None and pixel_ptr is not None:
            by_gate, by_pixel = t * pixel, t if shift_ptr is not None else t * gate
        dgate += by_gate
        at = col if PLANES else a
        if PLANES:
            to = (block * N + n) * B + col
        else:
            to = (block * N + n) * A + a
        keep = at < (B if PLANES else A)
        if dpixel_ptr is not None:
            total = tl.sum(by_pixel, 0 if PLANES else 1, keep_dims=True)
            tl.store(dpixel_ptr + to, total.to(dpixel_ptr.dtype.element_ty), mask=keep)
        if shared_ptr is not None:
            u = x if shift_ptr is not None else x * gate
            hit = inside & (u == per_pixel(top_ptr, n, a, col, A, B, ACC, PLANES))
            seen = tl.sum(hit.to(ACC), 0 if PLANES else 1, keep_dims=True)
            tl.store(shared_ptr + to, seen.to(shared_ptr.dtype.element_ty), mask=keep)
    if dgate_ptr is not None:
        to, keep = _channels(n, block, A, B, N, PLANES, ROWS, COLS)
        tl.store(dgate_ptr + to, tl.sum(dgate, 1 if PLANES else 0).to(dgate_ptr.dtype.element_ty), mask=keep)


@triton.jit
def _channels(n, block, A, B, N, PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Where this program's sums over pixels go in (splits, N, C)."""
    if PLANES:
        c = block * ROWS + tl.arange(0, ROWS)
        return (tl.program_id(1) * N + n) * A + c, c < A
    else:
        c = block * COLS + tl.arange(0, COLS)
        return (tl.program_id(1) * N + n) * B + c, c < B


@triton.jit
def _pixel_apply_kernel(
    x_ptr, e_ptr, gate_ptr, pixel_ptr, mean_ptr, most_ptr, top_ptr, place_ptr, dmean_ptr, dmax_ptr, maxima_ptr,
    index_ptr, centre_ptr, shift_ptr, tilt_ptr, dgate_ptr, count_ptr, dshift_ptr, dx_ptr,
    A, B, STEPS, BLOCKS, N, x_sn, x_sr, e_sn, e_sr, dx_sn, dx_sr,
    ABS: tl.constexpr, ACT: tl.constexpr, SLOPE: tl.constexpr, ACC: tl.constexpr,
    PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, V: tl.constexpr, BIG: tl.constexpr,
    HEADS: tl.constexpr,
):  # fmt: skip
    n, block = tile.sample(BLOCKS)
    dgate = tl.zeros((ROWS, COLS), ACC)
    count = tl.zeros((ROWS, COLS), ACC)
    dshift = tl.zeros((ROWS, COLS), ACC)
    first = tl.program_id(1) * STEPS
    last = tl.minimum(first + STEPS, tl.cdiv(B + V - 1 if HEADS else B, COLS) if PLANES else tl.cdiv(A, ROWS))
    for step in range(first, last):
        a, col = spot(block, step, PLANES, ROWS, COLS, BIG, True)
        head = a * 0
        if HEADS:
            head = a * B % V
        inside, mask = tile.inside(a, col, head, A, B), tile.touched(a, col, head, A, B, V)
        s = pixels(col, head, B, HEADS)  # columns of pixels are channels, and their own here
        x = tl.zeros((ROWS, COLS), ACC)
        if x_ptr is not None:
            x = tl.load(tile.at(x_ptr, n, a, col, x_sn, x_sr, V), mask=mask, other=0).to(ACC)
        gate = 1.0
        if gate_ptr is not None:
            gate = beside(gate_ptr, n, a, col, head, A, B, ACC, PLANES, HEADS)
        at, u = x, x * gate
        if shift_ptr is not None:
            at = x - beside(centre_ptr, n, a, col, head, A, B, ACC, PLANES, HEADS)
            u = tl.fma(gate, at, beside(shift_ptr, n, a, col, head, A, B, ACC, PLANES, HEADS))
        h = tl.zeros((ROWS, COLS), ACC)
        if e_ptr is not None:
            pixel = per_pixel(pixel_ptr, n, a, s, A, B, ACC, PLANES)
            if shift_ptr is not None:
                h += pixel * gradient(
                    e_ptr, None, u, pixel, n, a, col, mask, e_sn, e_sr, 0, 0, ACT, SLOPE, False, ACC, V
                )
            else:
                h += pixel * gradient(
                    e_ptr, None, x, gate * pixel, n, a, col, mask, e_sn, e_sr, 0, 0, ACT, SLOPE, False, ACC, V
                )
        if mean_ptr is not None:
            h += per_pixel(mean_ptr, n, a, s, A, B, ACC, PLANES)
        if most_ptr is not None:
            most = per_pixel(most_ptr, n, a, s, A, B, ACC, PLANES)
            if place_ptr is not None:
                c = a + (col >= head + B).to(a.dtype) if HEADS else a if PLANES else col
                h += tl.where(c == per_pixel(place_ptr, n, a, s, A, B, tl.int64, PLANES), most, 0.0)
            else:
                # A product and not a choice: where the maximum is NaN nothing equals it, and 0·(dmax/0) says so.
                h += (u == per_pixel(top_ptr, n, a, s, A, B, ACC, PLANES)).to(ACC) * most
        if dgate_ptr is not None:
            dgate += tl.where(inside, at * h, 0)
        if dshift_ptr is not None:
            dshift += tl.where(inside, h, 0)
        if count_ptr is not None:
            count += (inside & (x == beside(maxima_ptr, n, a, col, head, A, B, ACC, PLANES, HEADS))).to(ACC)
        if dx_ptr is not None:
            dx = h * gate
            if dmean_ptr is not None:
                dmean = beside(dmean_ptr, n, a, col, head, A, B, ACC, PLANES, HEADS)
                if ABS:
                    dx += dmean * ((x > 0).to(ACC) - (x < 0).to(ACC))
                else:
                    dx += dmean
            if dmax_ptr is not None:
                dmax = beside(dmax_ptr, n, a, col, head, A, B, ACC, PLANES, HEADS)
                if index_ptr is not None:
                    dx += tl.where(
                        (s if PLANES else a) == beside(index_ptr, n, a, col, head, A, B, tl.int64, PLANES, HEADS),
                        dmax,
                        0.0,
                    )
                else:
                    dx += (x == beside(maxima_ptr, n, a, col, head, A, B, ACC, PLANES, HEADS)).to(ACC) * dmax
            if tilt_ptr is not None:
                dx += at * beside(tilt_ptr, n, a, col, head, A, B, ACC, PLANES, HEADS)
            owned = tile.owned(a, col, head, A, B, V)
            tl.store(tile.at(dx_ptr, n, a, col, dx_sn, dx_sr, V), dx.to(dx_ptr.dtype.element_ty), mask=owned)
    if dgate_ptr is not None:
        to, keep = _channels(n, block, A, B, N, PLANES, ROWS, COLS)
        tl.store(dgate_ptr + to, tl.sum(dgate, 1 if PLANES else 0).to(dgate_ptr.dtype.element_ty), mask=keep)
        if count_ptr is not None:
            tl.store(count_ptr + to, tl.sum(count, 1 if PLANES else 0).to(count_ptr.dtype.element_ty), mask=keep)
        if dshift_ptr is not None:
            tl.store(dshift_ptr + to, tl.sum(dshift, 1 if PLANES else 0).to(dshift_ptr.dtype.element_ty), mask=keep)


def _dense(t: Tensor | None) -> Tensor | None:
    return t if t is None else t.contiguous()


def centred(affine: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Centre and shift."""
    if affine is None:
        return None, None
    affine = affine.contiguous()
    return affine[0], affine[1]


def _part(x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, many: int) -> tuple[Tensor, Tensor]:
    """A sum, and what a launch writes: the sum itself, or its parts."""
    out = torch.empty(shape, dtype=dtype, device=x.device)
    return out, out if many == 1 else out.new_empty((many, *shape), dtype=accumulator(x.dtype))


def _merge(part: Tensor | None, out: Tensor | None) -> None:
    from .scale_triton import merge_sums  # which imports this file

    if part is not None and out is not None and part is not out:
        merge_sums(part, out)


def scale(
    x: Tensor, gate: Tensor | None, residual: Tensor | None, pixel: Tensor | None, act: str, slope: float, merge: str,
    add: Tensor | None = None, weight: Tensor | None = None, plane: Tensor | None = None, affine: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """y = act(x·f + residual + add + weight·plane): add (N, C), weight (C,), plane (N, *S), affine (2, N, C)."""
    y = torch.empty_like(x)
    w = walk(x, residual, y, aligned=False)
    blocks = triton.cdiv(w.a, w.meta["ROWS"]) * triton.cdiv(w.b + w.meta["V"] - 1 if w.planes else w.b, w.meta["COLS"])
    tile.launch(
        _pixel_scale_kernel, (w.n * blocks,), x, x, _dense(gate), _dense(pixel), residual,
        _dense(add), _dense(weight), _dense(plane), *centred(affine), y, w.a, w.b, *w.strides,
        MERGE=merge, ACT=act, SLOPE=slope, **w.meta,
    )  # fmt: skip
    return y


def sums(
    x: Tensor, dy: Tensor, aux: Tensor | None, gate: Tensor | None, pixel: Tensor | None, top: Tensor | None,
    act: str, slope: float, merge: str, e: Tensor | None, dx: Tensor | None,
    channel: torch.dtype | None, plane: torch.dtype | None, ones: bool = False, affine: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Fills e and dx; dgate and dpixel in the dtypes given, empty for None; how many channels are top, or empty.

    ones: x is 1 everywhere, and not read
    """
    w = walk(x, dy, aux, e, dx)
    none = x.new_empty((0,))
    acc, shape = accumulator(x.dtype), (x.shape[0], *x.shape[2:])
    dgate, dgate_part = (none, None) if channel is None else _part(x, tuple(x.shape[:2]), channel, w.splits)
    dpixel, dpixel_part = (none, None) if plane is None else _part(x, shape, plane, w.blocks)
    shared, shared_part = (x.new_empty((0,), dtype=acc), None) if top is None else _part(x, shape, acc, w.blocks)
    tile.launch(
        _pixel_sums_kernel, (w.n * w.blocks, w.splits), x, None if ones else x, dy, aux,
        _dense(gate), _dense(pixel), _dense(top), *centred(affine),
        dgate_part, dpixel_part, shared_part, e, dx, w.a, w.b, w.steps, w.blocks, w.n, *w.strides,
        MERGE=merge, ACT=act, SLOPE=slope, OUTPUT=aux is not None and act in FROM_OUTPUT, **w.meta,
    )  # fmt: skip
    for part, out in ((dgate_part, dgate), (dpixel_part, dpixel), (shared_part, shared)):
        _merge(part, out)
    return dgate, dpixel, shared


def apply(
    x: Tensor, e: Tensor | None, gate: Tensor | None, pixel: Tensor | None, mean: Tensor | None, most: Tensor | None,
    top: Tensor | None, place: Tensor | None, dmean: Tensor | None, dmax: Tensor | None, maxima: Tensor | None,
    index: Tensor | None, act: str, slope: float, absolute: bool, dx: Tensor | None,
    channel: torch.dtype | None, reads: bool, affine: Tensor | None = None, tilt: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fills dx; dgate in the dtype given and the count of maxima beside it, empty where they aren't wanted. With affine
    dgate (2, N, C) is of the gate and of the shift."""
    read = x if reads else None
    w = walk(x if dx is None else dx, read, e, aligned=False)
    strides = [*w.strides[2:], *(w.strides[:2] if dx is not None else (0, 0))]
    acc = accumulator(x.dtype)
    none, counted = x.new_empty((0,)), x.new_empty((0,), dtype=acc)
    dgate, dgate_part, count_part, dshift, dshift_part = none, None, None, None, None
    if channel is not None:
        dgate, dgate_part = _part(x, tuple(x.shape[:2]), channel, w.splits)
        if affine is not None:
            dshift, dshift_part = _part(x, tuple(x.shape[:2]), channel, w.splits)
        if maxima is not None:
            counted, count_part = _part(x, tuple(x.shape[:2]), acc, w.splits)
    tile.launch(
        _pixel_apply_kernel, (w.n * w.blocks, w.splits), x, read, e, _dense(gate), _dense(pixel), _dense(mean),
        _dense(most), _dense(top), _dense(place), _dense(dmean), _dense(dmax), _dense(maxima), _dense(index),
        *centred(affine), _dense(tilt), dgate_part, count_part, dshift_part, dx,
        w.a, w.b, w.steps, w.blocks, w.n, *strides,
        ABS=absolute, ACT=act, SLOPE=slope, **w.meta,
    )  # fmt: skip
    _merge(dgate_part, dgate)
    _merge(count_part, counted)
    if dshift is not None:
        _merge(dshift_part, dshift)
        return torch.stack([dgate, dshift]), counted
    return dgate, counted
