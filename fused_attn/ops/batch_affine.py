"""A batch normalisation, from the moments of every plane, as one affine map per sample and channel.

    μ[c] = mean_n m[n, c]        var[c] = Σ_n (m2[n, c] + S·(m[n, c] − μ[c])²) / (N·S)        r = 1/√(var + eps)
    scale[n, c] = γ[c]·r[c]      shift[n, c] = scale[n, c]·(m[n, c] − μ[c]) + β[c]

so that γ·(x − μ)·r + β = scale·(x − m) + shift, with m, m2 the means and squared deviations of `channel_moments`; shift
is also the mean of what is normalised, which a gate behind it pools. Ioffe and Szegedy, arXiv:1502.03167, alg. 1; the
squares are merged by Chan, Golub and LeVeque's formula.

Backward, d = m − μ:  dγ = r·t,  t = Σ_n (dscale + dshift·d),  dβ = Σ_n dshift,  dvar = −½·r³·γ·t
dm = scale·(dshift − dβ/N) + 2·dvar·d/N,  dm2 = dvar/(N·S)
"""

import torch
from torch import Tensor

from ..layout import accumulator
from ..registry import case, op
from . import checks


def _check(moments: Tensor, weight: Tensor | None, bias: Tensor | None, size: int, eps: float) -> None:
    checks.tensor("moments", moments)
    if moments.dim() != 3 or moments.shape[0] != 2:
        raise ValueError(f"moments must have shape (2, N, C); got {tuple(moments.shape)}")
    for name, value in (("weight", weight), ("bias", bias)):
        checks.shaped(name, value, moments.shape[2:], "(C,)")
    checks.same_device("moments", moments, weight=weight, bias=bias)
    checks.number("size", size)
    checks.number("eps", eps)
    if size < 1:
        raise ValueError(f"size must be at least 1; got {size}")


def formula(
    moments: Tensor, weight: Tensor | None, bias: Tensor | None, size: int, eps: float
) -> tuple[Tensor, Tensor]:
    mean, m2 = moments.to(accumulator(moments.dtype))
    mu = mean.mean(0)
    d = mean - mu
    var = (m2.sum(0) / size + d.square().sum(0)) / mean.shape[0]
    a = torch.rsqrt(var + eps)
    a = a if weight is None else a * weight.to(a.dtype)
    shift = a * d
    shift = shift if bias is None else shift + bias.to(a.dtype)
    return torch.stack([a.expand_as(shift), shift]), torch.stack([mu, var]).detach()


def _save(args: tuple, outs: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor | None, ...], tuple]:
    moments, weight, bias, size, eps = args
    return (moments, outs[1], weight), (size, eps, None if bias is None else bias.dtype)


def _backward(saved: tuple, consts: tuple, grads: tuple, needs: tuple) -> tuple[Tensor | None, ...]:
    (moments, statistics, weight), (size, eps, biased) = saved, consts
    dmoments, dnorm = batch_affine_bwd(moments, grads[0], statistics, weight, size, eps)
    return (
        dmoments,
        None if weight is None else dnorm[0].to(weight.dtype),
        None if biased is None else dnorm[1].to(biased),
    )


@op(
    formula=formula,
    check=_check,
    save=_save,
    backward=_backward,
    public=lambda args, outs: (outs[0], outs[1].detach()),
    maps=(),
    budget=lambda *args: (0, 0),
    reduces=lambda moments, *rest: 4 * moments.shape[1],
    cases=[
        case("bench", moments=(2, 8, 2048), weight=(2048,), bias=(2048,), size=49, eps=1e-5),
        case(moments=(2, 4, 33), weight=(33,), bias=(33,), size=196, eps=1e-5),
        case(moments=(2, 3, 17), size=13, eps=0.5),
        case(moments=(2, 1, 5), weight=(5,), size=49, eps=1.0),
        case(moments=(2, 0, 4), weight=(4,), bias=(4,), size=4, eps=1e-5),
        case(moments=(2, 130, 8), weight=(8,), bias=(8,), size=1, eps=1e-5),
    ],
)
def batch_affine(
    moments: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, size: int = 1, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Scale and shift of a batch normalisation for every sample and channel, relative to the mean of each plane.

    moments: (2, N, C) mean and squared deviations of every plane, as `channel_moments` returns them
    weight, bias: (C,) γ and β; None: 1 and 0
    size: S, how many values a plane has
    eps: added to the variance

    Returns both (2, N, C): scale and shift; statistics (2, C): mean and biased variance of the batch, which have no
        gradient. Float32 for half-precision moments, else their dtype.
    Raises ValueError or TypeError, naming the argument, for a wrong shape, dtype, device or option.
    """
    return formula(moments, weight, bias, size, eps)


@op(
    check=lambda moments, dboth, statistics, weight, size, eps: _check(moments, weight, None, size, eps),
    maps=(),
    budget=lambda *args: (0, 0),
)
def batch_affine_bwd(
    moments: Tensor, dboth: Tensor, statistics: Tensor, weight: Tensor | None, size: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradient of `batch_affine`: dmoments (2, N, C), and (2, C): of weight and of bias."""
    n, dtype = max(moments.shape[1], 1), accumulator(moments.dtype)
    given, moments = moments.dtype, moments.to(dtype)
    (dscale, dshift), (mu, var) = dboth.to(dtype), statistics
    d, r = moments[0] - mu, torch.rsqrt(var + eps)
    a = r if weight is None else r * weight.to(dtype)
    t, dbias = (dscale + dshift * d).sum(0), dshift.sum(0)
    dvar = -0.5 * r * r * a * t
    dmean = a * (dshift - dbias / n) + 2 / n * dvar * d
    dm2 = (dvar / (n * size)).expand_as(dmean)
    return torch.stack([dmean, dm2]).to(given), torch.stack([r * t, dbias])


__all__ = ["batch_affine", "batch_affine_bwd"]
