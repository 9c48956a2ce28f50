"""The two halves of `branch_softmax`'s backward are kernels of branch_scale_triton.py, one without its map outputs."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from torch import Tensor

from ..layout import accumulator
from . import branches
from .branch_scale_triton import apply_gates as branch_scale_apply
from .branch_scale_triton import backward_sums


def branch_scale_reduce(
    x: Tensor, dy: Tensor, gate: Tensor, x1: Tensor | None, x2: Tensor | None, x3: Tensor | None, x4: Tensor | None,
    x5: Tensor | None, x6: Tensor | None, x7: Tensor | None, merge: str,
) -> Tensor:  # fmt: skip
    xs = branches.split(branches.given(x, (x1, x2, x3, x4, x5, x6, x7)), gate.shape[1])
    return backward_sums(xs, dy, gate, [], accumulator(x.dtype), merge)


__all__ = ["branch_scale_apply", "branch_scale_reduce"]
