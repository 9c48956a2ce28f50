"""Branches scaled by gates of their own, and merged: one read of each branch, one write of what they are merged into.

    y[n, c, s]                = Σ_b gate[n, b, c] · x_b[n, c, s]        sum
    y[n, slot(b)·C + c, s]    = gate[n, b, c] · x_b[n, c, s]            concat; slot(b) = b, or B − 1 − b reversed

The select of selective kernels (arXiv:1903.06586, eq. 6) and of split attention (arXiv:2004.08955, eq. 2) is the sum;
PSA (arXiv:2105.14447, §3) concatenates, and its authors' code does so in reversed order. No published network
adds a residual or an activation right after, so there is none here. Backward, dy_b being dy or its slot's channels:

    dx_b = gate_b · dy_b,        dgate[n, b, c] = Σ_s dy_b · x_b
"""

import torch
from torch import Tensor

from ..layout import accumulator, like
from ..registry import case, op
from . import branches
from .branches import Eight
from .channel_pool import spread


def parts_of(dy: Tensor, merge: str, count: int) -> list[Tensor]:
    """Each branch's share of the merged map, as views."""
    if merge == "sum":
        return [dy] * count
    found = branches.split([dy], count) if count > 1 else [dy]
    return [found[slot] for slot in branches.slots(merge, count)]


def gradient_of_gates(maps: list[Tensor], dy: Tensor, merge: str) -> Tensor:
    """dgate (N, B, C) in the accumulation dtype."""
    acc = accumulator(dy.dtype)
    shares = parts_of(dy, merge, len(maps))
    return torch.stack([(t.to(acc) * d.to(acc)).flatten(2).sum(-1) for t, d in zip(maps, shares, strict=True)], 1)


def gradients_of_branches(x: Tensor, dy: Tensor, gate: Tensor, add: Tensor | None, merge: str) -> Eight:
    """dx_b = gate_b·dy_b + add_b, (N, C) or (N, B, C) spread: a tensor for each branch, or one where x holds them
    all."""
    acc, count = accumulator(x.dtype), gate.shape[1]
    found = []
    for b, d in enumerate(parts_of(dy, merge, count)):
        dx = d.to(acc) * spread(gate[:, b].to(acc), d)
        if add is not None:
            dx = dx + spread(add if add.dim() == 2 else add[:, b], d)
        found.append(dx.to(x.dtype))
    if x.shape[1] == gate.shape[2] * count:
        found = [torch.cat(found, 1)]
    return branches.filled([like(x, dx) for dx in found], x)


def formula(
    x: Tensor, gate: Tensor, x1: Tensor | None, x2: Tensor | None, x3: Tensor | None, x4: Tensor | None,
    x5: Tensor | None, x6: Tensor | None, x7: Tensor | None, merge: str,
) -> Tensor:  # fmt: skip
    """The equations above, in x's dtype, the arithmetic in the accumulation dtype."""
    acc, count = accumulator(x.dtype), gate.shape[1]
    maps = branches.split(branches.given(x, (x1, x2, x3, x4, x5, x6, x7)), count)
    scaled = [t.to(acc) * spread(gate[:, b].to(acc), t) for b, t in enumerate(maps)]
    if merge == "sum":
        return sum(scaled[1:], scaled[0]).to(x.dtype)
    return torch.cat([scaled[b] for b in branches.slots(merge, count)], 1).to(x.dtype)


def _check(
    x: Tensor, gate: Tensor, x1: Tensor | None, x2: Tensor | None, x3: Tensor | None, x4: Tensor | None,
    x5: Tensor | None, x6: Tensor | None, x7: Tensor | None, merge: str,
) -> None:  # fmt: skip
    branches.check_gate(x, gate, (x1, x2, x3, x4, x5, x6, x7), merge)


def _save(args: tuple, y: Tensor) -> tuple[tuple[Tensor | None, ...], tuple]:
    return args[:9], args[9:]


def _backward(saved: tuple, consts: tuple, grads: tuple, needs: tuple) -> tuple[Tensor | None, ...]:
    (x, gate, *more), (merge,) = saved, consts
    dgate, dx, *rest = branch_scale_bwd(x, gate, branches.match(grads[0], x), *more, merge)
    return dx, dgate, *(None if t is None else d for t, d in zip(more, rest, strict=True))


def _budget(x: Tensor, gate: Tensor, *rest: object) -> tuple[float, float]:
    *more, merge = rest
    return len(branches.given(x, more)), branches.written(x, more, gate, merge)  # type: ignore[arg-type]


