"""A map that is scaled and shifted by functions of its own moments, gates itself and is shuffled, with what follows.

    mean, m2 = channel_moments(x),   scale, shift, steep, offset = excite((mean, m2), *params)
    t = x − mean,   u = scale·t + shift,   s = sigmoid(steep·t + offset),   v = u·s
    y[n, 2j] = act(v[n, j] + residual[n, 2j]),   y[n, 2j + 1] = act(v[n, C/2 + j] + residual[n, 2j + 1])

A BatchNorm and the shuffle attention behind it are this: with the batch's mean μ, reciprocal deviation r and a = γ·r
the normalised planes have the mean z̄ = a·(mean − μ) + β and the variance a²·m2/S, so what shuffle attention (Zhang &
Yang, arXiv:2102.00240, eq. 2–5) takes of them needs no pass over them. Channels come in groups of 2K; in the first K of
each a plane has one gate, steep is 0 there.

Forward reads x twice. Backward has two halves with the excite's between them; e = dy·act', q = e·u·s·(1 − s):

    reduce  dscale = Σ_s e·s·t, dshift = Σ_s e·s, dsteep = Σ_s q·t, doffset = Σ_s q      reads dy, x (and y), writes e
    excite  dmean, dm2, dparams = vjp of excite at the moments                           [N, C] only
    apply   dx = e·s·(scale + steep·u·(1 − s)) + 2·dm2·t + (dmean − scale·dshift − steep·doffset)/S     reads e, x

e is the residual's gradient; where there is no residual, it isn't written, and the second half computes it again.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..autograd import is_transformed, once, traced
from ..backend import forced
from ..layout import accumulator, like, match
from ..registry import op
from . import activations, checks
from . import excite as excite_
from .channel_moments import channel_moments
from .channel_pool import spread
from .plane_gate_shuffle import behind, shuffled, unshuffled
from .pool_scale import keeps_e


def second_halves(channels: int, k: int, device: Any = None) -> Tensor:
    """(C,) whether a channel is in the second half of its group of 2K."""
    return torch.arange(channels, device=device) % (2 * k) >= k


def _parts(x: Tensor, mean: Tensor, values: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """t, u and s of the equations above, in the accumulation dtype: differentiable."""
    acc = accumulator(x.dtype)
    scale, shift, steep, offset = (spread(v.to(acc), x) for v in values)
    t = x.to(acc) - spread(mean.to(acc), x)
    # One number for a plane of the first half, whatever x is.
    each = spread(second_halves(x.shape[1], k, x.device).expand(x.shape[:2]), x)
    return t, scale * t + shift, torch.sigmoid(torch.where(each, t * steep, 0) + offset)


def _whole(x: Tensor, mean: Tensor, values: Tensor, residual: Tensor | None, k: int, act: str, slope: float) -> Tensor:
    _, u, s = _parts(x, mean, values, k)
    v = shuffled(u * s)
    return activations.apply(act, v if residual is None else v + residual, slope).to(x.dtype)


def _check(x: Tensor, mean: Tensor, values: Tensor, aux: Tensor | None, k: int, act: str, slope: float) -> None:
    checks.feature_map("x", x)
    checks.shaped("mean", mean, x.shape[:2], "(N, C)")
    checks.shaped("values", values, (4, *x.shape[:2]), "(4, N, C)")
    checks.same_device("x", x, mean=mean, values=values)
    checks.like("residual", aux, "x", x)
    if k < 1 or x.shape[1] % (2 * k):
        raise ValueError(f"k must be C/(2·groups) for the {x.shape[1]} channels of x; got {k}")
    checks.one_of("act", act, activations.EPILOGUES)
    checks.number("slope", slope)


@op(
    check=_check,
    maps=("x", "residual"),
    budget=lambda x, mean, values, residual, *rest: (2 if residual is not None else 1, 1),
)
def gate_shuffle(
    x: Tensor, mean: Tensor, values: Tensor, residual: Tensor | None, k: int, act: str, slope: float
) -> Tensor:  # fmt: skip
    """Part of `moments_gate_shuffle`: y of the equations above. values: (4, N, C) scale, shift, steep, offset"""
    return like(x, _whole(x, mean, values, residual, k, act, slope))


def _check_reduce(
    x: Tensor, dy: Tensor, mean: Tensor, values: Tensor, aux: Tensor | None, k: int, act: str, slope: float,
    residual: bool,
) -> None:  # fmt: skip
    _check(x, mean, values, aux, k, act, slope)
    checks.like("dy", dy, "x", x)


@op(
    check=_check_reduce,
    maps=("x", "dy", "aux"),
    budget=lambda x, dy, mean, values, aux, k, act, slope, residual: (
        2 + (aux is not None),
        int(keeps_e(act, residual)),
    ),
)
def gate_shuffle_reduce(
    x: Tensor, dy: Tensor, mean: Tensor, values: Tensor, aux: Tensor | None, k: int, act: str, slope: float,
    residual: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """First half of the backward: sums (4, N, C), the gradients of values, of which steep's is 0 in first halves; and
    e, shuffled as y is, or empty where it isn't kept. aux: what `activations.needs_aux` names, or None"""
    t, u, s = _parts(x, mean, values, k)
    e = behind(dy.to(u.dtype), shuffled(u * s), aux, act, slope)
    own = unshuffled(e)
    q = own * u * s * (1 - s)
    total = lambda v: v.flatten(2).sum(-1)
    steep = torch.where(second_halves(x.shape[1], k, x.device), total(q * t), 0)
    sums = torch.stack([total(own * s * t), total(own * s), steep, total(q)])
    return sums, like(x, e.to(x.dtype)) if keeps_e(act, residual) else x.new_empty((0,))


