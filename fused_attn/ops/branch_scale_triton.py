"""Triton kernels of scaling and merging branches.

    forward   y = Σ_b gate_b·x_b, or each in its slot            reads every x_b, writes y
    backward  dgate_b = Σ_s dy_b·x_b, dx_b = gate_b·dy_b          reads dy and every x_b, writes every dx_b
    apply     dx_b = gate_b·dy_b + dpooled/S                      reads dy, writes every dx_b

One program has the same tile of every branch, so that dy is read once where branches are summed. The backward without
dx is `branch_scale_reduce`. Branches in one tensor, and slots of a concatenated map, are views of it.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tile
from ..layout import accumulator
from . import branches
from .branch_scale import parts_of
from .branches import Eight
from .scale_triton import merge_sums


@triton.jit
def _branch_scale_fwd_kernel(
    x_ptr, x1_ptr, x2_ptr, x3_ptr, x4_ptr, x5_ptr, x6_ptr, x7_ptr, gate_ptr,
    y_ptr, y1_ptr, y2_ptr, y3_ptr, y4_ptr, y5_ptr, y6_ptr, y7_ptr, A, B,
    x_sn, x_sr, x1_sn, x1_sr, x2_sn, x2_sr, x3_sn, x3_sr, x4_sn, x4_sr, x5_sn, x5_sr, x6_sn, x6_sr, x7_sn, x7_sr,
    y_sn, y_sr,
    COUNT: tl.constexpr, SUM: tl.constexpr,
    ACC: tl.constexpr, PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, V: tl.constexpr, BIG: tl.constexpr,
):  # fmt: skip
    xs = (x_ptr, x1_ptr, x2_ptr, x3_ptr, x4_ptr, x5_ptr, x6_ptr, x7_ptr)
    sn = (x_sn, x1_sn, x2_sn, x3_sn, x4_sn, x5_sn, x6_sn, x7_sn)
    sr = (x_sr, x1_sr, x2_sr, x3_sr, x4_sr, x5_sr, x6_sr, x7_sr)
    ys = (y_ptr, y1_ptr, y2_ptr, y3_ptr, y4_ptr, y5_ptr, y6_ptr, y7_ptr)
    n, a, col, head = tile.spot(A, B, PLANES, ROWS, COLS, V, BIG)
    mask = tile.owned(a, col, head, A, B, V)
    total = tl.zeros((ROWS, COLS), ACC)
    for b in tl.static_range(COUNT):
        gates = tile.channel(gate_ptr, n * COUNT + b, a, col, A, B, ACC, PLANES)
        v = tl.load(tile.at(xs[b], n, a, col, sn[b], sr[b], V), mask=mask, other=0).to(ACC)
        v = v * tile.pick(gates, col, head, B, PLANES, V)
        if SUM:
            total += v
        else:
            tl.store(tile.at(ys[b], n, a, col, y_sn, y_sr, V), v.to(y_ptr.dtype.element_ty), mask=mask)
    if SUM:
        tl.store(tile.at(y_ptr, n, a, col, y_sn, y_sr, V), total.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _branch_scale_bwd_kernel(
    x_ptr, x1_ptr, x2_ptr, x3_ptr, x4_ptr, x5_ptr, x6_ptr, x7_ptr,
    dy_ptr, dy1_ptr, dy2_ptr, dy3_ptr, dy4_ptr, dy5_ptr, dy6_ptr, dy7_ptr,
    gate_ptr, dgate_ptr, dx_ptr, dx1_ptr, dx2_ptr, dx3_ptr, dx4_ptr, dx5_ptr, dx6_ptr, dx7_ptr, A, B, STEPS,
    CHANNELS,
    x_sn, x_sr, x1_sn, x1_sr, x2_sn, x2_sr, x3_sn, x3_sr, x4_sn, x4_sr, x5_sn, x5_sr, x6_sn, x6_sr, x7_sn, x7_sr,
    dy_sn, dy_sr, dx_sn, dx_sr, COUNT: tl.constexpr, SUM: tl.constexpr,
    ACC: tl.constexpr, PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, V: tl.constexpr, BIG: tl.constexpr,
):  # fmt: skip
    xs = (x_ptr, x1_ptr, x2_ptr, x3_ptr, x4_ptr, x5_ptr, x6_ptr, x7_ptr)
    sn = (x_sn, x1_sn, x2_sn, x3_sn, x4_sn, x5_sn, x6_sn, x7_sn)
    sr = (x_sr, x1_sr, x2_sr, x3_sr, x4_sr, x5_sr, x6_sr, x7_sr)
    dys = (dy_ptr, dy1_ptr, dy2_ptr, dy3_ptr, dy4_ptr, dy5_ptr, dy6_ptr, dy7_ptr)
    dxs = (dx_ptr, dx1_ptr, dx2_ptr, dx3_ptr, dx4_ptr, dx5_ptr, dx6_ptr, dx7_ptr)
    n, block = tile.sample(tl.cdiv(A, ROWS) if PLANES else tl.cdiv(B, COLS))
    a, col, head = tile.place(block, block, A, B, PLANES, ROWS, COLS, V, BIG)
    gates, sums = (), ()
    for b in tl.static_range(COUNT):
        sums = sums + (tl.zeros((ROWS, COLS), ACC),)  # noqa: RUF005
        if dx_ptr is not None:
            gates = gates + (tile.channel(gate_ptr, n * COUNT + b, a, col, A, B, ACC, PLANES),)  # noqa: RUF005
    first, last = tile.share(A, B, STEPS, PLANES, ROWS, COLS, V)
    for step in range(first, last):
        a, col, head = tile.place(
            block if PLANES else step, step if PLANES else block, A, B, PLANES, ROWS, COLS, V, BIG
        )
        read, inside = tile.touched(a, col, head, A, B, V), tile.inside(a, col, head, A, B)
        write = tile.owned(a, col, head, A, B, V)
        dy = tl.load(tile.at(dy_ptr, n, a, col, dy_sn, dy_sr, V), mask=read, other=0).to(ACC)
        new = ()
        for b in tl.static_range(COUNT):
            if b > 0 and not SUM:
                dy = tl.load(tile.at(dys[b], n, a, col, dy_sn, dy_sr, V), mask=read, other=0).to(ACC)
            x = tl.load(tile.at(xs[b], n, a, col, sn[b], sr[b], V), mask=read, other=0).to(ACC)
            new = new + (sums[b] + tl.where(inside, dy * x, 0),)  # noqa: RUF005
            if dx_ptr is not None:
                dx = dy * tile.pick(gates[b], col, head, B, PLANES, V)
                tl.store(tile.at(dxs[b], n, a, col, dx_sn, dx_sr, V), dx.to(dx_ptr.dtype.element_ty), mask=write)
        sums = new
    for b in tl.static_range(COUNT):
        to, mask = tile.channels(n * COUNT + b, block, A, B, CHANNELS, PLANES, ROWS, COLS)
        tl.store(dgate_ptr + to, tl.sum(sums[b], 1 if PLANES else 0).to(dgate_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _branch_scale_apply_kernel(
    dy_ptr, dy1_ptr, dy2_ptr, dy3_ptr, dy4_ptr, dy5_ptr, dy6_ptr, dy7_ptr, gate_ptr, add_ptr,
    dx_ptr, dx1_ptr, dx2_ptr, dx3_ptr, dx4_ptr, dx5_ptr, dx6_ptr, dx7_ptr, A, B,
    dy_sn, dy_sr, dx_sn, dx_sr, COUNT: tl.constexpr, SUM: tl.constexpr, EACH: tl.constexpr,
    ACC: tl.constexpr, PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, V: tl.constexpr, BIG: tl.constexpr,
):  # fmt: skip
    dys = (dy_ptr, dy1_ptr, dy2_ptr, dy3_ptr, dy4_ptr, dy5_ptr, dy6_ptr, dy7_ptr)
    dxs = (dx_ptr, dx1_ptr, dx2_ptr, dx3_ptr, dx4_ptr, dx5_ptr, dx6_ptr, dx7_ptr)
    n, a, col, head = tile.spot(A, B, PLANES, ROWS, COLS, V, BIG)
    mask = tile.owned(a, col, head, A, B, V)
    S = B if PLANES else A
    dy = tl.load(tile.at(dy_ptr, n, a, col, dy_sn, dy_sr, V), mask=mask, other=0).to(ACC)
    for b in tl.static_range(COUNT):
        if b > 0 and not SUM:
            dy = tl.load(tile.at(dys[b], n, a, col, dy_sn, dy_sr, V), mask=mask, other=0).to(ACC)
        gate = tile.pick(tile.channel(gate_ptr, n * COUNT + b, a, col, A, B, ACC, PLANES), col, head, B, PLANES, V)
        at = n * COUNT + b if EACH else n
        add = tile.pick(tile.channel(add_ptr, at, a, col, A, B, ACC, PLANES), col, head, B, PLANES, V)
        dx = dy * gate + add / S
        tl.store(tile.at(dxs[b], n, a, col, dx_sn, dx_sr, V), dx.to(dx_ptr.dtype.element_ty), mask=mask)


def eight(tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """A kernel's eight pointers: None for those that aren't there."""
    return [*tensors, *(None,) * (branches.MOST - len(tensors))]


def steps(strides: Sequence[tuple[int, int]]) -> list[int]:
    """A kernel's eight pairs of strides."""
    return [step for pair in strides for step in pair] + [0, 0] * (branches.MOST - len(strides))


