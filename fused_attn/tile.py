"""What Triton kernels share: how a feature map is walked, formulas on loaded tiles, launch parameters.

A feature map is N samples of A rows of B elements, the elements of a row side by side (layout.py):

    planes  A = C, B = S    a value per channel is a value per row       sums over S run along rows
    pixels  A = S, B = C    a value per channel is a value per column    sums over S run across rows

A program holds a tile (ROWS, COLS) of one sample. So that every load and store moves 16 bytes whatever S is (49 is
odd), memory is cut into aligned vectors of V elements, and a tile's columns count from the vector where its row starts:

    row a of planes starts `head` = (a·B) mod V elements into its first vector
    touched  vectors that hold an element of the row: what a sum loads, and then takes the lanes `inside` the row
    owned    vectors that start in the row: what is stored; lanes past its end belong to the next row, and take its gate

Pixels have whole vectors in every row (head = 0). Where vectors don't fit (see `_walk`), V is 1: all this falls away.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .layout import layout

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
LAST = tl.constexpr(2**31 - 1)  # a position that loses against every real one

ACC = {torch.float64: tl.float64}  # the dtype of sums for a feature map, float32 unless it is here
WARP = 64 if torch.version.hip else 32
# Fusing is the default until triton 3.10. The register limit makes ptxas schedule eight GELUs one after another, which
# it otherwise interleaves at the cost of occupancy; nothing spills under it (tests/test_triton_aot.py).
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True, **({} if torch.version.hip else {"maxnreg": 128})}
THREADS = 128  # small blocks: many of them on a multiprocessor keep enough loads in flight, and no kernel needs more


class Walk(NamedTuple):
    """How one launch walks its feature maps: sizes, V, tile, grid, and (sn, sr) per map, in elements."""

    planes: bool
    n: int
    a: int
    b: int
    grid: tuple[int, int]
    steps: (
        int  # tiles along the summed dimension in one program; the grid's second size says how many programs share it
    )
    strides: tuple[tuple[int, int], ...]
    meta: dict[str, Any]

    @property
    def splits(self) -> int:
        """How many partial sums each channel has."""
        return self.grid[1]


def walk(*maps: Tensor | None, sums: bool = False) -> Walk:
    """The walk of a launch over feature maps of one kind, x first; None stands for a map that a call doesn't have."""
    x: Any = maps[0]
    # Of no elements, strides may be anything.
    strides = (lambda m: m.stride()) if x.numel() else (lambda m: torch.empty(m.shape, device="meta").stride())
    return _walk(sums, x.dtype, tuple(m if m is None else (m.shape, strides(m)) for m in maps))


@lru_cache(maxsize=1024)
def _walk(sums: bool, dtype: torch.dtype, maps: tuple[tuple[Sequence[int], Sequence[int]] | None, ...]) -> Walk:
    tensors = [m and torch.empty_strided(*m, device="meta") for m in maps]
    # One pixel is a row of channels, whole vectors of them; otherwise what is contiguous is planes.
    order = ("pixels", "planes") if set(tensors[0].shape[2:]) == {1} else ("planes", "pixels")  # type: ignore[union-attr]
    for kind in order:
        found = [t if t is None else layout(t, kind) for t in tensors]
        present = [f for f in found if f is not None]
        if len(present) == sum(t is not None for t in tensors) and all(f.kind == kind for f in present):
            break
    else:
        raise AssertionError("backend.refusal lets no maps through that one kernel can't walk")
    planes, n, c, s = kind == "planes", present[0].n, present[0].c, present[0].s
    a, b = (c, s) if planes else (s, c)
    row = [f and (f.sn, f.sc if planes else f.ss) for f in found]
    strides = [r for r in row if r is not None]
    v = 16 // dtype.itemsize
    # Vectors may cross from row to row of planes, so rows must follow each other; none may leave its sample.
    fits = all(sn % v == 0 and (sr == b if planes else sr % v == 0) for sn, sr in strides)
    if not fits or b < v or (a * b if planes else b) % v:
        v = 1
    run = b + v - 1 if planes else b
    rows, cols, warps = _tile(planes, a, run, dtype.itemsize, sums, len(strides) > (1 if sums else 2))
    grid, steps = _share(planes, n, triton.cdiv(a, rows), triton.cdiv(run, cols), sums)
    meta = dict(
        ACC=ACC.get(dtype, tl.float32), PLANES=planes, ROWS=rows, COLS=cols, V=v,
        BIG=max(a * sr + b for _, sr in strides) >= 2**31, num_warps=warps, **OPTIONS,
    )  # fmt: skip
    return Walk(planes, n, a, b, grid, steps, tuple(r or (0, 0) for r in row), meta)


