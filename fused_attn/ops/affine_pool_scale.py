"""A gate behind a normalisation and an activation: neither the normalised map nor the activated one is ever stored.

    mean, m2 = channel_moments(x),   scale, shift = norm((mean, m2), *norm_params)
    u = act(scale·(x − mean) + shift),   p = mean_s u,   gate = excite(p, *params),   y = gate·u

This is BatchNorm → activation → squeeze-and-excitation in front of a convolution (MBConv of MobileNetV3 and
EfficientNet, arXiv:1905.02244, arXiv:1905.11946; RegNetY, arXiv:2003.13678). Where the statistics are kept ones there
are no moments, and scale and shift are given.

Backward; every sum is linear in the gate and in its input's gradient, so one pass makes them all:

    reduce  d = act'(v),  t = x − mean:  Σ dy·u,  Σ dy·d,  Σ d,  Σ dy·d·t,  Σ d·t       reads dy, x
    excite  dp, dparams = vjp of excite, applied to dgate = Σ dy·u;   q = dp/S
            dscale = gate·Σ dy·d·t + q·Σ d·t,  dshift = gate·Σ dy·d + q·Σ d, and norm's vjp of those
    apply   dx = scale·(gate·dy + q)·d + 2·dm2·t + (dmean − scale·dshift)/S             reads dy, x, writes dx
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..autograd import is_transformed, once
from ..backend import forced
from ..layout import match
from ..registry import op
from . import activations, checks
from . import excite as excite_
from .affine_apply import affine, affine_apply, check_affine
from .channel_moments import channel_moments
from .channel_pool import channel_pool, spread
from .moments_affine_apply import moments_affine_apply


def _check_pool(x: Tensor, scale: Tensor, shift: Tensor, centre: Tensor | None, act: str, slope: float) -> None:
    check_affine(x, scale=scale, shift=shift, centre=centre)
    checks.one_of("act", act, activations.EPILOGUES)
    checks.number("slope", slope)


@op(check=_check_pool, budget=lambda *args: (1, 0))
def affine_pool(
    x: Tensor, scale: Tensor, shift: Tensor, centre: Tensor | None = None, act: str = "identity", slope: float = 0.01
) -> Tensor:
    """Part of `affine_pool_scale`, which has its gradient: means of act(scale·(x − centre) + shift) over the spatial
    dimensions, in one read of x.

    x: (N, C, *S) feature map; scale, shift, centre, act, slope: as in `affine_apply`

    Returns (N, C), float32 for half-precision x, else x's dtype.
    Raises ValueError or TypeError, naming the argument, for a wrong shape, dtype, device or option.
    """
    return activations.apply(act, affine(x, scale, shift, centre), slope).flatten(2).mean(-1)


def _check_reduce(
    x: Tensor, dy: Tensor, scale: Tensor, shift: Tensor, centre: Tensor | None, act: str, slope: float
) -> None:
    _check_pool(x, scale, shift, centre, act, slope)
    checks.like("dy", dy, "x", x)


@op(check=_check_reduce, maps=("x", "dy"), budget=lambda *args: (2, 0))
def affine_pool_scale_reduce(
    x: Tensor, dy: Tensor, scale: Tensor, shift: Tensor, centre: Tensor | None, act: str, slope: float
) -> Tensor:
    """First half of the backward: sums (5, N, C) over the spatial dimensions, with t = x − centre, u = act(v) and
    d = act'(v): dy·u, dy·d, d, dy·d·t, d·t."""
    v = affine(x, scale, shift, centre)
    t = x.to(v.dtype) if centre is None else x.to(v.dtype) - spread(centre.to(v.dtype), x)
    u, d, g = activations.apply(act, v, slope), activations.grad(act, v, slope), dy.to(v.dtype)
    gd = torch.where(d == 0, 0, g * d)  # a cut gradient is 0, whatever was cut
    dt = torch.where(d == 0, 0, d * t)
    return torch.stack([a.flatten(2).sum(-1) for a in (g * u, gd, d, gd * t, dt)])


