"""Both ends around any small excite: pool, let `excite` turn the descriptor into a gate, scale. One backward owns both
ends.

    p = pool(x),  gate = excite(p, *params),  y = act(x·gate + residual)

Backward has two halves with the excite's between them, so that the pooled gradient never becomes a feature map of its
own:

    reduce  e = dy·act'(v),  dgate = Σ_s e·x                     reads dy, x
    excite  dp, dparams = vjp of excite at p, applied to dgate    [N, C] only
    apply   dx = e·gate + pool'(x)·dp                             reads e, writes dx

Checked in float64 against autograd for every pooling, tie rule and epilogue.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..autograd import is_transformed, once
from ..backend import forced
from ..layout import accumulator, like, match
from ..registry import op
from . import activations, checks
from . import excite as excite_
from .channel_pool import POOLS, TIES, channel_pool, has_max, is_pair, pool_gradient, spread
from .scale import check_epilogue, epilogue_gradient, scale


def keeps_e(act: str, residual: bool) -> bool:
    """Whether the reduce half writes e: it is the residual's gradient, and the apply half then reads it in place of
    dy."""
    return residual and act != "identity"


def largest(values: Tensor, pool: str) -> Tensor:
    """The maxima (N, C) among what was pooled."""
    return values[1] if pool == "mean_max" else values


def needed(values: Tensor, pool: str, ties: str) -> Tensor:
    """What of the pooled values the apply half needs: maxima that are split, the mean for the variance, or nothing."""
    if pool == "mean_var":
        return values[0]
    return largest(values, pool) if has_max(pool) and ties == "split" else values.new_empty((0,))


def _check_reduce(
    x: Tensor, dy: Tensor, gate: Tensor, aux: Tensor | None, values: Tensor,
    act: str, slope: float, pool: str, ties: str, residual: bool,
) -> None:  # fmt: skip
    checks.feature_map("x", x)
    checks.like("dy", dy, "x", x)
    check_epilogue(x, gate, aux, act)
    checks.one_of("pool", pool, POOLS)
    checks.one_of("ties", ties, TIES)


@op(
    check=_check_reduce,
    maps=("x", "dy", "aux"),
    budget=lambda x, dy, gate, aux, values, act, slope, pool, ties, residual: (
        2 + (aux is not None),
        int(keeps_e(act, residual)),
    ),
)
def pool_scale_reduce(
    x: Tensor, dy: Tensor, gate: Tensor, aux: Tensor | None, values: Tensor,
    act: str, slope: float, pool: str, ties: str, residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """First half of the backward: dgate (N, C); e, or empty where it is dy; how often each maximum occurs, or empty.

    aux: what `activations.needs_aux` names, or None; values: (N, C) the maxima where ties="split" divides among them,
        else empty
    """
    e = epilogue_gradient(dy, x, gate, aux, act, slope)
    dgate = (e * x.to(e.dtype)).flatten(2).sum(-1)
    kept = like(x, e.to(x.dtype)) if keeps_e(act, residual) else x.new_empty((0,))
    count = e.new_empty((0,))
    if has_max(pool) and ties == "split":
        count = (x.to(e.dtype) == spread(values, x)).to(e.dtype).flatten(2).sum(-1)
    return dgate, kept, count


def _check_apply(
    x: Tensor, e: Tensor, gate: Tensor, dpooled: Tensor, values: Tensor, index: Tensor, count: Tensor,
    act: str, slope: float, pool: str, ties: str,
) -> None:  # fmt: skip
    checks.feature_map("x", x)
    checks.like("e", e, "x", x)
    check_epilogue(x, gate, None, act)
    many = is_pair(pool)
    if pool == "mean_var":
        checks.shaped("values", values, x.shape[:2], "(N, C)")
    if has_max(pool) and ties == "first":
        checks.index("index", index, x.shape[:2], "(N, C)")
    checks.shaped("dpooled", dpooled, (2, *x.shape[:2]) if many else x.shape[:2], "(2, N, C)" if many else "(N, C)")


def reads_x(act: str, pool: str, ties: str) -> bool:
    """Whether the apply half needs x: for the activation's place, the maximum's, the sign, or x − mean."""
    return act != "identity" or pool in ("mean_abs", "mean_var") or (has_max(pool) and ties == "split")


@op(
    check=_check_apply,
    maps=("x", "e"),
    budget=lambda x, e, gate, dpooled, values, index, count, act, slope, pool, ties: (
        1 + reads_x(act, pool, ties),
        1,
    ),
)
def pool_scale_apply(
    x: Tensor, e: Tensor, gate: Tensor, dpooled: Tensor, values: Tensor, index: Tensor, count: Tensor,
    act: str, slope: float, pool: str, ties: str,
) -> Tensor:  # fmt: skip
    """Second half of the backward: dx = e·gate + pool'(x)·dpooled, with e = dy·act'(x·gate) where act isn't "identity".

    values, count: (N, C) the maxima and how often each occurs, for ties="split", or the means for "mean_var"; index:
        (N, C) their place, for ties="first"
    """
    e = epilogue_gradient(e, x, gate, None, act, slope)
    two = pool == "mean_var" or (pool == "mean_max" and ties == "split")
    stacked = torch.stack([values, values]) if two else values
    back = pool_gradient(x, dpooled.to(e.dtype), stacked, index, pool, ties)
    return like(x, (e * spread(gate.to(e.dtype), x) + back).to(x.dtype))


def pool_scale(
    x: Tensor,
    excite: Callable[..., Tensor],
    *params: Tensor,
    pool: str = "mean",
    ties: str = "split",
    residual: Tensor | None = None,
    act: str = "identity",
    slope: float = 0.01,
) -> Any:
    """Pools x, turns the descriptor into a gate by any small function, and scales x by it; one backward owns both ends.

    x: (N, C, *S) feature map
    excite: a differentiable function (descriptor, *params) -> gate (N, C); the descriptor is (N, C), or (2, N, C) for
        "mean_max" and "mean_var", float32 for half-precision x. It runs again in backward, so it must be pure: no
        dropout, nothing kept; statistics that the caller keeps are returned beside the gate, as a tuple (gate,
        *statistics). Tensors that need a gradient must come through `params`, not through a closure.
    params: tensors handed to excite, which receive gradients
    pool, ties: as in `channel_pool`
    residual, act, slope: as in `scale`

    Returns y: (N, C, *S) in x's dtype and memory format; (y, *statistics) where excite returns statistics.
    Raises ValueError or TypeError, naming the argument, for wrong shapes, dtypes, options, or a gate that isn't (N, C).
    """
    if is_transformed() or torch.jit.is_tracing() or isinstance(cast(Any, x), torch.fx.Proxy):
        # What can't look into an autograd.Function gets the parts: the same numbers and gradients, in more passes.
        gate, kept = excite_.split(excite(channel_pool(x, pool, ties), *params))
        y: Tensor = scale(x, gate, residual, None, act, slope, "product")
        return (y, *kept) if kept else y
    checks.feature_map("x", x)
    checks.one_of("pool", pool, POOLS)
    checks.one_of("ties", ties, TIES)
    checks.one_of("act", act, activations.EPILOGUES)
    checks.like("residual", residual, "x", x)
    excite_.check(excite, params)
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, *params))):
        return _without_gradient(x, excite, params, pool, ties, residual, act, slope)
    y, *statistics = _Spanning.apply(x, residual, excite, pool, ties, act, slope, *params)
    return (y, *statistics) if statistics else y


def _without_gradient(
    x: Tensor, excite: Callable[..., Any], params: Sequence[Tensor], pool: str, ties: str,
    residual: Tensor | None, act: str, slope: float,
) -> Any:  # fmt: skip
    """The parts in their order: an autograd.Function that records nothing would be a third of the host's time."""
    gate, statistics = excite_.split(excite(channel_pool(x, pool, ties), *params))
    excite_.complete(gate, x.shape[:2], "(N, C)")
    y = scale(x, gate, residual, None, act, slope, "product")
    return (y, *statistics) if statistics else y


