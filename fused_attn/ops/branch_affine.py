"""Branches that are merged, scaled and shifted by functions of their own moments: one backward owns both ends.

    x = merge of the branches,  (mean, m2) = channel_moments(x),  scale, shift = excite((mean, m2), *params)
    v = scale·(x − mean) + shift,   y = act(v)

It is `moments_affine` of branches that lie apart: x is never a tensor, and the merge moves nothing. PSA (Zhang et al.,
arXiv:2105.14447, §3) and the BatchNorm behind it are this. Its gate s is a function of the means, and s·x has the
moments s·mean and s²·m2, so the normalisation of s·x needs no pass over s·x. Forward reads the branches twice and
writes y. Backward has two halves with the excite's between them:

    reduce  e = dy·act'(v),  dscale = Σ_s e·(x − mean),  dshift = Σ_s e            reads dy, x
    excite  dmean, dm2, dparams = vjp of excite at the moments                     [N, B·C] only
    apply   dx_b = scale·e + 2·dm2·(x − mean) + (dmean − scale·dshift)/S           reads dy, x, writes every dx_b

Small tensors are (N, B·C) in the order of the merged channels: branch b's at slot(b)·C.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..autograd import is_transformed, once, traced
from ..backend import forced
from ..registry import op
from . import activations, branches, checks
from . import excite as excite_
from .affine_apply import formula as affine
from .branches import Eight
from .channel_moments import channel_moments
from .moments_affine import mean_of, moments_affine, moments_affine_reduce
from .moments_affine_apply import moments_affine_apply

MERGES = ("concat", "concat_reversed")
DESCRIPTORS = ("mean", "moments")


def _apart(merged: Tensor, merge: str, count: int) -> list[Tensor]:
    """Each branch's channels, along the second dimension, of what has those of all."""
    found = merged.chunk(count, 1)
    return [found[slot] for slot in branches.slots(merge, count)]


def _together(apart: Sequence[Tensor], merge: str, dim: int = 1) -> Tensor:
    """The other way round."""
    return torch.cat([apart[slot] for slot in branches.slots(merge, len(apart))], dim)


def _check_maps(x: Tensor, more: Sequence[Tensor | None], merge: str) -> int:
    """Complains about branches that aren't tensors of one shape; returns how many there are."""
    count = len(branches.given(x, more))
    branches.check(x, more, count, "the number of branches")
    checks.one_of("merge", merge, MERGES)
    return count


def _check_small(x: Tensor, count: int, **small: Tensor | None) -> None:
    for name, value in small.items():
        checks.shaped(name, value, (x.shape[0], count * x.shape[1]), "(N, B·C)")
    checks.same_device("x", x, **small)


def _check_merged(x: Tensor, dy: Tensor, count: int) -> None:
    checks.tensor("dy", dy)
    shape = (x.shape[0], count * x.shape[1], *x.shape[2:])
    if tuple(dy.shape) != shape or dy.dtype != x.dtype:
        raise ValueError(f"dy must be {x.dtype} of shape {shape}; got {dy.dtype} of shape {tuple(dy.shape)}")


def _count(args: Sequence[Any]) -> int:
    """How many branches are among an op's arguments behind its small tensors."""
    return 1 + sum(isinstance(t, Tensor) for t in args)


def _check_moments(
    x: Tensor, x1: Tensor | None, x2: Tensor | None, x3: Tensor | None, x4: Tensor | None, x5: Tensor | None,
    x6: Tensor | None, x7: Tensor | None, merge: str,
) -> None:  # fmt: skip
    _check_maps(x, (x1, x2, x3, x4, x5, x6, x7), merge)


