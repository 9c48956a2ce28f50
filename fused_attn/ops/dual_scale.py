"""Both ends of a gate per channel and then a gate per pixel, around any two small excites; one backward owns them all.

    p = channel_pool(x)              gate  = channel_excite(p, *channel_params)     (N, C)
    q = spatial_pool(x·gate)         pixel = spatial_excite(q, *spatial_params)     (N, *S)
    y = act(x·gate·pixel + residual)

CBAM (Woo et al., arXiv:1807.06521, eq. 1–3). x·gate is never stored: forward reads x three times and writes y. The
excites' gradients stand between three passes of backward, none of which writes a pooled gradient:

    reduce   e = dy·act'(v),  dpixel = Σ_c e·x·gate                                     reads dy, x
    excite   dq = vjp of spatial_excite
    gate     h = e·pixel + dq_mean/C + dq_max at the maxima over c,  dgate = Σ_s x·h    reads e, x
    excite   dp = vjp of channel_excite
    apply    dx = gate·h + dp_mean/S + dp_max at the maxima over s                      reads e (x), writes dx

With a residual and an activation e is written, in x's dtype: for half-precision x what it says of the gates has that
resolution, unless the activation only cuts (relu). The last pass needs x where ties are split, where the activation
has no residual before it, or where a norm's statistics are the batch's. Checked in float64 against autograd for every
pooling, tie rule and epilogue.

The passes also take `affine` (2, N, C), a centre and a shift of every plane: then gate·(x − centre) + shift stands for
x·gate, and what they know of it is the affine map's: affine_dual_scale, a norm before the gates.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from ..autograd import is_inference_compiled, is_transformed, once
from ..backend import forced
from ..layout import accumulator, like, match
from ..registry import op
from . import activations, checks
from . import excite as excite_
from .channel_pool import POOLS as CHANNEL_POOLS
from .channel_pool import TIES, channel_pool, has_max, pool_gradient, spread
from .pool_scale import keeps_e, largest
from .scale import check_gates, epilogue_gradient, over, scale
from .spatial_pool import POOLS, check_places, check_planes, gated, plane_gradient, spatial_pool


def _check_reduce(
    x: Tensor, dy: Tensor, gate: Tensor, pixel: Tensor, aux: Tensor | None, planes: Tensor, affine: Tensor | None,
    act: str, slope: float, pool: str, ties: str, residual: bool,
) -> None:  # fmt: skip
    checks.feature_map("x", x)
    checks.like("dy", dy, "x", x)
    checks.tensor("gate", gate)
    checks.tensor("pixel", pixel)
    check_gates(x, gate, pixel, "product")
    checks.shaped("affine", affine, (2, *x.shape[:2]), "(2, N, C)")
    checks.like("aux", aux, "x", x)
    checks.one_of("act", act, activations.EPILOGUES)
    checks.one_of("pool", pool, POOLS)
    checks.one_of("ties", ties, TIES)
    if has_max(pool) and ties == "split":
        check_planes("planes", planes, x, pool)


@op(
    check=_check_reduce,
    maps=("x", "dy", "aux"),
    budget=lambda x, dy, gate, pixel, aux, planes, affine, act, slope, pool, ties, residual: (
        2 + (aux is not None),
        int(keeps_e(act, residual)),
    ),
)
def dual_scale_reduce(
    x: Tensor, dy: Tensor, gate: Tensor, pixel: Tensor, aux: Tensor | None, planes: Tensor, affine: Tensor | None,
    act: str, slope: float, pool: str, ties: str, residual: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """First pass of the backward: dpixel (N, *S); e, or empty where it is dy; how many channels hold each pixel's
    maximum, or empty.

    aux: what `activations.needs_aux` names, or None; planes: what `spatial_pool` returned, for ties="split"
    """
    u = gated(x, gate, affine)
    e = epilogue_gradient(dy, u, None, aux, act, slope, pixel)
    kept = like(x, e.to(x.dtype)) if keeps_e(act, residual) else x.new_empty((0,))
    count = e.new_empty((0,))
    if has_max(pool) and ties == "split":
        count = (u == planes[:, -1:]).to(e.dtype).sum(1)
    return (e * u).sum(1), kept, count


def _check_gate(
    x: Tensor, e: Tensor, gate: Tensor, pixel: Tensor, dplanes: Tensor, planes: Tensor, places: Tensor, shared: Tensor,
    values: Tensor, affine: Tensor | None, act: str, slope: float, pool: str, channel: str, ties: str,
) -> None:  # fmt: skip
    _check_reduce(x, e, gate, pixel, None, planes, affine, act, slope, pool, ties, False)
    checks.one_of("channel", channel, CHANNEL_POOLS)
    check_planes("dplanes", dplanes, x, pool)
    if has_max(pool) and ties == "first":
        check_places(places, x)


@op(
    check=_check_gate,
    maps=("x", "e"),
    budget=lambda *args: (2, 0),
)
def dual_scale_gate(
    x: Tensor, e: Tensor, gate: Tensor, pixel: Tensor, dplanes: Tensor, planes: Tensor, places: Tensor, shared: Tensor,
    values: Tensor, affine: Tensor | None, act: str, slope: float, pool: str, channel: str, ties: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Second pass of the backward: dgate (N, C), and how often each channel's maximum occurs (N, C), or empty.

    act: "identity" where e is what the first pass wrote; dplanes: the spatial excite's gradient
    planes, shared: what `spatial_pool` and the first pass returned, for ties="split"; places: for ties="first"
    values: (N, C) the channels' maxima, for ties="split"; channel: which pooling that was
    With affine dgate is (2, N, C): of the gate and of the shift.
    """
    h = _inner(x, e, gate, pixel, dplanes, planes, places, affine, act, slope, pool, ties)
    count = h.new_empty((0,))
    if has_max(channel) and ties == "split":
        count = (x.to(h.dtype) == spread(values, x)).to(h.dtype).flatten(2).sum(-1)
    at = x.to(h.dtype)
    if affine is None:
        return (at * h).flatten(2).sum(-1), count
    at = at - spread(affine[0].to(h.dtype), x)
    return torch.stack([(at * h).flatten(2).sum(-1), h.expand(x.shape).flatten(2).sum(-1)]), count