class _Spanning(torch.autograd.Function):
    """Composes registered halves, so that eager, compiled and exported programs run the same launches."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, excite: Callable[..., Tensor], pool: str, ties: str,
        act: str, slope: float, *params: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        first = has_max(pool) and ties == "first"
        out = channel_pool(x, pool, ties, first)
        p, index = out if first else (out, x.new_empty((0,), dtype=torch.int64))
        gate, statistics = excite_.run(excite, (p,), params, x.shape[:2], "(N, C)")
        y = scale(x, gate, residual, None, act, slope, "product")
        need = activations.needs_aux(act, residual is not None)
        aux = {"output": y, "residual": residual, None: None}[need]
        ctx.save_for_backward(x, gate, p, index, aux, *params)
        ctx.consts = excite, pool, ties, act, slope, residual is not None
        ctx.backend = "auto" if torch.compiler.is_compiling() else forced()  # compiled code looks when it runs
        ctx.mark_non_differentiable(*statistics)
        return y, *statistics

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        return once(lambda: _Spanning.back(ctx, saved, dy), ctx.backend, "pool_scale", (*saved, dy))

    @staticmethod
    def back(ctx: Any, saved: Sequence[Tensor], dy: Tensor) -> tuple[Tensor | None, ...]:
        """The two halves, and the excite's between them."""
        x, gate, p, index, aux, *params = saved
        excite, pool, ties, act, slope, residual = ctx.consts
        dy = match(dy, x)
        values = needed(p, pool, ties)
        dgate, e, count = pool_scale_reduce(x, dy, gate, aux, values, act, slope, pool, ties, residual)
        (dp,), dparams = excite_.gradient(excite, (p,), params, dgate.to(gate.dtype), ctx.needs_input_grad[7:])
        written = keeps_e(act, residual)
        through = act if not residual else "identity"
        dx = pool_scale_apply(
            x, e if written else dy, gate, dp.to(accumulator(x.dtype)), values, index, count, through, slope, pool, ties
        )
        dresidual = (e if written else dy) if residual else None
        return dx, dresidual, None, None, None, None, None, *dparams
