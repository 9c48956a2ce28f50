"""Both ends around any small excite: pool, let `excite` turn the descriptor into thresholds, soft-threshold. One
backward owns both ends.

    m = mean_s |x|  (or mean_s x),   τ = excite(m, *params),   y = sign(x)·max(|x| − τ, 0) (+ residual)

Backward has two halves with the excite's between them. With e = dy·sign(x)·[|x| > τ]:

    reduce  dτ = −Σ_s e                                            reads dy, x
    excite  dm, dparams = vjp of excite at m, applied to dτ        [N, C] only
    apply   dx = e·sign(x) + sign(x)·dm/S  (mean of x: + dm/S)     reads dy, x, writes dx

The residual's gradient is dy. Checked in float64 against autograd of the equations.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..autograd import is_transformed, once
from ..backend import forced
from ..layout import accumulator, like, match
from ..registry import op
from . import checks
from . import excite as excite_
from .channel_pool import channel_pool, pool_gradient
from .soft_threshold import passed, soft_threshold

DESCRIPTORS = ("mean_abs", "mean")


def _check_reduce(x: Tensor, tau: Tensor, dy: Tensor) -> None:
    checks.feature_map("x", x)
    checks.tensor("tau", tau)
    checks.shaped("tau", tau, x.shape[:2], "(N, C)")
    checks.like("dy", dy, "x", x)


@op(check=_check_reduce, maps=("x", "dy"), budget=lambda x, tau, dy: (2, 0))
def pool_soft_threshold_reduce(x: Tensor, tau: Tensor, dy: Tensor) -> Tensor:
    """First half of the backward: dtau (N, C) in the accumulation dtype."""
    return -passed(x, tau.to(accumulator(x.dtype)), dy)[0].flatten(2).sum(-1)


def _check_apply(x: Tensor, tau: Tensor, dy: Tensor, dpooled: Tensor, pool: str) -> None:
    _check_reduce(x, tau, dy)
    checks.shaped("dpooled", dpooled, x.shape[:2], "(N, C)")
    checks.one_of("pool", pool, DESCRIPTORS)


@op(check=_check_apply, maps=("x", "dy"), budget=lambda x, tau, dy, dpooled, pool: (2, 1))
def pool_soft_threshold_apply(x: Tensor, tau: Tensor, dy: Tensor, dpooled: Tensor, pool: str) -> Tensor:
    """Second half of the backward: dx, from dy and the descriptor's gradient dpooled (N, C)."""
    acc = accumulator(x.dtype)
    e, sign = passed(x, tau.to(acc), dy)
    back = pool_gradient(x, dpooled.to(acc), dpooled, x.new_empty((0,), dtype=torch.int64), pool, "split")
    return like(x, (e * sign + back).to(x.dtype))


def pool_soft_threshold(
    x: Tensor,
    excite: Callable[..., Any],
    *params: Tensor,
    pool: str = "mean_abs",
    residual: Tensor | None = None,
) -> Any:
    """Pools x, turns the descriptor into thresholds by any small function, and soft-thresholds x by them; one backward
    owns both ends.

    x: (N, C, *S) feature map
    excite: a differentiable function (descriptor, *params) -> thresholds (N, C), or (N, 1) or (N,) for one per sample;
        the descriptor is (N, C), float32 for half-precision x. Thresholds that are a share of the descriptor multiply
        by it themselves. It runs again in backward, so it must be pure: no dropout, nothing kept; statistics that the
        caller keeps are returned beside the thresholds, as a tuple (tau, *statistics). Tensors that need a gradient
        must come through `params`, not through a closure.
    params: tensors handed to excite, which receive gradients
    pool: "mean_abs" (mean of |x|, as published) | "mean" (mean of x, as some ports have it)
    residual: (N, C, *S) added afterwards, of x's dtype

    Returns y: (N, C, *S) in x's dtype and memory format; (y, *statistics) where excite returns statistics.
    Raises ValueError or TypeError, naming the argument, for wrong shapes, dtypes, options, or thresholds of another
    shape.
    """
    if is_transformed() or torch.jit.is_tracing() or isinstance(cast(Any, x), torch.fx.Proxy):
        # What can't look into an autograd.Function gets the parts: the same numbers and gradients, in more passes.
        tau, kept = excite_.split(excite(channel_pool(x, pool), *params))
        y: Tensor = soft_threshold(x, tau, residual)
        return (y, *kept) if kept else y
    checks.feature_map("x", x)
    checks.one_of("pool", pool, DESCRIPTORS)
    checks.like("residual", residual, "x", x)
    excite_.check(excite, params)
    y, *statistics = _Spanning.apply(x, residual, excite, pool, *params)
    return (y, *statistics) if statistics else y


def _widened(excite: Callable[..., Any]) -> Callable[..., Any]:
    """The same excite, its thresholds always (N, C): autograd sums what a sample shares."""

    def run(pooled: Tensor, *params: Tensor) -> Any:
        out = excite(pooled, *params)
        tau, *statistics = out if isinstance(out, tuple) else (out,)
        if isinstance(tau, Tensor) and tau.shape in (pooled.shape[:1], (pooled.shape[0], 1)):
            tau = tau.reshape(-1, 1).expand(pooled.shape)
        return (tau, *statistics)

    return run


class _Spanning(torch.autograd.Function):
    """Composes registered halves, so that eager, compiled and exported programs run the same launches."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, excite: Callable[..., Any], pool: str, *params: Tensor
    ) -> tuple[Tensor, ...]:
        p = channel_pool(x, pool)
        excite = _widened(excite)
        tau, statistics = excite_.run(excite, (p,), params, x.shape[:2], "(N, C), (N, 1) or (N,)")
        tau = tau.contiguous()
        y = soft_threshold(x, tau, residual)
        ctx.save_for_backward(x, tau, p, *params)
        ctx.consts = excite, pool, residual is not None
        ctx.backend = "auto" if torch.compiler.is_compiling() else forced()  # compiled code looks when it runs
        ctx.mark_non_differentiable(*statistics)
        return y, *statistics

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        return once(lambda: _Spanning.back(ctx, saved, dy), ctx.backend, "pool_soft_threshold", (*saved, dy))

    @staticmethod
    def back(ctx: Any, saved: Sequence[Tensor], dy: Tensor) -> tuple[Tensor | None, ...]:
        """The two halves, and the excite's between them."""
        x, tau, p, *params = saved
        excite, pool, residual = ctx.consts
        dy = match(dy, x)
        dtau = pool_soft_threshold_reduce(x, tau, dy)
        (dp,), dparams = excite_.gradient(excite, (p,), params, dtau.to(tau.dtype), ctx.needs_input_grad[4:])
        dx = pool_soft_threshold_apply(x, tau, dy, dp.to(accumulator(x.dtype)), pool)
        return dx, dy if residual else None, None, None, *dparams


__all__ = ["pool_soft_threshold", "pool_soft_threshold_apply", "pool_soft_threshold_reduce"]
