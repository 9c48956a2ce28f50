"""The launches of branches that are merged and mapped: those of one map, for each branch and its slot.

Slots of the merged map are views of it, which the kernels walk as they are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import branches
from .affine_apply_triton import fill
from .affine_kernels import sums
from .branch_scale import parts_of
from .branches import Eight
from .channel_moments_triton import channel_moments
from .moments_affine_apply_triton import moments_affine_apply


def _own(t: Tensor | None, merge: str, count: int) -> Sequence[Tensor | None]:
    """Each branch's numbers (N, C), dense, of those of all; one copy."""
    if t is None:
        return [None] * count
    dense = t.unflatten(1, (count, -1)).transpose(0, 1).contiguous()
    return [dense[slot] for slot in branches.slots(merge, count)]


def _all(found: Sequence[Tensor], merge: str) -> Tensor:
    """The numbers (2, N, B·C) of all, of each branch's."""
    return torch.cat([found[slot] for slot in branches.slots(merge, len(found))], 2)


def branch_moments(
    x: Tensor, x1: Tensor | None, x2: Tensor | None, x3: Tensor | None, x4: Tensor | None, x5: Tensor | None,
    x6: Tensor | None, x7: Tensor | None, merge: str,
) -> Tensor:  # fmt: skip
    return _all([channel_moments(t, False)[0] for t in branches.given(x, (x1, x2, x3, x4, x5, x6, x7))], merge)


def branch_affine(
    x: Tensor, scale: Tensor, shift: Tensor, centre: Tensor | None, x1: Tensor | None, x2: Tensor | None,
    x3: Tensor | None, x4: Tensor | None, x5: Tensor | None, x6: Tensor | None, x7: Tensor | None, merge: str,
    act: str, slope: float,
) -> Tensor:  # fmt: skip
    maps = branches.given(x, (x1, x2, x3, x4, x5, x6, x7))
    y, count = branches.beside(x, len(maps) * x.shape[1]), len(maps)
    small = [_own(t, merge, count) for t in (scale, shift, centre)]
    for t, by, to, at, part in zip(maps, *small, parts_of(y, merge, count), strict=True):
        assert by is not None
        assert to is not None
        fill(t, by, to, at, None, None, part, act, slope)
    return y


def branch_affine_reduce(
    x: Tensor, dy: Tensor, scale: Tensor, shift: Tensor, centre: Tensor | None, x1: Tensor | None, x2: Tensor | None,
    x3: Tensor | None, x4: Tensor | None, x5: Tensor | None, x6: Tensor | None, x7: Tensor | None, merge: str,
    act: str, slope: float,
) -> Tensor:  # fmt: skip
    maps = branches.given(x, (x1, x2, x3, x4, x5, x6, x7))
    small = [_own(t, merge, len(maps)) for t in (scale, shift, centre)]
    found = []
    for t, by, to, at, d in zip(maps, *small, parts_of(dy, merge, len(maps)), strict=True):
        assert by is not None
        assert to is not None
        found.append(sums(t, d, by, to, at, None, None, act, slope, None, None))
    return _all(found, merge)


def branch_affine_apply(
    x: Tensor, dy: Tensor, scale: Tensor, shift: Tensor, centre: Tensor | None, tilt: Tensor | None,
    level: Tensor | None, x1: Tensor | None, x2: Tensor | None, x3: Tensor | None, x4: Tensor | None,
    x5: Tensor | None, x6: Tensor | None, x7: Tensor | None, merge: str, act: str, slope: float,
) -> Eight:  # fmt: skip
    maps = branches.given(x, (x1, x2, x3, x4, x5, x6, x7))
    small = [_own(t, merge, len(maps)) for t in (scale, shift, centre, tilt, level)]
    found = []
    for t, by, to, at, tilted, flat, d in zip(maps, *small, parts_of(dy, merge, len(maps)), strict=True):
        apply = moments_affine_apply
        found.append(apply(t, d, by, to, at, None, None, tilted, flat, None, None, act, slope))
    return branches.filled(found, x)


__all__ = ["branch_affine", "branch_affine_apply", "branch_affine_reduce", "branch_moments"]
