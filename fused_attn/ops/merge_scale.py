"""Gates per channel and per pixel that don't wait for one another, both ends of them in one backward: BAM and scSE.

    bam_scale    p = mean_s x       gate = excite(p)    pixel given               y = x·(1 + σ(gate · pixel))     BAM
    scse_scale   p, q = mean_s x, Σ_c w_c·x             gate = g(p), pixel = h(q) y = x·(gate + pixel)            scSE

BAM: Park et al., arXiv:1807.06514, eq. 1–4. scSE: Roy et al., arXiv:1808.08127, eq. 3–6.

Backward has the shape of `pool_scale`'s: sums over pixels and channels in one pass, the excites, then

    dx = dy·f + dp/S (+ w·dq) (+ what the pixel gate's own network says)

in one pass. BAM's pixel gate comes from convolutions, which stay PyTorch's: their gradient of x is awaited, and added
in the last pass instead of in one of its own.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from ..autograd import is_transformed, once, traced
from ..backend import forced
from ..layout import accumulator, like, match
from ..registry import op
from . import checks
from . import excite as excite_
from .channel_pool import channel_pool, spread
from .scale import check_gates, factor, gate_gradients, over, scale


def _check_reduce(x: Tensor, dy: Tensor, gate: Tensor, pixel: Tensor, merge: str) -> None:
    checks.feature_map("x", x)
    checks.like("dy", dy, "x", x)
    check_gates(x, gate, pixel, merge)


@op(check=_check_reduce, maps=("x", "dy"), budget=lambda *args: (2, 0))
def merge_scale_reduce(x: Tensor, dy: Tensor, gate: Tensor, pixel: Tensor, merge: str) -> tuple[Tensor, Tensor]:
    """First half of the backward: dgate (N, C) and dpixel (N, *S) of `scale`, without dx."""
    acc = accumulator(x.dtype)
    return gate_gradients(dy.to(acc) * x.to(acc), x, gate, pixel, merge)


def _check_apply(
    dy: Tensor, other: Tensor | None, gate: Tensor, pixel: Tensor, dmean: Tensor, weight: Tensor | None,
    dplane: Tensor | None, merge: str,
) -> None:  # fmt: skip
    checks.feature_map("dy", dy)
    checks.like("other", other, "dy", dy)
    check_gates(dy, gate, pixel, merge)
    checks.shaped("dmean", dmean, dy.shape[:2], "(N, C)")
    checks.shaped("weight", weight, dy.shape[1:2], "(C,)")
    checks.shaped("dplane", dplane, (dy.shape[0], *dy.shape[2:]), "(N, *S)")


@op(check=_check_apply, maps=("dy", "other"), budget=lambda dy, other, *rest: (1 + (other is not None), 1))
def merge_scale_apply(
    dy: Tensor, other: Tensor | None, gate: Tensor, pixel: Tensor, dmean: Tensor, weight: Tensor | None,
    dplane: Tensor | None, merge: str,
) -> Tensor:  # fmt: skip
    """Second half of the backward: dx = dy·f + dmean/S + weight·dplane + other.

    weight: (C,); dplane: (N, *S); other: like dy; or None
    """
    acc = accumulator(dy.dtype)
    size = dy[0, 0].numel() if dy.numel() else 1
    dx = dy.to(acc) * factor(dy, gate, pixel, merge) + spread(dmean.to(acc) / size, dy)
    if weight is not None and dplane is not None:
        dx = dx + weight.to(acc).view(-1, *(1,) * (dy.dim() - 2)) * over(dplane.to(acc))
    return like(dy, (dx if other is None else dx + other).to(dy.dtype))


def _check_project(x: Tensor, gate: Tensor, pixel: Tensor) -> None:
    checks.feature_map("x", x)
    check_gates(x, gate, pixel, "product")


@op(check=_check_project, budget=lambda *args: (1, 0))
def project(x: Tensor, gate: Tensor, pixel: Tensor) -> tuple[Tensor, Tensor]:
    """Part of `scse_scale`: Σ_s x·pixel (N, C) and Σ_c x·gate (N, *S), in the accumulation dtype, in one read of x."""
    x = x.to(accumulator(x.dtype))
    return (x * over(pixel.to(x.dtype))).flatten(2).sum(-1), (x * spread(gate.to(x.dtype), x)).sum(1)


def _plain(x: Any) -> bool:
    """Whether nobody wants to look into an autograd.Function."""
    return not (is_transformed() or torch.compiler.is_compiling() or torch.jit.is_tracing())


def bam_scale(
    x: Tensor, channel_excite: Callable[..., Any], spatial: Callable[[Tensor], Tensor], *params: Tensor,
    merge: str = "sigmoid_product",
) -> Any:  # fmt: skip
    """y = x·f, where the channel gate is a small function of the means, and the pixel gate what `spatial` makes of x.

    x: (N, C, *S) feature map
    channel_excite: (means (N, C), *params) -> gate (N, C), or (gate, *statistics); pure, as in `pool_scale`
    spatial: x -> pixel (N, *S), any network; it runs under autograd as usual
    merge: as in `scale`

    Returns y, or (y, *statistics).
    Raises ValueError or TypeError, naming the argument, for a wrong shape, dtype or option.
    """
    if isinstance(cast(Any, x), torch.fx.Proxy):
        return traced(bam_scale, x, channel_excite, spatial, *params, merge=merge)
    checks.feature_map("x", x)
    excite_.check(channel_excite, params)
    if not _plain(x):
        pixel = spatial(x)
        gate, kept = excite_.split(channel_excite(channel_pool(x), *params))
        y: Tensor = scale(x, gate, None, pixel, "identity", 0.01, merge)
        return (y, *kept) if kept else y
    awaited: dict[str, Any] = {}
    through, token = _Await.apply(x, awaited)
    y, *statistics = _Bam.apply(x.detach(), token, spatial(through), channel_excite, merge, awaited, *params)
    return (y, *statistics) if statistics else y


class _Await(torch.autograd.Function):
    """x on its way into the spatial branch, and an empty token into the merge. Its backward comes last, when all that x
    gets is known; by the token it comes though the branch doesn't depend on x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, awaited: dict[str, Any]) -> tuple[Tensor, Tensor]:
        ctx.awaited, ctx.backend = awaited, forced()
        ctx.set_materialize_grads(False)
        return x.view_as(x), x.new_empty((0,))

    @staticmethod
    def backward(ctx: Any, other: Tensor | None, token: Tensor | None) -> tuple[Tensor | None, None]:
        if token is None:  # only the branch is differentiated
            return other, None
        dy, gate, pixel, dmean, merge = ctx.awaited.pop("merge")
        other = torch.zeros_like(dy) if other is None else other
        back = lambda: (merge_scale_apply(dy, match(other, dy), gate, pixel, dmean, None, None, merge),)
        (dx,) = once(back, ctx.backend, "bam_scale", (other, dy))
        return dx, None


