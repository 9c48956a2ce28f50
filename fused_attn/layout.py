"""How a feature map lies in memory, read off its strides: kernels walk it as it is, and nothing is copied or converted.

A tensor (N, C, *S) that a kernel can walk has spatial dimensions that collapse into one of stride `ss`. Two layouts
matter:

    planes  ss = 1            each (n, c) is a run of S elements        NCHW, and slices of it along N or C
    pixels  sc = 1, ss ≥ C    each (n, s) is a run of C elements        channels_last, and slices of it along N or C
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """A walkable feature map: sizes N, C, S (the spatial product) and the strides of each, in elements."""

    kind: str  # "planes" or "pixels"
    n: int
    c: int
    s: int
    sn: int
    sc: int
    ss: int


def layout(x: Tensor, prefer: str = "planes") -> Layout | None:
    """The layout of x: (N, C, *S), or None where no kernel can walk it. `prefer` decides where both fit (S = 1 or C =
    1)."""
    shape, stride = x.shape, x.stride()
    n, c = shape[0], shape[1]
    s, ss = 1, 1
    for size, st in zip(reversed(shape[2:]), reversed(stride[2:]), strict=True):
        if size == 1:
            continue
        if s == 1:
            ss = st
        elif st != ss * s:
            return None
        s *= size
    sn, sc = stride[0], stride[1]
    # A stride that is never stepped over says nothing: give it the value of the dense layout.
    planes = ss == 1 or s <= 1
    pixels = (sc == 1 or c <= 1) and (ss >= c or s <= 1)
    kind = prefer if planes and pixels else "planes" if planes else "pixels" if pixels else None
    if kind is None:
        return None
    if kind == "planes":
        return Layout(kind, n, c, s, sn if n > 1 else c * s, sc if c > 1 else s, 1)
    return Layout(kind, n, c, s, sn if n > 1 else c * s, 1, ss if s > 1 else c)


_KINDS = ("planes", "pixels")


def walkable(x: Tensor) -> bool:
    """Whether a compiled kernel can walk x without a copy. The usual two layouts are answered without arithmetic."""
    return x.is_contiguous() or layout(x) is not None


def same_kind(x: Tensor, other: Tensor) -> bool:
    """Whether one kernel can walk both: the strides may differ, the order of elements may not."""
    if x.is_contiguous() and other.is_contiguous():
        return True
    # One channel is planes and pixels at once; what is made like x then has the kind that x's own strides say.
    first = layout(x)
    kinds = ("planes",) if first is not None and first.c == 1 < first.s and first.kind == "planes" else _KINDS
    for kind in kinds:
        a, b = layout(x, kind), layout(other, kind)
        if a is not None and b is not None and a.kind == b.kind:
            return True
    return False


def match(grad: Tensor, x: Tensor) -> Tensor:
    """`grad` in a layout that can be walked beside x. A gradient that is expanded, or of the other memory format, is
    copied once."""
    return grad if same_kind(x, grad) else torch.empty_like(x, dtype=grad.dtype).copy_(grad)


def like(x: Tensor, value: Tensor) -> Tensor:
    """`value` with the strides that `torch.empty_like(x)` would have, so that every backend returns the same
    strides."""
    want = torch.empty_like(x, dtype=value.dtype, device="meta").stride()
    return value if value.stride() == want else torch.empty_like(x, dtype=value.dtype).copy_(value)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, descriptors and gates for a feature map of this dtype: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
