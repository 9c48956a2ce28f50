"""A gate per channel and then a gate per pixel, behind a normalisation that is never stored.

    mean, m2, largest, smallest = channel_moments(x)      scale, shift = norm((mean, m2), *norm_params)
    u = scale·(x − mean) + shift                          p = mean_s u, max_s u     (both from the moments)
    gate = channel_excite(p, *channel_params)             v = gate·u = a·(x − mean) + b,  a = gate·scale, b = gate·shift
    pixel = spatial_excite(spatial_pool(v), *spatial_params)
    y = act(v·pixel + residual)

BatchNorm (Ioffe and Szegedy, arXiv:1502.03167, alg. 1) and CBAM (Woo et al., arXiv:1807.06521, eq. 1–3) at the end of
a residual branch. An affine map has its largest value where x is largest, or smallest where scale is negative; where
scale is 0 all values tie, and the gradient for scale goes to all of them or to the first, by the rule for ties.

Forward reads x three times and the residual once and writes y. Backward is dual_scale's three passes, on v:

    reduce  e = dy·act'(·),  dpixel = Σ_c e·v                                   reads dy, x (aux), writes (e)
    gate    h = e·pixel + what pooling over channels adds,
            da = Σ_s h·(x − mean),  db = Σ_s h                                  reads e, x
    excite  dgate = da·scale + db·shift, channel_excite's vjp dp, then norm's vjp dmean, dm2 of
            dscale = da·gate + dp_max·(largest − mean),  dshift = db·gate + dp_mean + dp_max
    apply   dx = a·h + 2·dm2·(x − mean) + (dmean − a·db − scale·dp_max)/S, and scale·dp_max at the maxima
                                                                                reads e, x, writes dx
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..autograd import is_transformed, once, traced
from ..backend import forced
from ..layout import accumulator, like, match
from ..registry import op
from . import activations, checks
from . import excite as excite_
from .affine_apply import affine_apply
from .channel_moments import channel_moments
from .channel_pool import TIES, has_max
from .dual_scale import dual_scale, dual_scale_apply, dual_scale_gate, dual_scale_reduce
from .pool_scale import keeps_e
from .scale import check_gates, over
from .spatial_pool import POOLS, gated, pooled


def _check_planes(x: Tensor, gate: Tensor, affine: Tensor, pool: str, return_index: bool) -> None:
    checks.feature_map("x", x)
    checks.tensor("gate", gate)
    checks.shaped("gate", gate, x.shape[:2], "(N, C)")
    checks.tensor("affine", affine)
    checks.shaped("affine", affine, (2, *x.shape[:2]), "(2, N, C)")
    checks.same_device("x", x, gate=gate, affine=affine)
    checks.one_of("pool", pool, POOLS)
    if return_index and not has_max(pool):
        raise ValueError(f"return_index needs a pool with a maximum, 'max' or 'mean_max'; got pool={pool!r}")


@op(check=_check_planes, budget=lambda *args: (1, 0), reduces=lambda x, *rest: x.shape[1])
def affine_spatial_pool(
    x: Tensor, gate: Tensor, affine: Tensor, pool: str, return_index: bool
) -> tuple[Tensor, Tensor]:
    """Part of `affine_dual_scale`, which has its gradient: `spatial_pool` of gate·(x − centre) + shift, in one read.

    x: (N, C, *S) feature map; gate: (N, C); affine: (2, N, C) centre and shift
    pool: as in `spatial_pool`; return_index: whether the first channels of the maxima are wanted

    Returns planes (N, P, *S), and those channels (N, *S), int64, or empty.
    Raises ValueError or TypeError, naming the argument, for a wrong shape, dtype, device or option.
    """
    v = gated(x, gate, affine)
    planes, _ = pooled(v, pool, "split")
    return planes, v.max(1).indices.contiguous() if return_index else x.new_empty((0,), dtype=torch.int64)


def _check_scale(
    x: Tensor, gate: Tensor, affine: Tensor, pixel: Tensor, residual: Tensor | None, act: str, slope: float
) -> None:
    _check_planes(x, gate, affine, "mean", False)
    checks.tensor("pixel", pixel)
    check_gates(x, gate, pixel, "product")
    checks.like("residual", residual, "x", x)
    checks.one_of("act", act, activations.EPILOGUES)
    checks.number("slope", slope)


@op(
    check=_check_scale,
    maps=("x", "residual"),
    budget=lambda x, gate, affine, pixel, residual, *rest: (2 if residual is not None else 1, 1),
)
def affine_pixel_scale(
    x: Tensor, gate: Tensor, affine: Tensor, pixel: Tensor, residual: Tensor | None, act: str, slope: float
) -> Tensor:
    """Part of `affine_dual_scale`, which has its gradient: act((gate·(x − centre) + shift)·pixel + residual), in one
    pass.

    x, residual: (N, C, *S); gate: (N, C); affine: (2, N, C) centre and shift; pixel: (N, *S); act, slope: as in `scale`

    Returns y: (N, C, *S) in x's dtype and memory format.
    Raises ValueError or TypeError, naming the argument, for a wrong shape, dtype, device or option.
    """
    v = gated(x, gate, affine)
    v = v * over(pixel.to(v.dtype))
    return like(x, activations.apply(act, v if residual is None else v + residual, slope).to(x.dtype))


class Pooled(NamedTuple):
    """What pooling over pixels says of u = scale·(x − mean) + shift, from what it says of x.

    p: the descriptor; rise: how far the place of u's maximum lies above x's mean; values, where: x there, and the place
    """

    p: Tensor
    rise: Tensor
    values: Tensor
    where: Tensor


def _describe(
    x: Tensor, moments: Tensor, places: Tensor, scale: Tensor, shift: Tensor, channel: str, ties: str
) -> Pooled:
    """The pooling named `channel` of u."""
    if not has_max(channel):
        none = shift.new_empty((0,))
        return Pooled(shift, none, none, places)
    mean, _, largest, smallest = moments
    falls, flat = scale < 0, scale == 0
    values, index = torch.where(falls, smallest, largest), torch.where(falls, places[1], places[0])
    rise = values - mean
    # Where scale is 0 every value is a maximum, and the mean of all is the mean; or the first is.
    if ties == "first":
        begin = x
        for _ in x.shape[2:]:
            begin = begin[..., 0]
        rise = torch.where(flat, begin.to(rise.dtype) - mean, rise)
    else:
        rise = torch.where(flat, 0, rise)
    top = torch.where(flat, shift, scale * rise + shift)
    return Pooled(top if channel == "max" else torch.stack([shift, top]), rise, values, index)


def affine_dual_scale(
    x: Tensor,
    norm: Callable[..., Any],
    channel_excite: Callable[..., Any],
    spatial_excite: Callable[..., Any],
    norm_params: Sequence[Tensor] = (),
    channel_params: Sequence[Tensor] = (),
    spatial_params: Sequence[Tensor] = (),
    *,
    moments: bool = True,
    channel: str = "mean_max",
    pool: str = "mean_max",
    ties: str = "split",
    residual: Tensor | None = None,
    act: str = "identity",
    slope: float = 0.01,
) -> Any:
    """Normalises x by functions of its moments, scales it per channel and then per pixel by gates that two small
    functions make of what is pooled, adds a residual and applies an activation; one backward owns all of it.

    x: (N, C, *S) feature map
    norm: a differentiable function (descriptor, *norm_params) -> (2, N, C), scale and shift of
        u = scale·(x − mean) + shift. It may return statistics beside, as in `moments_affine`
    channel_excite, spatial_excite: as in `dual_scale`, of what is pooled from u and from gate·u
    norm_params, channel_params, spatial_params: tensors handed to the three, which receive gradients. All run again in
        backward, so they must be pure, and tensors that need a gradient must not come through a closure
    moments: what norm gets: the mean and m2 (2, N, C) of every plane, or without moments the mean alone (N, C)
    channel: "mean" | "max" | "mean_max", pooling over the pixels of a channel; pool, ties: as in `dual_scale`. Ties of
        maxima over pixels are those of x; half-precision u isn't rounded before it is pooled
    residual, act, slope: as in `scale`

    Returns y: (N, C, *S) in x's dtype and memory format; (y, *statistics) where norm or the excites return statistics
    beside their result, norm's first, then the channels'.
    Raises ValueError or TypeError, naming the argument, for wrong shapes, dtypes, options, or results.
    """
    norm_params, channel_params, spatial_params = tuple(norm_params), tuple(channel_params), tuple(spatial_params)
    if isinstance(cast(Any, x), torch.fx.Proxy):
        return traced(
            affine_dual_scale, x, norm, channel_excite, spatial_excite, norm_params, channel_params, spatial_params,
            moments=moments, channel=channel, pool=pool, ties=ties, residual=residual, act=act, slope=slope,
        )  # fmt: skip
    if is_transformed() or torch.jit.is_tracing():
        # What can't look into an autograd.Function gets the parts: the same numbers and gradients, in more passes.
        given = channel_moments(x)
        (scale, shift), kept = excite_.split(norm(given if moments else given[0], *norm_params))
        u, wide = affine_apply(x.to(accumulator(x.dtype)), scale, shift, given[0]), residual
        if residual is not None:
            wide = residual.to(u.dtype)
        out = dual_scale(
            u, channel_excite, spatial_excite, channel_params, spatial_params,
            channel=channel, pool=pool, ties=ties, residual=wide, act=act, slope=slope,
        )  # fmt: skip
        y, *more = out if isinstance(out, tuple) else (out,)
        y = y.to(x.dtype)
        return (y, *kept, *more) if kept or more else y
    checks.feature_map("x", x)
    checks.one_of("channel", channel, ("mean", "max", "mean_max"))
    checks.one_of("pool", pool, POOLS)
    checks.one_of("ties", ties, TIES)
    checks.one_of("act", act, activations.EPILOGUES)
    checks.like("residual", residual, "x", x)
    # Backward finds the maxima again by comparing, so all its passes must round alike: on one backend, which a residual
    # of another memory format would keep some of them from.
    residual = residual if residual is None else match(residual, x)
    for excite, its in ((norm, norm_params), (channel_excite, channel_params), (spatial_excite, spatial_params)):
        excite_.check(excite, its)
    params = (*norm_params, *channel_params, *spatial_params)
    options = _Options(
        (norm, channel_excite, spatial_excite), (len(norm_params), len(norm_params) + len(channel_params)),
        moments, channel, pool, ties, act, slope, residual is not None,
    )  # fmt: skip
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        y, *statistics = _Spanning.apply(x, residual, options, *params)
    else:
        found = _forward(x, residual, options, params, False)
        y, statistics = found[0], list(found[1])
    return (y, *statistics) if statistics else y


class _Options(NamedTuple):
    """Everything that isn't a tensor. splits: where the params of the two excites begin."""

    functions: tuple[Callable[..., Any], ...]
    splits: tuple[int, int]
    moments: bool
    channel: str
    pool: str
    ties: str
    act: str
    slope: float
    residual: bool

    def share(self, of: Sequence[Any]) -> tuple[Sequence[Any], ...]:
        """What belongs to norm, to the channels' excite and to the pixels'."""
        first, second = self.splits
        return of[:first], of[first:second], of[second:]