def _cased(count: int, shape: tuple[int, ...], merge: str = "sum", *tags: str, inside: bool = False):  # type: ignore[no-untyped-def]
    """A case of `count` branches of this shape."""
    n, c, *s = shape
    named = {"x": (n, count * c, *s)} if inside else {"x": shape, **{f"x{i}": shape for i in range(1, count)}}
    more = {} if merge == "sum" else {"merge": merge}
    return case(*tags, **named, gate=(n, count, c), **more)


@op(
    formula=formula,
    check=_check,
    save=_save,
    backward=_backward,
    maps=("x", "x1", "x2", "x3", "x4", "x5", "x6", "x7"),
    budget=_budget,
    reduces=lambda x, *rest: branches.size(x),
    cases=[
        _cased(2, (8, 256, 28, 28), "sum", "bench"),
        _cased(4, (8, 128, 28, 28), "concat_reversed", "bench"),
        _cased(2, (2, 3, 7, 7)),
        _cased(3, (2, 17, 13)),
        _cased(4, (1, 5, 3, 4, 5), "concat_reversed"),
        _cased(4, (2, 4, 7, 7), "concat"),
        _cased(5, (2, 2, 5, 5)),
        _cased(8, (2, 3, 5, 3)),
        _cased(1, (2, 8, 9, 5)),
        _cased(2, (2, 16, 1, 1)),
        _cased(2, (2, 8, 5, 3), inside=True),
        _cased(4, (2, 3, 6, 6), "concat_reversed", inside=True),
        _cased(4, (2, 3, 13), inside=True),
        _cased(2, (0, 4, 5, 5)),
    ],
)
def branch_scale(
    x: Tensor, gate: Tensor, x1: Tensor | None = None, x2: Tensor | None = None, x3: Tensor | None = None,
    x4: Tensor | None = None, x5: Tensor | None = None, x6: Tensor | None = None, x7: Tensor | None = None,
    merge: str = "sum",
) -> Tensor:  # fmt: skip
    """Scales up to eight branches by gates of their own, and adds or concatenates them, in one pass.

    x: (N, C, *S) the first branch; or (N, B·C, *S), all of them along the channels
    gate: (N, B, C) factors; float32 is welcome beside a half-precision x
    x1 … x7: (N, C, *S) the other branches, of x's shape and dtype, or None
    merge: "sum" | "concat" | "concat_reversed" (the last branch's channels first)

    Returns y: (N, C, *S), or (N, B·C, *S) where branches are concatenated, in x's dtype and memory format.
    Raises ValueError or TypeError, naming the argument, for a wrong shape, dtype, device, option or number of branches.
    """
    return branches.lying(x, formula(x, gate, x1, x2, x3, x4, x5, x6, x7, merge))


def _check_bwd(
    x: Tensor, gate: Tensor, dy: Tensor, x1: Tensor | None, x2: Tensor | None, x3: Tensor | None, x4: Tensor | None,
    x5: Tensor | None, x6: Tensor | None, x7: Tensor | None, merge: str,
) -> None:  # fmt: skip
    branches.check_gate(x, gate, (x1, x2, x3, x4, x5, x6, x7), merge)
    branches.check_gradient(x, gate, dy, merge)


def _bwd_budget(x: Tensor, gate: Tensor, dy: Tensor, *rest: object) -> tuple[float, float]:
    *more, merge = rest
    count = len(branches.given(x, more))  # type: ignore[arg-type]
    return count + branches.written(x, more, gate, merge), count  # type: ignore[arg-type]


@op(check=_check_bwd, maps=("x", "dy", "x1", "x2", "x3", "x4", "x5", "x6", "x7"), budget=_bwd_budget)
def branch_scale_bwd(
    x: Tensor, gate: Tensor, dy: Tensor, x1: Tensor | None, x2: Tensor | None, x3: Tensor | None, x4: Tensor | None,
    x5: Tensor | None, x6: Tensor | None, x7: Tensor | None, merge: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradient of `branch_scale` in one pass: dgate, and dx of each branch (empty where there is none)."""
    maps = branches.split(branches.given(x, (x1, x2, x3, x4, x5, x6, x7)), gate.shape[1])
    dgate = gradient_of_gates(maps, dy, merge).to(gate.dtype)
    return (dgate, *gradients_of_branches(x, dy, gate, None, merge))


__all__ = ["branch_scale", "branch_scale_bwd"]