def _inner(
    x: Tensor, e: Tensor, gate: Tensor, pixel: Tensor, dplanes: Tensor, planes: Tensor, places: Tensor,
    affine: Tensor | None, act: str, slope: float, pool: str, ties: str,
) -> Tensor:  # fmt: skip
    """h, the gradient of x·gate."""
    u = gated(x, gate, affine)
    e = epilogue_gradient(e, u, None, None, act, slope, pixel)
    return e * over(pixel.to(e.dtype)) + plane_gradient(u, dplanes.to(e.dtype), planes, places, pool, ties)


def _check_apply(
    x: Tensor, e: Tensor, gate: Tensor, pixel: Tensor, dplanes: Tensor, planes: Tensor, places: Tensor, shared: Tensor,
    dpooled: Tensor, values: Tensor, index: Tensor, count: Tensor, affine: Tensor | None, tilt: Tensor | None,
    act: str, slope: float, pool: str, channel: str, ties: str,
) -> None:  # fmt: skip
    _check_gate(x, e, gate, pixel, dplanes, planes, places, shared, values, affine, act, slope, pool, channel, ties)
    many = channel == "mean_max"
    checks.shaped("dpooled", dpooled, (2, *x.shape[:2]) if many else x.shape[:2], "(2, N, C)" if many else "(N, C)")
    if has_max(channel) and ties == "first":
        checks.index("index", index, x.shape[:2], "(N, C)")
    checks.shaped("tilt", tilt, x.shape[:2], "(N, C)")
    if tilt is not None and affine is None:
        raise ValueError("tilt needs affine, which has the centre; got None")


def reads_x(tilt: Tensor | None, act: str, pool: str, channel: str, ties: str) -> bool:
    """Whether the last pass needs x: for the activation's place, a maximum's, the sign, or the moments' gradient."""
    if tilt is not None:
        return True
    return act != "identity" or channel == "mean_abs" or ((has_max(pool) or has_max(channel)) and ties == "split")