class _Kept(NamedTuple):
    """What backward needs besides x and the params, in the order of the equations."""

    given: Tensor
    both: Tensor
    pooled: Pooled
    gate: Tensor
    a: Tensor
    affine: Tensor
    q: Tensor
    within: Tensor
    pixel: Tensor


def _forward(
    x: Tensor, residual: Tensor | None, options: _Options, params: Sequence[Tensor], recording: bool
) -> tuple[Tensor, tuple[Tensor, ...], _Kept]:
    """y, the statistics, and what backward needs."""
    normal, channel, planar = options.share(params)
    extrema = has_max(options.channel)
    out = channel_moments(x, extrema)
    all_of, places = out if extrema else (out, x.new_empty((0,), dtype=torch.int64))
    given = all_of[:2] if options.moments else all_of[0]
    both, first = excite_.run(options.functions[0], (given,), normal, (2, *x.shape[:2]), "(2, N, C)", recording)
    both = both.contiguous()
    of_u = _describe(x, all_of, places, both[0], both[1], options.channel, options.ties)
    gate, second = excite_.run(options.functions[1], (of_u.p,), channel, x.shape[:2], "(N, C)", recording)
    a, shift = both * gate.to(both.dtype)
    affine = torch.stack([all_of[0], shift])
    indexed = has_max(options.pool) and options.ties == "first" and recording
    q, within = affine_spatial_pool(x, a, affine, options.pool, indexed)
    shape = (x.shape[0], *x.shape[2:])
    pixel, third = excite_.run(options.functions[2], (q,), planar, shape, "(N, *S)", recording)
    y = affine_pixel_scale(x, a, affine, pixel, residual, options.act, options.slope)
    return y, (*first, *second, *third), _Kept(given, both, of_u, gate, a, affine, q, within, pixel)