@op(
    check=_check_moments,
    maps=("x", "x1", "x2", "x3", "x4", "x5", "x6", "x7"),
    budget=lambda x, *rest: (_count(rest), 0),
)
def branch_moments(
    x: Tensor, x1: Tensor | None, x2: Tensor | None, x3: Tensor | None, x4: Tensor | None, x5: Tensor | None,
    x6: Tensor | None, x7: Tensor | None, merge: str,
) -> Tensor:  # fmt: skip
    """Part of `branch_moments_affine`: `channel_moments` (2, N, B·C) of the merged branches."""
    found = [channel_moments.eager(t, False)[0] for t in branches.given(x, (x1, x2, x3, x4, x5, x6, x7))]
    return _together(found, merge, 2)


def _check(
    x: Tensor, scale: Tensor, shift: Tensor, centre: Tensor | None, x1: Tensor | None, x2: Tensor | None,
    x3: Tensor | None, x4: Tensor | None, x5: Tensor | None, x6: Tensor | None, x7: Tensor | None, merge: str,
    act: str, slope: float,
) -> None:  # fmt: skip
    count = _check_maps(x, (x1, x2, x3, x4, x5, x6, x7), merge)
    _check_small(x, count, scale=scale, shift=shift, centre=centre)
    checks.one_of("act", act, activations.EPILOGUES)
    checks.number("slope", slope)


@op(
    check=_check,
    maps=("x", "x1", "x2", "x3", "x4", "x5", "x6", "x7"),
    budget=lambda x, scale, shift, centre, *rest: (_count(rest), _count(rest)),
)
def branch_affine(
    x: Tensor, scale: Tensor, shift: Tensor, centre: Tensor | None, x1: Tensor | None, x2: Tensor | None,
    x3: Tensor | None, x4: Tensor | None, x5: Tensor | None, x6: Tensor | None, x7: Tensor | None, merge: str,
    act: str, slope: float,
) -> Tensor:  # fmt: skip
    """Part of `branch_moments_affine`: `affine_apply` of the merged branches; y (N, B·C, *S) lies as they do."""
    maps = branches.given(x, (x1, x2, x3, x4, x5, x6, x7))
    by, to = _apart(scale, merge, len(maps)), _apart(shift, merge, len(maps))
    at: Sequence[Tensor | None] = [None] * len(maps) if centre is None else _apart(centre, merge, len(maps))
    found = [affine(t, a, b, m, None, None, act, slope) for t, a, b, m in zip(maps, by, to, at, strict=True)]
    return branches.lying(x, _together(found, merge))


def _check_reduce(
    x: Tensor, dy: Tensor, scale: Tensor, shift: Tensor, centre: Tensor | None, x1: Tensor | None, x2: Tensor | None,
    x3: Tensor | None, x4: Tensor | None, x5: Tensor | None, x6: Tensor | None, x7: Tensor | None, merge: str,
    act: str, slope: float,
) -> None:  # fmt: skip
    _check(x, scale, shift, centre, x1, x2, x3, x4, x5, x6, x7, merge, act, slope)
    _check_merged(x, dy, _count((x1, x2, x3, x4, x5, x6, x7)))


@op(
    check=_check_reduce,
    maps=("x", "dy", "x1", "x2", "x3", "x4", "x5", "x6", "x7"),
    budget=lambda x, dy, scale, shift, centre, *rest: (2 * _count(rest), 0),
)
def branch_affine_reduce(
    x: Tensor, dy: Tensor, scale: Tensor, shift: Tensor, centre: Tensor | None, x1: Tensor | None, x2: Tensor | None,
    x3: Tensor | None, x4: Tensor | None, x5: Tensor | None, x6: Tensor | None, x7: Tensor | None, merge: str,
    act: str, slope: float,
) -> Tensor:  # fmt: skip
    """First half of the backward: sums (2, N, B·C): Σ e·(x − centre) and Σ e."""
    maps = branches.given(x, (x1, x2, x3, x4, x5, x6, x7))
    own = [[None] * len(maps) if t is None else _apart(t, merge, len(maps)) for t in (dy, scale, shift, centre)]
    reduce = moments_affine_reduce.eager
    found = [reduce(t, *mine, None, act, slope, False)[0] for t, *mine in zip(maps, *own, strict=True)]
    return _together(found, merge, 2)