class _Bam(torch.autograd.Function):
    """The merge. It has no gradient for x: it leaves to `_Await` what that needs."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, token: Tensor, pixel: Tensor, excite: Callable[..., Any], merge: str,
        awaited: dict[str, Any], *params: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        p = channel_pool(x, "mean")
        gate, statistics = excite_.run(excite, (p,), params, x.shape[:2], "(N, C)")
        y = scale(x, gate, None, pixel, "identity", 0.01, merge)
        ctx.save_for_backward(x, gate, p, pixel, *params)
        ctx.consts, ctx.backend = (excite, merge, awaited), forced()
        ctx.mark_non_differentiable(*statistics)
        return y, *statistics

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        return once(lambda: _Bam.back(ctx, saved, dy), ctx.backend, "bam_scale", (*saved, dy))

    @staticmethod
    def back(ctx: Any, saved: Sequence[Tensor], dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, p, pixel, *params = saved
        excite, merge, awaited = ctx.consts
        dy = match(dy, x)
        dgate, dpixel = merge_scale_reduce(x, dy, gate, pixel, merge)
        (dp,), dparams = excite_.gradient(excite, (p,), params, dgate.to(gate.dtype), ctx.needs_input_grad[6:])
        awaited["merge"] = dy, gate, pixel, dp, merge
        return None, dy.new_empty((0,)), dpixel.to(pixel.dtype), None, None, None, *dparams


def scse_scale(
    x: Tensor, weight: Tensor, channel_excite: Callable[..., Any], spatial_excite: Callable[..., Any],
    channel_params: Sequence[Tensor] = (), spatial_params: Sequence[Tensor] = (), merge: str = "sum",
) -> Tensor:  # fmt: skip
    """y = x·(gate + pixel), where gate comes from the channels' means and pixel from one projection of the channels.

    x: (N, C, *S) feature map; weight: (C,) of the projection Σ_c weight_c·x
    channel_excite: (means (N, C), *channel_params) -> gate (N, C)
    spatial_excite: (projection (N, *S), *spatial_params) -> pixel (N, *S); both pure, as in `pool_scale`
    merge: as in `scale`

    Raises ValueError or TypeError, naming the argument, for a wrong shape, dtype or option.
    """
    if isinstance(cast(Any, x), torch.fx.Proxy):
        return traced(
            scse_scale, x, weight, channel_excite, spatial_excite, channel_params, spatial_params, merge=merge
        )  # type: ignore[return-value]
    checks.feature_map("x", x)
    checks.shaped("weight", weight, x.shape[1:2], "(C,)")
    excite_.check(channel_excite, channel_params)
    excite_.check(spatial_excite, spatial_params)
    if not _plain(x):
        gate = channel_excite(channel_pool(x), *channel_params)
        acc = accumulator(x.dtype)
        plane = (x.to(acc) * weight.to(acc).view(-1, *(1,) * (x.dim() - 2))).sum(1)
        return scale(x, gate, None, spatial_excite(plane, *spatial_params), "identity", 0.01, merge)
    return _Scse.apply(
        x, weight, (channel_excite, spatial_excite), len(channel_params), merge, *channel_params, *spatial_params
    )


class _Scse(torch.autograd.Function):
    """Both branches and their merge."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, excites: tuple[Callable[..., Any], ...], split: int, merge: str,
        *params: Tensor,
    ) -> Tensor:  # fmt: skip
        acc, size = accumulator(x.dtype), x[0, 0].numel() if x.numel() else 1
        shape = (x.shape[0], *x.shape[2:])
        ones = torch.ones(shape, dtype=acc, device=x.device)
        total, plane = project(x, weight.to(acc).expand(x.shape[:2]), ones)
        p = total / size
        gate, _ = excite_.run(excites[0], (p,), params[:split], x.shape[:2], "(N, C)")
        pixel, _ = excite_.run(excites[1], (plane,), params[split:], shape, "(N, *S)")
        ctx.save_for_backward(x, weight, p, plane, gate, pixel, *params)
        ctx.consts, ctx.backend = (excites, split, merge), forced()
        return scale(x, gate, None, pixel, "identity", 0.01, merge)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        return once(lambda: _Scse.back(ctx, saved, dy), ctx.backend, "scse_scale", (*saved, dy))

    @staticmethod
    def back(ctx: Any, saved: Sequence[Tensor], dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, p, plane, gate, pixel, *params = saved
        excites, split, merge = ctx.consts
        dy, needs = match(dy, x), ctx.needs_input_grad[5:]
        dgate, dpixel = merge_scale_reduce(x, dy, gate, pixel, merge)
        (dp,), dchannel = excite_.gradient(excites[0], (p,), params[:split], dgate.to(gate.dtype), needs[:split])
        (dq,), dspatial = excite_.gradient(excites[1], (plane,), params[split:], dpixel.to(pixel.dtype), needs[split:])
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = project(x, torch.zeros_like(gate), dq)[0].sum(0).to(weight.dtype)
        dx = merge_scale_apply(dy, None, gate, pixel, dp, weight, dq, merge)
        return dx, dweight, None, None, None, *dchannel, *dspatial