class _Spanning(torch.autograd.Function):
    """Composes registered passes, so that eager, compiled and exported programs run the same launches."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, options: _Options, *params: Tensor
    ) -> tuple[Tensor, ...]:  # fmt: skip
        y, statistics, kept = _forward(x, residual, options, params, True)
        need = activations.needs_aux(options.act, options.residual)
        aux = {"output": y, "residual": residual, None: None}[need]
        given, both, of_u, *rest = kept
        ctx.save_for_backward(x, aux, given, both, *of_u, *rest, *params)
        ctx.options = options
        ctx.backend = "auto" if torch.compiler.is_compiling() else forced()  # compiled code looks when it runs
        ctx.mark_non_differentiable(*statistics)
        return y, *statistics

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        return once(lambda: _Spanning.back(ctx, saved, dy), ctx.backend, "affine_dual_scale", (*saved, dy))

    @staticmethod
    def back(ctx: Any, saved: Sequence[Tensor], dy: Tensor) -> tuple[Tensor | None, ...]:
        """The three passes, and the gradients of the three functions between them."""
        x, aux, given, both, p, rise, values, index, gate, a, affine, q, within, pixel, *params = saved
        o: _Options = ctx.options
        acc, dy = accumulator(x.dtype), match(dy, x)
        (normal, channel, planar), needs = o.share(params), o.share(ctx.needs_input_grad[3:])
        ending = o.act, o.slope, o.pool
        dpixel, e, shared = dual_scale_reduce(x, dy, a, pixel, aux, q, affine, *ending, o.ties, o.residual)
        (dq,), dplanar = excite_.gradient(o.functions[2], (q,), planar, dpixel.to(pixel.dtype), needs[2])
        written, dq = keeps_e(o.act, o.residual), dq.to(acc)
        e, ending = (e if written else dy), ("identity" if o.residual else o.act, o.slope, o.pool)
        pools = "mean_max" if has_max(o.channel) else "mean"
        counted = values if o.ties == "split" else values[:0]
        (da, db), count = dual_scale_gate(
            x, e, a, pixel, dq, q, within, shared, counted, affine, *ending, pools, o.ties
        )
        scale, shift = both
        wide = gate.to(acc)
        (dp,), dchannel = excite_.gradient(
            o.functions[1], (p,), channel, (da * scale + db * shift).to(gate.dtype), needs[1]
        )
        dp = dp.to(acc)
        dscale, dshift, dlargest = da * wide, db * wide, None
        if o.channel != "max":
            dshift = dshift + (dp[0] if has_max(o.channel) else dp)
        if has_max(o.channel):
            dtop = dp if o.channel == "max" else dp[1]
            dscale, dshift, dlargest = dscale + dtop * rise, dshift + dtop, dtop * scale
        (dgiven,), dnormal = excite_.gradient(
            o.functions[0], (given,), normal, torch.stack([dscale, dshift]).to(both.dtype), needs[0]
        )
        dmean = (dgiven[0] if o.moments else dgiven) - a * db
        tilt = 2 * dgiven[1] if o.moments else None
        dpooled = dmean if dlargest is None else torch.stack([dmean - dlargest, dlargest])
        dx = dual_scale_apply(
            x, e, a, pixel, dq, q, within, shared, dpooled, counted, index, count, affine, tilt, *ending, pools, o.ties
        )
        return dx, e if o.residual else None, None, *dnormal, *dchannel, *dplanar


__all__ = ["affine_dual_scale", "affine_pixel_scale", "affine_spatial_pool"]
