"""A map that is scaled and shifted by functions of its own moments, with what follows; one backward owns both ends.

    mean, m2 = channel_moments(x),   scale, shift = excite((mean, m2), *params)
    v = scale·(x − mean) + shift (+ residual),   y = act(v)

A BatchNorm, the gate behind it, the residual add and the activation are this: with the batch's mean μ, reciprocal
deviation r and a = γ·r the normalised map has the mean z̄ = a·(mean − μ) + β per sample and channel, so a gate s that
pools it is s = gate(z̄), scale = s·a and shift = s·z̄. Forward reads x twice, and moves nothing that the BatchNorm and
the add would not.

Backward has two halves with the excite's between them:

    reduce  e = dy·act'(v),  dscale = Σ_s e·(x − mean),  dshift = Σ_s e            reads dy, x (and y), writes e
    excite  dmean, dm2, dparams = vjp of excite at the moments                     [N, C] only
    apply   dx = scale·e + 2·dm2·(x − mean) + (dmean − scale·dshift)/S             reads e, x, writes dx

e is the residual's gradient; where there is no residual, it isn't written, and the second half computes it again.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..autograd import is_transformed, once, traced
from ..backend import forced
from ..layout import like, match
from ..registry import op
from . import activations, checks
from . import excite as excite_
from .affine_apply import affine_apply, behind, check_affine
from .channel_moments import channel_moments
from .channel_pool import channel_pool, spread
from .moments_affine_apply import moments_affine_apply
from .pool_scale import keeps_e

DESCRIPTORS = ("mean", "moments", "extrema")


def _check_reduce(
    x: Tensor, dy: Tensor, scale: Tensor, shift: Tensor, centre: Tensor | None, aux: Tensor | None,
    act: str, slope: float, residual: bool,
) -> None:  # fmt: skip
    check_affine(x, scale=scale, shift=shift, centre=centre)
    checks.like("dy", dy, "x", x)
    checks.like("aux", aux, "x", x)
    checks.one_of("act", act, activations.EPILOGUES)


@op(
    check=_check_reduce,
    maps=("x", "dy", "aux"),
    budget=lambda x, dy, scale, shift, centre, aux, act, slope, residual: (
        2 + (aux is not None),
        int(keeps_e(act, residual)),
    ),
)
def moments_affine_reduce(
    x: Tensor, dy: Tensor, scale: Tensor, shift: Tensor, centre: Tensor | None, aux: Tensor | None,
    act: str, slope: float, residual: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """First half of the backward: sums (2, N, C): Σ e·(x − centre) and Σ e; and e, or empty where it isn't kept.

    aux: what `activations.needs_aux` names, or None
    """
    e = behind(dy, x, scale, shift, centre, aux, act, slope)
    at = x.to(e.dtype) if centre is None else x.to(e.dtype) - spread(centre.to(e.dtype), x)
    sums = torch.stack([(e * at).flatten(2).sum(-1), e.flatten(2).sum(-1)])
    return sums, like(x, e.to(x.dtype)) if keeps_e(act, residual) else x.new_empty((0,))


def describe(x: Tensor, descriptor: str) -> tuple[Tensor, Tensor | None]:
    """What excite gets of x, and the places of the extrema where it gets those."""
    if descriptor == "extrema":
        return channel_moments(x, True)
    return (channel_pool(x) if descriptor == "mean" else channel_moments(x)), None


def mean_of(given: Tensor) -> Tensor:
    """The mean (N, C) in a descriptor."""
    return given if given.dim() == 2 else given[0]


def moments_affine(
    x: Tensor,
    excite: Callable[..., Any],
    *params: Tensor,
    descriptor: str = "moments",
    residual: Tensor | None = None,
    act: str = "identity",
    slope: float = 0.01,
) -> Any:
    """Scales and shifts every plane by functions of all planes' moments, adds a residual and applies an activation; one
    backward owns both ends.

    x: (N, C, *S) feature map
    excite: a differentiable function (descriptor, *params) -> (2, N, C), scale and shift; v = scale·(x − mean) + shift.
        It runs again in backward, so it must be pure; statistics that the caller keeps are returned beside, as a tuple
        (stacked, *statistics). Tensors that need a gradient must come through `params`, not through a closure.
    params: tensors handed to excite, which receive gradients
    descriptor: what excite gets before params, float32 for half-precision x: "mean" (N, C); "moments" (2, N, C) mean
        and m2 = Σ (x − mean)²; "extrema" (4, N, C) mean, m2, largest, smallest, whose gradients go to their first
        places
    residual, act, slope: as in `affine_apply`

    Returns y: (N, C, *S) in x's dtype and memory format; (y, *statistics) where excite returns statistics.
    Raises ValueError or TypeError, naming the argument, for wrong shapes, dtypes, options, or a result of excite that
    isn't (2, N, C).
    """
    if isinstance(cast(Any, x), torch.fx.Proxy):
        return traced(
            moments_affine, x, excite, *params, descriptor=descriptor, residual=residual, act=act, slope=slope
        )
    if is_transformed() or torch.jit.is_tracing():
        # What can't look into an autograd.Function gets the parts: the same numbers and gradients, in more passes.
        given, _ = describe(x, descriptor)
        (scale, shift), kept = excite_.split(excite(given, *params))
        y: Tensor = affine_apply(x, scale, shift, mean_of(given), residual, None, act, slope)
        return (y, *kept) if kept else y
    checks.feature_map("x", x)
    checks.one_of("descriptor", descriptor, DESCRIPTORS)
    checks.one_of("act", act, activations.EPILOGUES)
    checks.like("residual", residual, "x", x)
    excite_.check(excite, params)
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, *params))):
        given, _ = describe(x, descriptor)
        both, statistics = excite_.split(excite(given, *params))
        excite_.complete(both, (2, *x.shape[:2]), "(2, N, C)")
        y = affine_apply(x, both[0], both[1], mean_of(given), residual, None, act, slope)
        return (y, *statistics) if statistics else y
    y, *statistics = _Spanning.apply(x, residual, excite, descriptor, act, slope, *params)
    return (y, *statistics) if statistics else y


class _Spanning(torch.autograd.Function):
    """Composes registered halves, so that eager, compiled and exported programs run the same launches."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, excite: Callable[..., Any], descriptor: str, act: str,
        slope: float, *params: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        given, index = describe(x, descriptor)
        both, statistics = excite_.run(excite, (given,), params, (2, *x.shape[:2]), "(2, N, C)")
        y = affine_apply(x, both[0], both[1], mean_of(given), residual, None, act, slope)
        need = activations.needs_aux(act, residual is not None)
        aux = {"output": y, "residual": residual, None: None}[need]
        ctx.save_for_backward(x, both, index, aux, given, *params)
        ctx.consts = excite, act, slope, residual is not None
        ctx.backend = "auto" if torch.compiler.is_compiling() else forced()  # compiled code looks when it runs
        ctx.mark_non_differentiable(*statistics)
        return y, *statistics

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        return once(lambda: _Spanning.back(ctx, saved, dy), ctx.backend, "moments_affine", (*saved, dy))

    @staticmethod
    def back(ctx: Any, saved: Sequence[Tensor], dy: Tensor) -> tuple[Tensor | None, ...]:
        """The two halves, and the excite's between them."""
        x, both, index, aux, given, *params = saved
        excite, act, slope, residual = ctx.consts
        dy, scale, shift, mean = match(dy, x), both[0], both[1], mean_of(given)
        sums, e = moments_affine_reduce(x, dy, scale, shift, mean, aux, act, slope, residual)
        (back,), dparams = excite_.gradient(excite, (given,), params, sums.to(both.dtype), ctx.needs_input_grad[6:])
        written = keeps_e(act, residual)
        size = x[0, 0].numel() if x.numel() else 1
        dx = moments_affine_apply(
            x, e if written else dy, scale, shift, mean, None, None,
            2 * back[1] if back.dim() == 3 else None, (mean_of(back) - scale * sums[1]) / size,
            None if index is None else back[2:], index,
            "identity" if residual else act, slope,
        )  # fmt: skip
        dresidual = (e if written else dy) if residual else None
        return dx, dresidual, None, None, None, None, *dparams


__all__ = ["moments_affine", "moments_affine_reduce"]