@op(
    check=_check_apply,
    maps=("x", "e"),
    budget=lambda x, e, gate, pixel, dplanes, planes, places, shared, dpooled, values, index, count, affine, tilt,
    act, slope, pool, channel, ties: (1 + reads_x(tilt, act, pool, channel, ties), 1),
)  # fmt: skip
def dual_scale_apply(
    x: Tensor, e: Tensor, gate: Tensor, pixel: Tensor, dplanes: Tensor, planes: Tensor, places: Tensor, shared: Tensor,
    dpooled: Tensor, values: Tensor, index: Tensor, count: Tensor, affine: Tensor | None, tilt: Tensor | None,
    act: str, slope: float, pool: str, channel: str, ties: str,
) -> Tensor:  # fmt: skip
    """Last pass of the backward: dx = gate·h + the channel pooling's gradient, spread + tilt·(x − centre)."""
    h = _inner(x, e, gate, pixel, dplanes, planes, places, affine, act, slope, pool, ties)
    stacked = torch.stack([values, values]) if channel == "mean_max" and ties == "split" else values
    back = pool_gradient(x, dpooled.to(h.dtype), stacked, index, channel, ties)
    if tilt is not None and affine is not None:
        back = back + spread(tilt.to(h.dtype), x) * (x.to(h.dtype) - spread(affine[0].to(h.dtype), x))
    return like(x, (h * spread(gate.to(h.dtype), x) + back).to(x.dtype))


def dual_scale(
    x: Tensor,
    channel_excite: Callable[..., Any],
    spatial_excite: Callable[..., Any],
    channel_params: Sequence[Tensor] = (),
    spatial_params: Sequence[Tensor] = (),
    *,
    channel: str = "mean_max",
    pool: str = "mean_max",
    ties: str = "split",
    residual: Tensor | None = None,
    act: str = "identity",
    slope: float = 0.01,
) -> Any:
    """Scales x per channel and then per pixel, by gates that two small functions make of what is pooled; one backward
    owns all of it.

    x: (N, C, *S) feature map
    channel_excite: (descriptor, *channel_params) -> gate (N, C); the descriptor is (N, C), or (2, N, C) for "mean_max"
    spatial_excite: (planes, *spatial_params) -> pixel (N, *S); the planes (N, P, *S) are pooled from x·gate
        Both get float32 for half-precision x, run again in backward and must be pure; see `pool_scale`
    channel_params, spatial_params: tensors handed to them, which receive gradients
    channel: pooling over the pixels of a channel, as in `channel_pool`; pool: over channels, as in `spatial_pool`
    ties: of both poolings
    residual, act, slope: as in `scale`

    Returns y: (N, C, *S) in x's dtype and memory format; (y, *statistics) where the excites return statistics beside
    their gates, the channels' first.
    Raises ValueError or TypeError, naming the argument, for wrong shapes, dtypes, options, or gates of another shape.
    """
    if is_transformed() or torch.jit.is_tracing() or isinstance(cast(Any, x), torch.fx.Proxy):
        # What can't look into an autograd.Function gets the parts: the same numbers and gradients, in more passes.
        gate, kept = excite_.split(channel_excite(channel_pool(x, channel, ties), *channel_params))
        pixel, more = excite_.split(spatial_excite(spatial_pool(x, gate, pool, ties), *spatial_params))
        y: Tensor = scale(x, gate, residual, pixel, act, slope, "product")
        return (y, *kept, *more) if kept or more else y
    checks.feature_map("x", x)
    checks.one_of("channel", channel, CHANNEL_POOLS)
    checks.one_of("pool", pool, POOLS)
    checks.one_of("ties", ties, TIES)
    checks.one_of("act", act, activations.EPILOGUES)
    checks.like("residual", residual, "x", x)
    excite_.check(channel_excite, channel_params)
    excite_.check(spatial_excite, spatial_params)
    # Else nobody asks for places of maxima.
    recording = torch.is_grad_enabled() or (torch.compiler.is_compiling() and not is_inference_compiled())
    excites, split = (channel_excite, spatial_excite), len(channel_params)
    params = (*channel_params, *spatial_params)
    if not recording:
        found = _forward(x, residual, False, excites, params, split, channel, pool, ties, act, slope)
        y, statistics = found.y, found.statistics
    else:
        y, *statistics = _Spanning.apply(
            x, residual, recording, excites, split, channel, pool, ties, act, slope, *params
        )  # fmt: skip
    return (y, *statistics) if statistics else y