def _check_apply(
    x: Tensor, dy: Tensor, scale: Tensor, shift: Tensor, centre: Tensor | None, tilt: Tensor | None,
    level: Tensor | None, x1: Tensor | None, x2: Tensor | None, x3: Tensor | None, x4: Tensor | None,
    x5: Tensor | None, x6: Tensor | None, x7: Tensor | None, merge: str, act: str, slope: float,
) -> None:  # fmt: skip
    _check_reduce(x, dy, scale, shift, centre, x1, x2, x3, x4, x5, x6, x7, merge, act, slope)
    _check_small(x, _count((x1, x2, x3, x4, x5, x6, x7)), tilt=tilt, level=level)


def _apply_budget(x: Tensor, dy: Tensor, *rest: Any) -> tuple[float, float]:
    _, _, _, tilt, _, *more, _, act, _ = rest
    count = _count(more)
    return count * (2 if tilt is not None or act != "identity" else 1), count


@op(check=_check_apply, maps=("x", "dy", "x1", "x2", "x3", "x4", "x5", "x6", "x7"), budget=_apply_budget)
def branch_affine_apply(
    x: Tensor, dy: Tensor, scale: Tensor, shift: Tensor, centre: Tensor | None, tilt: Tensor | None,
    level: Tensor | None, x1: Tensor | None, x2: Tensor | None, x3: Tensor | None, x4: Tensor | None,
    x5: Tensor | None, x6: Tensor | None, x7: Tensor | None, merge: str, act: str, slope: float,
) -> Eight:  # fmt: skip
    """Last half of the backward: dx of each branch, scale·e + tilt·(x − centre) + level."""
    maps = branches.given(x, (x1, x2, x3, x4, x5, x6, x7))
    given = (dy, scale, shift, centre, tilt, level)
    own = [[None] * len(maps) if t is None else _apart(t, merge, len(maps)) for t in given]
    found = []
    for t, d, by, to, at, tilted, flat in zip(maps, *own, strict=True):
        apply = moments_affine_apply.eager
        found.append(apply(t, d, by, to, at, None, None, tilted, flat, None, None, act, slope))
    return branches.filled(found, x)


def branch_moments_affine(
    *maps: Tensor,
    excite: Callable[..., Any],
    params: Sequence[Tensor] = (),
    merge: str = "concat",
    descriptor: str = "moments",
    act: str = "identity",
    slope: float = 0.01,
) -> Any:
    """Concatenates up to eight branches, scales and shifts every plane by functions of all planes' moments and applies
    an activation; one backward owns both ends.

    maps: the branches, each (N, C, *S)
    excite: a differentiable function (descriptor, *params) -> (2, N, B·C), scale and shift, in the order of the merged
        channels; v = scale·(x − mean) + shift. It runs again in backward, so it must be pure; statistics that the
        caller keeps are returned beside, as a tuple (stacked, *statistics). Tensors that need a gradient must come
        through `params`, not through a closure.
    params: tensors handed to excite, which receive gradients
    merge: "concat" | "concat_reversed" (the last branch's channels first)
    descriptor: what excite gets before params, float32 for half-precision maps: "mean" (N, B·C); "moments" (2, N, B·C)
        mean and m2 = Σ (x − mean)²
    act, slope: as in `affine_apply`

    Returns y: (N, B·C, *S) in the branches' dtype and memory format; (y, *statistics) where excite returns statistics.
    Raises ValueError or TypeError, naming the argument, for wrong shapes, dtypes, options, or a result of excite that
    isn't (2, N, B·C).
    """
    if not 1 <= len(maps) <= branches.MOST:
        raise ValueError(f"maps must be 1 to {branches.MOST} branches; got {len(maps)}")
    checks.one_of("descriptor", descriptor, DESCRIPTORS)
    checks.one_of("merge", merge, MERGES)
    if isinstance(cast(Any, maps[0]), torch.fx.Proxy):
        return traced(
            branch_moments_affine, *maps, excite=excite, params=params, merge=merge, descriptor=descriptor, act=act,
            slope=slope,
        )  # fmt: skip
    if is_transformed() or torch.jit.is_tracing():
        # What can't look into an autograd.Function gets the parts: the same numbers and gradients, in more passes.
        whole = _together(maps, merge)
        return moments_affine(whole, excite, *params, descriptor=descriptor, act=act, slope=slope)
    x, more = maps[0], (*maps[1:], *(None,) * (branches.MOST - len(maps)))
    _check_maps(x, more, merge)
    checks.one_of("act", act, activations.EPILOGUES)
    excite_.check(excite, params)
    options = len(maps), merge, descriptor, act, slope
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (*maps, *params))):
        given, both, statistics = _described(excite, (*maps, *params), options, False)
        y = branch_affine(x, both[0], both[1], mean_of(given), *more, merge, act, slope)
        return (y, *statistics) if statistics else y
    y, *statistics = _Spanning.apply(excite, options, *maps, *params)
    return (y, *statistics) if statistics else y