def affine_pool_scale(
    x: Tensor,
    norm: Callable[..., Any],
    excite: Callable[..., Any],
    norm_params: Sequence[Tensor] = (),
    params: Sequence[Tensor] = (),
    *,
    moments: bool = True,
    centre: Tensor | None = None,
    act: str = "identity",
    slope: float = 0.01,
) -> Any:
    """Normalises x by functions of its moments, activates, pools, and scales by a gate of what was pooled; one backward
    owns all of it.

    x: (N, C, *S) feature map
    norm: a differentiable function (moments, *norm_params) -> (2, N, C), scale and shift of v = scale·(x − mean) +
        shift, from the mean and m2 (2, N, C) of every plane; without moments (*norm_params) -> (2, N, C), of
        v = scale·(x − centre) + shift. It may return statistics beside, as in `moments_affine`
    excite: a differentiable function (p, *params) -> gate (N, C), of the means p (N, C) of act(v)
    norm_params, params: tensors handed to norm and to excite, which receive gradients. Both functions run again in
        backward, so they must be pure, and tensors that need a gradient must not come through a closure
    moments: whether norm gets the moments of x
    centre: (N, C) without moments, a constant; None: 0
    act, slope: as in `affine_apply`

    Returns y: (N, C, *S) in x's dtype and memory format; (y, *statistics) where norm returns statistics.
    Raises ValueError or TypeError, naming the argument, for wrong shapes, dtypes, options, or results.
    """
    norm_params, params = tuple(norm_params), tuple(params)
    if is_transformed() or torch.jit.is_tracing() or isinstance(cast(Any, x), torch.fx.Proxy):
        # What can't look into an autograd.Function gets the parts: the same numbers and gradients, in more passes.
        given: list[Tensor] = [channel_moments(x)] if moments else []
        (scale, shift), kept = excite_.split(norm(*given, *norm_params))
        u = affine_apply(x, scale, shift, given[0][0] if moments else centre, None, None, act, slope)
        gate = excite_.split(excite(channel_pool(u), *params))[0]
        y: Tensor = u * spread(gate.to(u.dtype), u)
        return (y, *kept) if kept else y
    checks.feature_map("x", x)
    checks.one_of("act", act, activations.EPILOGUES)
    excite_.check(norm, norm_params)
    excite_.check(excite, params)
    if not moments:
        checks.shaped("centre", centre, x.shape[:2], "(N, C)")
    elif centre is not None:
        raise ValueError("centre is the mean where norm gets moments; got a tensor")
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, *norm_params, *params))):
        given = [channel_moments(x)] if moments else []
        both, statistics = excite_.split(norm(*given, *norm_params))
        excite_.complete(both, (2, *x.shape[:2]), "(2, N, C)")
        c = given[0][0] if moments else centre
        gate, _ = excite_.split(excite(affine_pool(x, both[0], both[1], c, act, slope), *params))
        excite_.complete(gate, x.shape[:2], "(N, C)")
        y = affine_apply(x, both[0], both[1], c, None, gate, act, slope)
        return (y, *statistics) if statistics else y
    y, *statistics = _Spanning.apply(
        x, centre, norm, excite, moments, len(norm_params), act, slope, *norm_params, *params
    )
    return (y, *statistics) if statistics else y


class _Spanning(torch.autograd.Function):
    """Composes registered halves, so that eager, compiled and exported programs run the same launches."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, centre: Tensor | None, norm: Callable[..., Any], excite: Callable[..., Any],
        moments: bool, count: int, act: str, slope: float, *params: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        given: list[Tensor] = [channel_moments(x)] if moments else []
        c = given[0][0] if moments else centre
        both, statistics = excite_.run(norm, given, params[:count], (2, *x.shape[:2]), "(2, N, C)")
        p = affine_pool(x, both[0], both[1], c, act, slope)
        gate, _ = excite_.run(excite, (p,), params[count:], x.shape[:2], "(N, C)")
        y = affine_apply(x, both[0], both[1], c, None, gate, act, slope)
        ctx.save_for_backward(x, both, None if moments else c, p, gate, *given, *params)
        ctx.consts = norm, excite, moments, count, act, slope
        ctx.backend = "auto" if torch.compiler.is_compiling() else forced()  # compiled code looks when it runs
        ctx.mark_non_differentiable(*statistics)
        return y, *statistics

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        return once(lambda: _Spanning.back(ctx, saved, dy), ctx.backend, "affine_pool_scale", (*saved, dy))

    @staticmethod
    def back(ctx: Any, saved: Sequence[Tensor], dy: Tensor) -> tuple[Tensor | None, ...]:
        """The two halves, and both functions' gradients between them."""
        x, both, c, p, gate, *rest = saved
        norm, excite, moments, count, act, slope = ctx.consts
        given: tuple[Tensor, ...] = (rest.pop(0),) if moments else ()
        c = given[0][0] if moments else c
        norm_params, params, needs = rest[:count], rest[count:], ctx.needs_input_grad[8:]
        dy, scale, shift = match(dy, x), both[0], both[1]
        dyu, dyd, d, dydt, dt = affine_pool_scale_reduce(x, dy, scale, shift, c, act, slope)
        (dp,), dparams = excite_.gradient(excite, (p,), params, dyu.to(gate.dtype), needs[count:])
        size = x[0, 0].numel() if x.numel() else 1
        wide = gate.to(dyd.dtype)
        q = dp.to(dyd.dtype) / size
        dscale, dshift = wide * dydt + q * dt, wide * dyd + q * d
        dgiven, dnorm = excite_.gradient(norm, given, norm_params, torch.stack([dscale, dshift]), needs[:count])
        tilt = 2 * dgiven[0][1] if moments else None
        level = (dgiven[0][0] - scale * dshift) / size if moments else None
        dx = moments_affine_apply(x, dy, scale, shift, c, gate, q, tilt, level, None, None, act, slope)
        return dx, None, None, None, None, None, None, None, *dnorm, *dparams


__all__ = ["affine_pool", "affine_pool_scale", "affine_pool_scale_reduce"]
