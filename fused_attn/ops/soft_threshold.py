"""Soft-thresholding by a threshold per channel or per sample: one read of x, one write of y.

    y[n, c, s] = sign(x[n, c, s]) · max(|x[n, c, s]| − τ[n, c], 0) (+ residual[n, c, s])

The shrinkage of deep residual shrinkage networks (Zhao et al., "Deep Residual Shrinkage Networks for Fault Diagnosis",
IEEE TII 2020, eq. 5), with the identity of the unit around it. Backward, with e = dy·sign(x)·[|x| > τ]:

    dx = e·sign(x)        dτ[n, c] = −Σ_s e        dresidual = dy

What is cut has no gradient, and neither has a tie |x| = τ: the form max(sub, sub − sub) of many ports passes half of it
there, and makes NaN of ±inf, where this one gives ±inf. A negative τ isn't an error: all of x but 0 then grows by |τ|.
"""

import torch
from torch import Tensor

from ..layout import accumulator, like, match
from ..registry import case, op
from . import checks
from .channel_pool import spread


def check_threshold(x: Tensor, tau: Tensor) -> None:
    """Raises for a tau that is neither one threshold per channel nor one per sample."""
    checks.tensor("tau", tau)
    n = x.shape[0]
    if tuple(tau.shape) not in ((n, x.shape[1]), (n, 1), (n,)):
        raise ValueError(
            f"tau must have shape (N, C), (N, 1) or (N,), here {(n, x.shape[1])}, {(n, 1)} or {(n,)}; "
            f"got {tuple(tau.shape)}"
        )
    checks.same_device("x", x, tau=tau)


def per_channel(tau: Tensor, x: Tensor) -> Tensor:
    """tau as (N, C), in the dtype of the arithmetic."""
    return tau.to(accumulator(x.dtype)).reshape(x.shape[0], -1 if tau.numel() else 1).expand(x.shape[:2])


def like_threshold(sums: Tensor, tau: Tensor) -> Tensor:
    """A gradient (N, C) in tau's shape and dtype: summed over the channels that share a threshold."""
    if sums.shape != tau.shape:
        sums = sums.sum(1).view(tau.shape)
    return sums.to(tau.dtype)


def passed(x: Tensor, tau: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """e = dy·sign(x)·[|x| > τ] and sign(x), in the accumulation dtype; tau as `per_channel` makes it."""
    acc = accumulator(x.dtype)
    sign = x.to(acc).sign()
    return torch.where(x.to(acc).abs() - spread(tau, x) <= 0, 0, dy.to(acc) * sign), sign


def _check(x: Tensor, tau: Tensor, residual: Tensor | None) -> None:
    checks.feature_map("x", x)
    check_threshold(x, tau)
    checks.like("residual", residual, "x", x)


def formula(x: Tensor, tau: Tensor, residual: Tensor | None) -> Tensor:
    """The equation above, in x's dtype, the arithmetic in the accumulation dtype."""
    v = x.to(accumulator(x.dtype))
    y = v.sign() * torch.relu(v.abs() - spread(per_channel(tau, x), x))
    return (y if residual is None else y + residual).to(x.dtype)


def _save(args: tuple, y: Tensor) -> tuple[tuple[Tensor | None, ...], tuple]:
    x, tau, residual = args
    return (x, tau), (residual is not None,)


def _backward(saved: tuple, consts: tuple, grads: tuple, needs: tuple) -> tuple[Tensor | None, ...]:
    (x, tau), dy = saved, match(grads[0], saved[0])
    dx, dtau = soft_threshold_bwd(x, tau, dy)
    return dx, dtau, dy if consts[0] else None  # the residual's gradient is dy itself: nothing is written


def _terms(x: Tensor, tau: Tensor, *rest: object) -> int:
    if not x.numel():
        return 1
    return x[0].numel() if tau.numel() == x.shape[0] else x[0, 0].numel()


@op(
    formula=formula,
    check=_check,
    save=_save,
    backward=_backward,
    maps=("x", "residual"),
    budget=lambda x, tau, residual: (1 + (residual is not None), 1),
    reduces=_terms,
    cases=[
        case("bench", x=(8, 512, 28, 28), tau=(8, 512)),
        case("bench", x=(8, 512, 28, 28), tau=(8, 1), residual=(8, 512, 28, 28)),
        case(x=(2, 3, 7, 7), tau=(2, 3)),
        case(x=(2, 17, 13), tau=(2, 17), residual=(2, 17, 13)),
        case(x=(1, 5, 3, 4, 5), tau=(1,), residual=(1, 5, 3, 4, 5)),
        case(x=(3, 31, 5, 1), tau=(3, 1)),
        case(x=(2, 16, 1, 1), tau=(2, 16), residual=(2, 16, 1, 1)),
        case(x=(2, 24, 14, 14), tau=(2,)),
        case(x=(0, 4, 5, 5), tau=(0, 4)),
        case(x=(0, 4, 5, 5), tau=(0,)),
    ],
)
def soft_threshold(x: Tensor, tau: Tensor, residual: Tensor | None = None) -> Tensor:
    """Moves every element of a feature map towards 0 by its channel's or sample's threshold, and adds a residual, in
    one pass.

    x: (N, C, *S) feature map
    tau: (N, C) thresholds, or (N, 1) or (N,), one for all of a sample; float32 is welcome beside a half-precision x
    residual: (N, C, *S) added afterwards, of x's dtype

    Returns y: (N, C, *S) in x's dtype and memory format.
    Raises ValueError or TypeError, naming the argument, for a wrong shape, dtype or device.
    """
    return like(x, formula(x, tau, residual))


def _check_bwd(x: Tensor, tau: Tensor, dy: Tensor) -> None:
    checks.feature_map("x", x)
    check_threshold(x, tau)
    checks.like("dy", dy, "x", x)


@op(check=_check_bwd, maps=("x", "dy"), budget=lambda x, tau, dy: (2, 1))
def soft_threshold_bwd(x: Tensor, tau: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of `soft_threshold` in one pass: dx, and dtau in tau's shape and dtype."""
    e, sign = passed(x, per_channel(tau, x), dy)
    return like(x, (e * sign).to(x.dtype)), like_threshold(-e.flatten(2).sum(-1), tau)


__all__ = ["soft_threshold", "soft_threshold_bwd"]