def _check_apply(
    x: Tensor, dy: Tensor, mean: Tensor, values: Tensor, tilt: Tensor, level: Tensor, k: int, act: str, slope: float
) -> None:
    _check_reduce(x, dy, mean, values, None, k, act, slope, False)
    checks.shaped("tilt", tilt, x.shape[:2], "(N, C)")
    checks.shaped("level", level, x.shape[:2], "(N, C)")


@op(check=_check_apply, maps=("x", "dy"), budget=lambda *args: (2, 1))
def gate_shuffle_apply(
    x: Tensor, dy: Tensor, mean: Tensor, values: Tensor, tilt: Tensor, level: Tensor, k: int, act: str, slope: float
) -> Tensor:
    """Last half of the backward: dx = e·s·(scale + steep·u·(1 − s)) + tilt·t + level. dy: e, where act is identity"""
    t, u, s = _parts(x, mean, values, k)
    e = unshuffled(behind(dy.to(u.dtype), shuffled(u * s), None, act, slope))
    wide = lambda v: spread(v.to(u.dtype), x)
    each = wide(torch.where(second_halves(x.shape[1], k, x.device), values[2], 0))
    dx = e * s * (wide(values[0]) + torch.where(each == 0, 0, each * u * (1 - s))) + wide(tilt) * t + wide(level)
    return like(x, dx.to(x.dtype))