def distinct(tensors: list[Tensor], merge: str) -> list[Tensor]:
    """Each branch's share of a merged map, once."""
    return tensors[:1] if merge == "sum" else tensors


def branch_scale(
    x: Tensor, gate: Tensor, x1: Tensor | None, x2: Tensor | None, x3: Tensor | None, x4: Tensor | None,
    x5: Tensor | None, x6: Tensor | None, x7: Tensor | None, merge: str,
) -> Tensor:  # fmt: skip
    count, channels = gate.shape[1], gate.shape[2]
    y = branches.beside(x, channels if merge == "sum" else count * channels)
    xs = branches.split(branches.given(x, (x1, x2, x3, x4, x5, x6, x7)), count)
    ys = distinct(parts_of(y, merge, count), merge)
    w = tile.walk(*xs, ys[0])
    tile.launch(
        _branch_scale_fwd_kernel, w.grid, x, *eight(xs), gate.contiguous(), *eight(ys), w.a, w.b,
        *steps(w.strides[:count]), *w.strides[count], COUNT=count, SUM=merge == "sum", **w.meta,
    )  # fmt: skip
    return y


def gradients(x: Tensor, count: int, inside: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Uninitialised gradients of the tensors that hold the branches, and of the branches."""
    tensors = [torch.empty_like(x) for _ in range(1 if inside else count)]
    return tensors, branches.split(tensors, count)


def backward_sums(
    xs: list[Tensor], dy: Tensor, gate: Tensor, dxs: list[Tensor], dtype: torch.dtype, merge: str
) -> Tensor:
    """Returns dgate (N, B, C) in `dtype`, and fills dxs where there are any."""
    count, x = len(xs), xs[0]
    dys = distinct(parts_of(dy, merge, count), merge)
    w = tile.walk(*xs, dys[0], *dxs[:1], sums=True)
    dgate = torch.empty(gate.shape, dtype=dtype, device=x.device)
    # Sums of more than four branches don't fit in the registers of one thread's share of a tile: it gets half of it.
    meta = w.meta if count <= 4 else {**w.meta, "num_warps": 2 * w.meta["num_warps"]}
    whole = w.splits == 1
    part = dgate if whole else dgate.new_empty((w.splits, gate.numel()), dtype=accumulator(x.dtype))
    tile.launch(
        _branch_scale_bwd_kernel, w.grid, x, *eight(xs), *eight(dys), gate.contiguous(), part, *eight(dxs),
        w.a, w.b, w.steps, gate.numel(), *steps(w.strides[:count]), *w.strides[count],
        *(w.strides[count + 1] if dxs else (0, 0)), COUNT=count, SUM=merge == "sum", **meta,
    )  # fmt: skip
    if not whole:
        merge_sums(part, dgate)
    return dgate


def branch_scale_bwd(
    x: Tensor, gate: Tensor, dy: Tensor, x1: Tensor | None, x2: Tensor | None, x3: Tensor | None, x4: Tensor | None,
    x5: Tensor | None, x6: Tensor | None, x7: Tensor | None, merge: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    count, given = gate.shape[1], branches.given(x, (x1, x2, x3, x4, x5, x6, x7))
    tensors, dxs = gradients(x, count, len(given) == 1)
    dgate = backward_sums(branches.split(given, count), dy, gate, dxs, gate.dtype, merge)
    return (dgate, *branches.filled(tensors, x))


def apply_gates(x: Tensor, dy: Tensor, gate: Tensor, dpooled: Tensor, merge: str) -> Eight:
    """dx_b = gate_b·dy_b + dpooled/S, in tensors like x."""
    count = gate.shape[1]
    tensors, dxs = gradients(x, count, x.shape[1] == count * gate.shape[2])
    dys = distinct(parts_of(dy, merge, count), merge)
    w = tile.walk(dys[0], dxs[0])
    tile.launch(
        _branch_scale_apply_kernel, w.grid, dy, *eight(dys), gate.contiguous(), dpooled.contiguous(), *eight(dxs),
        w.a, w.b, *w.strides[0], *w.strides[1], COUNT=count, SUM=merge == "sum", EACH=dpooled.dim() == 3, **w.meta,
    )  # fmt: skip
    return branches.filled(tensors, x)


__all__ = ["apply_gates", "backward_sums", "branch_scale", "branch_scale_bwd"]