class _Forward(NamedTuple):
    """What the forward makes, in the order of the equations; the places of maxima are empty where ties are split."""

    y: Tensor
    statistics: tuple[Tensor, ...]
    p: Tensor
    within: Tensor
    gate: Tensor
    q: Tensor
    places: Tensor
    pixel: Tensor


def _forward(
    x: Tensor, residual: Tensor | None, recording: bool, excites: tuple[Callable[..., Any], ...],
    params: Sequence[Tensor], split: int, channel: str, pool: str, ties: str, act: str, slope: float,
) -> _Forward:  # fmt: skip
    nothing = x.new_empty((0,), dtype=torch.int64)
    first = has_max(channel) and ties == "first" and recording
    out = channel_pool(x, channel, "first" if first else "split", first)
    p, index = out if first else (out, nothing)
    gate, statistics = excite_.run(excites[0], (p,), params[:split], x.shape[:2], "(N, C)", recording)
    first = has_max(pool) and ties == "first" and recording
    out = spatial_pool(x, gate, pool, "first" if first else "split", first)
    q, places = out if first else (out, nothing)
    shape = (x.shape[0], *x.shape[2:])
    pixel, more = excite_.run(excites[1], (q,), params[split:], shape, "(N, *S)", recording)
    y = scale(x, gate, residual, pixel, act, slope, "product")
    return _Forward(y, (*statistics, *more), p, index, gate, q, places, pixel)


class _Spanning(torch.autograd.Function):
    """Composes registered passes, so that eager, compiled and exported programs run the same launches."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, recording: bool, excites: tuple[Callable[..., Any], ...],
        split: int, channel: str, pool: str, ties: str, act: str, slope: float, *params: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        y, statistics, p, index, gate, q, places, pixel = _forward(
            x, residual, recording, excites, params, split, channel, pool, ties, act, slope
        )
        need = activations.needs_aux(act, residual is not None)
        aux = {"output": y, "residual": residual, None: None}[need]
        ctx.save_for_backward(x, gate, p, index, pixel, q, places, aux, *params)
        ctx.consts = excites, split, channel, pool, ties, act, slope, residual is not None
        ctx.backend = "auto" if torch.compiler.is_compiling() else forced()  # compiled code looks when it runs
        ctx.mark_non_differentiable(*statistics)
        return y, *statistics

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        return once(lambda: _Spanning.back(ctx, saved, dy), ctx.backend, "dual_scale", (*saved, dy))

    @staticmethod
    def back(ctx: Any, saved: Sequence[Tensor], dy: Tensor) -> tuple[Tensor | None, ...]:
        """The three passes, and the excites' between them."""
        x, gate, p, index, pixel, q, places, aux, *params = saved
        excites, split, channel, pool, ties, act, slope, residual = ctx.consts
        dy, acc, needs = match(dy, x), accumulator(x.dtype), ctx.needs_input_grad[10:]
        dpixel, e, shared = dual_scale_reduce(x, dy, gate, pixel, aux, q, None, act, slope, pool, ties, residual)
        (dq,), dspatial = excite_.gradient(excites[1], (q,), params[split:], dpixel.to(pixel.dtype), needs[split:])
        written = keeps_e(act, residual)
        e, through = (e if written else dy), ("identity" if residual else act)
        values = largest(p, channel) if has_max(channel) and ties == "split" else p.new_empty((0,))
        dq = dq.to(acc)
        dgate, count = dual_scale_gate(
            x, e, gate, pixel, dq, q, places, shared, values, None, through, slope, pool, channel, ties
        )
        (dp,), dchannel = excite_.gradient(excites[0], (p,), params[:split], dgate.to(gate.dtype), needs[:split])
        dx = dual_scale_apply(
            x, e, gate, pixel, dq, q, places, shared, dp.to(acc), values, index, count, None, None,
            through, slope, pool, channel, ties,
        )  # fmt: skip
        return dx, e if residual else None, None, None, None, None, None, None, None, None, *dchannel, *dspatial