# The heuristic table. A thread has two loads of 16 bytes in flight, or more.
#               vectors a thread                          columns of a tile (contiguous)
#   pointwise   2; 1 where it reads several maps          512 bytes: one load of a warp
#   sum         the same: each element keeps its sums     planes 512 bytes: a row ends inside a warp, by shuffles
#               in registers                              pixels 128 bytes: a cache line, by many rows
def _tile(planes: bool, a: int, run: int, itemsize: int, sums: bool, several: bool) -> tuple[int, int, int]:
    """ROWS, COLS, num_warps."""
    elements = THREADS * (16 if several else 32) // itemsize
    cols = min(triton.next_power_of_2(run), (128 if sums and not planes else 512) // itemsize)
    rows = min(triton.next_power_of_2(a), elements // cols)
    cols = min(triton.next_power_of_2(run), elements // rows)  # few rows: longer ones
    # A tile smaller than the block would load it twice, or in narrower pieces.
    threads = min(THREADS, triton.next_power_of_2(max(1, rows * cols * itemsize // 16)))
    return rows, cols, max(1, threads // WARP)


def _share(planes: bool, n: int, down: int, along: int, sums: bool) -> tuple[tuple[int, int], int]:
    """The grid, and how many tiles one program sums.

    Sums are split, which costs a launch, where programs would be too few to keep memory busy: 4 KB on the way for each,
    of the 3 MB that an H200 needs (4.3 TB/s for 0.7 µs).
    """
    if not sums:
        return (n * down * along, 1), 1
    programs, tiles = (n * down, along) if planes else (n * along, down)
    splits = 1 if programs >= 768 else max(1, min(triton.cdiv(1024, max(programs, 1)), tiles // 4))
    steps = triton.cdiv(tiles, splits)
    return (programs, triton.cdiv(tiles, steps)), steps


def launch(kernel: Any, grid: tuple[int, ...], x: Tensor, *args: Any, **meta: Any) -> None:
    """Runs a kernel on x's device; an empty grid is no launch."""
    if 0 in grid:
        return
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            kernel[grid](*args, **meta)
    else:
        kernel[grid](*args, **meta)


@triton.jit
def sample(blocks):
    """This program's sample, in 64 bits (its address is one multiplication), and its block among the sample's."""
    n = tl.program_id(0) // blocks
    return n.to(tl.int64), tl.program_id(0) - n * blocks


@triton.jit
def share(A, B, STEPS, PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, V: tl.constexpr):
    """The first of the tiles along the summed dimension that are this program's share, and the end of them."""
    tiles = tl.cdiv(B + V - 1, COLS) if PLANES else tl.cdiv(A, ROWS)
    first = tl.program_id(1) * STEPS
    return first, tl.minimum(first + STEPS, tiles)


@triton.jit
def channels(n, block, A, B, CHANNELS, PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Where this program's partial sums go in (splits, N, C), and which of them there are."""
    if PLANES:
        c, C = block * ROWS + tl.arange(0, ROWS), A
    else:
        c, C = block * COLS + tl.arange(0, COLS), B
    return tl.program_id(1) * CHANNELS + n * C + c, c < C


@triton.jit
def place(row_block, col_block, A, B, PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, V: tl.constexpr,
          BIG: tl.constexpr):  # fmt: skip
    """Rows (ROWS, 1), columns (1, COLS), and where each row starts in its first vector (ROWS, 1)."""
    if BIG:
        row_block, col_block = row_block.to(tl.int64), col_block.to(tl.int64)
    a = row_block * ROWS + tl.arange(0, ROWS)[:, None]
    col = col_block * COLS + tl.arange(0, COLS)[None, :]
    head = a * 0
    if PLANES and V > 1:
        head = a * B % V
    return a, col, head


@triton.jit
def spot(A, B, PLANES: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, V: tl.constexpr, BIG: tl.constexpr):
    """This program's sample and tile in a pointwise launch. One grid dimension: the others end at 65535."""
    along = tl.cdiv(B + V - 1 if PLANES else B, COLS)
    n, block = sample(tl.cdiv(A, ROWS) * along)
    a, col, head = place(block // along, block % along, A, B, PLANES, ROWS, COLS, V, BIG)
    return n, a, col, head


@triton.jit
def touched(a, col, head, A, B, V: tl.constexpr):
    """Vectors that hold an element of the row. Compared by their first column: one truth value each, so wide loads."""
    return (a < A) & (col // V * V < head + B)


@triton.jit
def owned(a, col, head, A, B, V: tl.constexpr):
    """Vectors that start in the row."""
    return (a < A) & (col // V * V < head + B) & (col // V * V >= head)


@triton.jit
def inside(a, col, head, A, B):
    """Elements of the row."""
    return (a < A) & (col >= head) & (col < head + B)


@triton.jit
def at(ptr, n, a, col, sn, sr, V: tl.constexpr):
    """Addresses of a tile of a feature map. Rounded down to vectors, which the compiler then knows to be aligned."""
    return ptr + n * sn // V * V + (a * sr // V * V + col)


@triton.jit
def channel(ptr, n, a, col, A, B, ACC: tl.constexpr, PLANES: tl.constexpr):
    """A tensor (N, C): its value for each row, or column; and, of planes, for each next row."""
    if PLANES:
        here = tl.load(ptr + n * A + a, mask=a < A, other=0).to(ACC)
        after = tl.load(ptr + n * A + a + 1, mask=a + 1 < A, other=0).to(ACC)
    else:
        here = tl.load(ptr + n * B + col, mask=col < B, other=0).to(ACC)
        after = here
    return here, after


@triton.jit
def pick(pair, col, head, B, PLANES: tl.constexpr, V: tl.constexpr):
    """What `channel` read, for every element of the owned vectors."""
    if PLANES and V > 1:
        return tl.where(col < head + B, pair[0], pair[1])
    else:
        return pair[0]


@triton.jit
def sigmoid(v):
    return 1 / (1 + tl.exp(-v))


@triton.jit
def activate(v, ACT: tl.constexpr, SLOPE: tl.constexpr, weight):
    """ops/activations.py's table on a tile. NaN passes through each: comparisons send it into v's branch."""
    if ACT == "identity":
        return v
    elif ACT == "relu":
        return tl.where(v <= 0, 0.0, v)
    elif ACT == "relu6":
        return tl.where(v <= 0, 0.0, tl.where(v >= 6, 6.0, v))
    elif ACT == "leaky_relu":
        return tl.where(v > 0, v, v * SLOPE)
    elif ACT == "prelu":
        return tl.where(v > 0, v, v * weight)
    elif ACT == "silu":
        return v / (1 + tl.exp(-v))
    elif ACT == "gelu":
        return 0.5 * v * (1 + tl.erf(v * _SQRT_HALF))
    elif ACT == "hardswish":
        return v * tl.where(v <= -3, 0.0, tl.where(v >= 3, 6.0, v + 3)) / 6
    elif ACT == "sigmoid":
        return sigmoid(v)
    elif ACT == "hard_sigmoid":
        return tl.where(v <= -3, 0.0, tl.where(v >= 3, 6.0, v + 3)) / 6
    else:
        tl.static_assert(ACT == "clamp", "an activation that tile.py doesn't know")
        return tl.where(v <= 0, 0.0, tl.where(v >= 1, 1.0, v))


@triton.jit
def cut(g, d):
    """g·d, and 0 where the derivative d is 0, whatever is cut there."""
    return tl.where(d == 0, 0.0, g * d)


@triton.jit
def derivative(v, ACT: tl.constexpr, SLOPE: tl.constexpr, weight):
    """d act(v) / dv, as ops/activations.py has it."""
    if ACT == "identity":
        return tl.full(v.shape, 1, v.dtype)
    elif ACT == "relu":
        return tl.where(v <= 0, 0.0, tl.full(v.shape, 1, v.dtype))  # passes NaN, as torch does
    elif ACT == "relu6":
        return ((v > 0) & (v < 6)).to(v.dtype)
    elif ACT == "leaky_relu":
        return tl.where(v > 0, tl.full(v.shape, 1, v.dtype), SLOPE)
    elif ACT == "prelu":
        return tl.where(v > 0, 1.0, weight)
    elif ACT == "silu":
        return sigmoid(v) * (1 + v * (1 - sigmoid(v)))
    elif ACT == "gelu":
        return 0.5 * (1 + tl.erf(v * _SQRT_HALF)) + v * tl.exp(-0.5 * v * v) * _INV_SQRT_2PI
    elif ACT == "hardswish":
        return tl.where(v <= -3, 0.0, tl.where(v >= 3, 1.0, v / 3 + 0.5))
    elif ACT == "sigmoid":
        return sigmoid(v) * (1 - sigmoid(v))
    elif ACT == "hard_sigmoid":
        return ((v > -3) & (v < 3)).to(v.dtype) / 6
    else:
        tl.static_assert(ACT == "clamp", "an activation that tile.py doesn't know")
        return ((v >= 0) & (v <= 1)).to(v.dtype)


@triton.jit
def nan_max(best, axis: tl.constexpr):
    """The maximum along an axis; NaN if there is one: tl.max alone drops it, tl.reduce crawls in the interpreter."""
    nan = best != best
    most = tl.max(tl.where(nan, float("-inf"), best), axis)
    return tl.where(tl.max(nan.to(tl.int32), axis) > 0, float("nan"), most)