def moments_gate_shuffle(
    x: Tensor,
    excite: Callable[..., Any],
    *params: Tensor,
    k: int,
    residual: Tensor | None = None,
    act: str = "identity",
    slope: float = 0.01,
) -> Any:
    """A map affine in functions of its moments, gated by itself, its channels shuffled, with a residual and an
    activation; one backward owns both ends.

    x: (N, C, *S) feature map, C a multiple of 2K
    excite: a differentiable function (moments, *params) -> (4, N, C): scale, shift, steep, offset; moments (2, N, C)
        are mean and m2 = Σ (x − mean)², float32 for half-precision x. steep counts in the second half of each group of
        2K channels alone. It runs again in backward, so it must be pure; statistics that the caller keeps are returned
        beside, as a tuple (stacked, *statistics). Tensors that need a gradient must come through `params`.
    params: tensors handed to excite, which receive gradients
    residual: (N, C, *S) added after the shuffle, of x's dtype
    act, slope: activation after gate and residual, as in `scale`

    Returns y: (N, C, *S) in x's dtype and memory format; (y, *statistics) where excite returns statistics.
    Raises ValueError or TypeError, naming the argument, for wrong shapes, dtypes, options, or a result of excite that
    isn't (4, N, C).
    """
    if isinstance(cast(Any, x), torch.fx.Proxy):
        return traced(moments_gate_shuffle, x, excite, *params, k=k, residual=residual, act=act, slope=slope)
    if is_transformed() or torch.jit.is_tracing():
        # What can't look into an autograd.Function gets the parts: the same numbers and gradients, in more passes.
        given = channel_moments(x)
        values, kept = excite_.split(excite(given, *params))
        y = _whole(x, given[0], values, residual, k, act, slope)
        return (y, *kept) if kept else y
    checks.feature_map("x", x)
    checks.like("residual", residual, "x", x)
    checks.one_of("act", act, activations.EPILOGUES)
    excite_.check(excite, params)
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, *params))):
        given = channel_moments(x)
        values, statistics = excite_.run(excite, (given,), params, (4, *x.shape[:2]), "(4, N, C)", False)
        y = gate_shuffle(x, given[0], values, residual, k, act, slope)
        return (y, *statistics) if statistics else y
    y, *statistics = _Spanning.apply(x, residual, excite, k, act, slope, *params)
    return (y, *statistics) if statistics else y


class _Spanning(torch.autograd.Function):
    """Composes registered halves, so that eager, compiled and exported programs run the same launches."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor | None, excite: Callable[..., Any], k: int, act: str, slope: float,
        *params: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        given = channel_moments(x)
        values, statistics = excite_.run(excite, (given,), params, (4, *x.shape[:2]), "(4, N, C)")
        y = gate_shuffle(x, given[0], values, residual, k, act, slope)
        need = activations.needs_aux(act, residual is not None)
        aux = {"output": y, "residual": residual, None: None}[need]
        ctx.save_for_backward(x, values, aux, given, *params)
        ctx.consts = excite, k, act, slope, residual is not None
        ctx.backend = "auto" if torch.compiler.is_compiling() else forced()  # compiled code looks when it runs
        ctx.mark_non_differentiable(*statistics)
        return y, *statistics

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        return once(lambda: _Spanning.back(ctx, saved, dy), ctx.backend, "moments_gate_shuffle", (*saved, dy))

    @staticmethod
    def back(ctx: Any, saved: Sequence[Tensor], dy: Tensor) -> tuple[Tensor | None, ...]:
        """The two halves, and the excite's between them."""
        x, values, aux, given, *params = saved
        excite, k, act, slope, residual = ctx.consts
        dy, mean, written = match(dy, x), given[0], keeps_e(act, residual)
        sums, e = gate_shuffle_reduce(x, dy, mean, values, aux, k, act, slope, residual)
        needs = ctx.needs_input_grad[6:]
        (back,), dparams = excite_.gradient(excite, (given,), params, sums.to(values.dtype), needs)
        scale, _, steep, _ = values
        along = torch.where(second_halves(x.shape[1], k, x.device), steep * sums[3], 0)
        size = x[0, 0].numel() if x.numel() else 1
        e = e if written else dy
        dx = gate_shuffle_apply(
            x, e, mean, values, 2 * back[1], (back[0] - scale * sums[1] - along) / size, k,
            "identity" if residual else act, slope,
        )  # fmt: skip
        return dx, e if residual else None, None, None, None, None, *dparams


__all__ = ["gate_shuffle", "gate_shuffle_apply", "gate_shuffle_reduce", "moments_gate_shuffle"]
