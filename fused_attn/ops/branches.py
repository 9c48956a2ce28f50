"""What the ops over branches share: which tensors hold the branches, and how what they are merged into lies in memory.

B branches of C channels each are B tensors (N, C, *S), or one tensor (N, B·C, *S) that holds branch 0's channels, then
branch 1's, and so on: what one grouped convolution gives, whose gradient is then one tensor, too.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..layout import layout, same_kind
from . import checks

MERGES = ("sum", "concat", "concat_reversed")
MOST = 8
# One gradient for each branch there may be; empty for those that there aren't, as an operator can't return None.
Eight = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def given(x: Tensor, more: Sequence[Tensor | None]) -> list[Tensor]:
    """The tensors there are."""
    return [x, *(t for t in more if t is not None)]


def split(tensors: Sequence[Tensor], count: int) -> list[Tensor]:
    """The branches, each (N, C, *S), as views."""
    if len(tensors) == count:
        return list(tensors)
    x, channels = tensors[0], tensors[0].shape[1] // count
    return [x.narrow(1, b * channels, channels) for b in range(count)]


def slots(merge: str, count: int) -> list[int]:
    """Where each branch's channels go in what is concatenated."""
    return list(range(count))[::-1] if merge == "concat_reversed" else list(range(count))


def beside(x: Tensor, channels: int) -> Tensor:
    """An empty feature map of this many channels that lies as x does; every backend gives it these strides."""
    if channels == x.shape[1]:
        return torch.empty_like(x)
    found = None if x.is_contiguous() else layout(x)
    if found is not None and found.kind == "pixels":
        return x.new_empty((x.shape[0], *x.shape[2:], channels)).movedim(-1, 1)
    return x.new_empty((x.shape[0], channels, *x.shape[2:]))


def lying(x: Tensor, value: Tensor) -> Tensor:
    """`value` with the strides of `beside`."""
    want = beside(x, value.shape[1])
    return value if value.stride() == want.stride() else want.copy_(value)


def match(grad: Tensor, x: Tensor) -> Tensor:
    """`grad` in a layout that can be walked beside x, whatever its channels: copied at most once."""
    return grad if same_kind(x, grad) else beside(x, grad.shape[1]).copy_(grad)


def filled(tensors: Sequence[Tensor], x: Tensor) -> Eight:
    """Eight outputs of an operator."""
    return (*tensors, *(x.new_empty((0,)) for _ in range(MOST - len(tensors))))  # type: ignore[return-value]


def written(x: Tensor, more: Sequence[Tensor | None], gate: Tensor, merge: str) -> float:
    """How large the merged map is, in maps of x's size."""
    inside = len(given(x, more)) == 1
    if merge == "sum":
        return 1 / gate.shape[1] if inside else 1
    return 1 if inside else gate.shape[1]


def check(x: Tensor, more: Sequence[Tensor | None], count: int, what: str) -> None:
    """Complains about branches that aren't `count` maps of one shape, or one map that holds them all."""
    checks.feature_map("x", x)
    for i, t in enumerate(more, 1):
        checks.like(f"x{i}", t, "x", x)
        if t is not None and i > 1 and more[i - 2] is None:
            raise ValueError(f"x{i} must follow x{i - 1}; got x{i - 1}=None")
    if not 1 <= count <= MOST:
        raise ValueError(f"{what} must be from 1 to {MOST}; got {count}")
    tensors = len(given(x, more))
    if tensors not in (1, count):
        raise ValueError(f"{what} must be the number of branches, {tensors}; got {count}")
    if tensors == 1 and x.shape[1] % count:
        raise ValueError(f"x must hold {count} branches of as many channels each; got shape {tuple(x.shape)}")


def check_gate(x: Tensor, gate: Tensor, more: Sequence[Tensor | None], merge: str) -> None:
    """Complains about branches, their gate (N, B, C), or the way they are merged."""
    checks.tensor("gate", gate)
    if gate.dim() != 3:
        raise ValueError(f"gate must have shape (N, B, C); got {tuple(gate.shape)}")
    count = gate.shape[1]
    check(x, more, count, "gate's second dimension")
    channels = x.shape[1] // count if len(given(x, more)) == 1 else x.shape[1]
    checks.shaped("gate", gate, (x.shape[0], count, channels), "(N, B, C)")
    checks.same_device("x", x, gate=gate)
    checks.one_of("merge", merge, MERGES)


def check_gradient(x: Tensor, gate: Tensor, dy: Tensor, merge: str) -> None:
    """Complains about a gradient that isn't the merged map's."""
    channels = gate.shape[2] if merge == "sum" else gate.shape[1] * gate.shape[2]
    checks.tensor("dy", dy)
    shape = (x.shape[0], channels, *x.shape[2:])
    if tuple(dy.shape) != shape or dy.dtype != x.dtype:
        raise ValueError(f"dy must be {x.dtype} of shape {shape}; got {dy.dtype} of shape {tuple(dy.shape)}")


def size(x: Tensor) -> int:
    """How many positions a plane has."""
    return math.prod(x.shape[2:])