def _described(
    excite: Callable[..., Any], tensors: tuple[Tensor, ...], options: tuple[int, str, str, str, float], recording: bool
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """What excite gets, its scale and shift, and the statistics beside them."""
    count, merge, descriptor, *_ = options
    x, params = tensors[0], tensors[count:]
    given = branch_moments(x, *tensors[1:count], *(None,) * (branches.MOST - count), merge)
    given = given[0] if descriptor == "mean" else given
    shape = 2, x.shape[0], count * x.shape[1]
    return given, *excite_.run(excite, (given,), params, shape, "(2, N, B·C)", recording)


class _Spanning(torch.autograd.Function):
    """Composes registered halves, so that eager, compiled and exported programs run the same launches."""

    @staticmethod
    def forward(
        ctx: Any, excite: Callable[..., Any], options: tuple[int, str, str, str, float], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        count, merge, _, act, slope = options
        x, more = tensors[0], (*tensors[1:count], *(None,) * (branches.MOST - count))
        given, both, statistics = _described(excite, tensors, options, True)
        y = branch_affine(x, both[0], both[1], mean_of(given), *more, merge, act, slope)
        ctx.save_for_backward(both, given, *tensors)
        ctx.excite, ctx.options = excite, options
        ctx.backend = "auto" if torch.compiler.is_compiling() else forced()  # compiled code looks when it runs
        ctx.mark_non_differentiable(*statistics)
        return y, *statistics

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        return once(lambda: _Spanning.back(ctx, saved, dy), ctx.backend, "branch_moments_affine", (*saved, dy))

    @staticmethod
    def back(ctx: Any, saved: Sequence[Tensor], dy: Tensor) -> tuple[Tensor | None, ...]:
        """The two halves, and the excite's between them."""
        both, given, *tensors = saved
        count, merge, _, act, slope = ctx.options
        x, params = tensors[0], tensors[count:]
        more = (*tensors[1:count], *(None,) * (branches.MOST - count))
        dy, scale, shift, mean = branches.match(dy, x), both[0], both[1], mean_of(given)
        sums = branch_affine_reduce(x, dy, scale, shift, mean, *more, merge, act, slope)
        needs = ctx.needs_input_grad[2 + count :]
        (back,), dparams = excite_.gradient(ctx.excite, (given,), params, sums.to(both.dtype), needs)
        tilt = 2 * back[1] if back.dim() == 3 else None
        level = (mean_of(back) - scale * sums[1]) / branches.size(x)
        dx = branch_affine_apply(x, dy, scale, shift, mean, tilt, level, *more, merge, act, slope)
        return None, None, *dx[:count], *dparams


__all__ = [
    "branch_affine",
    "branch_affine_apply",
    "branch_affine_reduce",
    "branch_moments",
    "branch_moments_affine",
]
