"""Scaling by a map of logits, element by element: y = (1 + f(z))·x, f with or without a norm of z.

    norm="none"       f = σ(z)
    norm="channels"   f = ẑ,     ẑ[n, c, s] = z[n, c, s] / max(r[n, s], eps),            r² = Σ_c z²
    norm="positions"  f = σ(ẑ),  ẑ[n, c, s] = (z[n, c, s] − μ[n, c]) / √(v[n, c] + eps),   μ, v: mean, variance over s

The attention residual learning of Residual Attention Networks (Wang et al., arXiv:1704.06904, eq. 3) with their mixed,
channel and spatial attention (eq. 5, 6, 7). v divides by S − correction. Backward, with σ' = σ(1 − σ):

    none        dx = dy·(1 + σ(z))    dz = dy·x·σ'
    channels    dx = dy·(1 + ẑ)       dz = (e − ẑ·Σ_c e·ẑ) / r,  e = dy·x           where r < eps: e / eps
    positions   dx = dy·(1 + σ(ẑ))    dz = (e − Σ_s e / S − ẑ·Σ_s e·ẑ / (S − correction)) / √(v + eps),  e = dy·x·σ'
"""

import torch
from torch import Tensor

from ..layout import accumulator, like, match
from ..registry import case, op
from . import checks
from .channel_pool import spread

NORMS = ("none", "channels", "positions")


def _check(x: Tensor, z: Tensor, norm: str, eps: float, correction: float) -> None:
    checks.feature_map("x", x)
    checks.like("z", z, "x", x)
    checks.one_of("norm", norm, NORMS)
    checks.number("eps", eps)
    checks.number("correction", correction)


def statistics(z: Tensor, norm: str, eps: float, correction: float) -> Tensor:
    """What backward keeps beside the maps: r as (1, N, S), or μ and 1/√(v + eps) as (2, N, C), or nothing; z in the
    accumulation dtype."""
    flat = z.flatten(2)
    if norm == "channels":
        return torch.linalg.vector_norm(flat, dim=1).unsqueeze(0)
    if norm == "positions":
        mean = flat.mean(-1)
        centred = (flat - mean.unsqueeze(-1)).square().sum(-1)
        return torch.stack([mean, torch.rsqrt(centred / (flat.shape[-1] - correction) + eps)])
    return z.new_empty((0,))


def normed(z: Tensor, stats: Tensor, norm: str, eps: float) -> Tensor:
    """ẑ, or z itself where there is no norm."""
    if norm == "channels":
        return z / stats[0].view(z.shape[0], 1, *z.shape[2:]).clamp_min(eps)
    if norm == "positions":
        return (z - spread(stats[0], z)) * spread(stats[1], z)
    return z


def formula(x: Tensor, z: Tensor, norm: str, eps: float, correction: float) -> Tensor:
    """The equations above, in x's dtype, the arithmetic in the accumulation dtype."""
    wide = z.to(accumulator(z.dtype))
    v = normed(wide, statistics(wide, norm, eps, correction), norm, eps)
    return ((1 + (v if norm == "channels" else torch.sigmoid(v))) * x).to(x.dtype)


def _save(args: tuple, outs: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor | None, ...], tuple]:
    x, z, norm, eps, correction = args
    return (x, z, outs[1]), (norm, eps, correction)


def _backward(saved: tuple, consts: tuple, grads: tuple, needs: tuple) -> tuple[Tensor | None, ...]:
    x, z, stats = saved
    return map_scale_bwd(x, z, stats, match(grads[0], x), *consts)


def _budget(x: Tensor, z: Tensor, norm: str, eps: float, correction: float) -> tuple[int, int]:
    return 2 if norm == "none" else 3, 1


def _terms(x: Tensor, z: Tensor, norm: str, eps: float, correction: float) -> int:
    if norm == "none" or not x.numel():
        return 1
    return x.shape[1] if norm == "channels" else x[0, 0].numel()


@op(
    formula=formula,
    check=_check,
    save=_save,
    backward=_backward,
    public=lambda args, outs: outs[0],
    alone=lambda *args: True,
    maps=("x", "z"),
    budget=_budget,
    reduces=_terms,
    cases=[
        case("bench", x=(8, 512, 28, 28), z=(8, 512, 28, 28)),
        case("bench", x=(8, 512, 28, 28), z=(8, 512, 28, 28), norm="channels"),
        case("bench", x=(8, 512, 28, 28), z=(8, 512, 28, 28), norm="positions", eps=1e-5),
        case(x=(2, 3, 7, 7), z=(2, 3, 7, 7)),
        case(x=(2, 17, 13), z=(2, 17, 13), norm="channels"),
        case(x=(1, 5, 3, 4, 5), z=(1, 5, 3, 4, 5), norm="positions", eps=1e-5),
        case(x=(2, 48, 6, 6), z=(2, 48, 6, 6), norm="channels", eps=0.0),
        case(x=(2, 31, 5, 11), z=(2, 31, 5, 11), norm="positions", eps=1e-3, correction=1.0),
        case(x=(2, 4, 3, 5), z=(2, 4, 3, 5), norm="channels", eps=2.0),
        case(x=(2, 16, 1, 1), z=(2, 16, 1, 1), norm="channels"),
        case(x=(2, 16, 1, 1), z=(2, 16, 1, 1), norm="positions", eps=1e-5),
        case(x=(0, 4, 5, 5), z=(0, 4, 5, 5), norm="positions"),
        case(x=(0, 4, 5, 5), z=(0, 4, 5, 5), norm="channels"),
    ],
)
def map_scale(
    x: Tensor, z: Tensor, norm: str = "none", eps: float = 1e-12, correction: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Scales a feature map by one plus a function of another of the same shape, which may be normalised in the same op.

    x: (N, C, *S) feature map
    z: (N, C, *S) logits, of x's dtype
    norm: "none" (σ of z) | "channels" (z over its L2 norm over the channels of each position) | "positions" (σ of z
        standardised over the positions of each channel)
    eps: "channels": the least norm that is divided by, as in F.normalize; "positions": added to the variance
    correction: "positions": the variance divides by S − correction, as in torch.var; 0 is the biased one

    Returns y: (N, C, *S) in x's dtype and memory format.
    Raises ValueError or TypeError, naming the argument, for a wrong shape, dtype, device or option.
    """
    acc = accumulator(x.dtype)
    wide = z.to(acc)
    stats = statistics(wide, norm, eps, correction)
    v = normed(wide, stats, norm, eps)
    f = v if norm == "channels" else torch.sigmoid(v)
    return like(x, ((1 + f) * x.to(acc)).to(x.dtype)), stats


def _check_bwd(x: Tensor, z: Tensor, stats: Tensor, dy: Tensor, norm: str, eps: float, correction: float) -> None:
    _check(x, z, norm, eps, correction)
    checks.like("dy", dy, "x", x)
    if norm == "channels":
        checks.shaped("stats", stats, (1, x.shape[0], x.shape[2:].numel()), "(1, N, S)")
    elif norm == "positions":
        checks.shaped("stats", stats, (2, *x.shape[:2]), "(2, N, C)")


@op(
    check=_check_bwd,
    maps=("x", "z", "dy"),
    budget=lambda x, z, stats, dy, norm, eps, correction: (3 if norm == "none" else 6, 2),
)
def map_scale_bwd(
    x: Tensor, z: Tensor, stats: Tensor, dy: Tensor, norm: str, eps: float, correction: float
) -> tuple[Tensor, Tensor]:
    """Gradient of `map_scale`: dx, dz, from dy and what forward kept (stats)."""
    acc = accumulator(x.dtype)
    g, wide = dy.to(acc), z.to(acc)
    e = g * x.to(acc)
    v = normed(wide, stats, norm, eps)
    if norm == "channels":
        f = v
        r = stats[0].view(x.shape[0], 1, *x.shape[2:])
        dot = torch.where(r < eps, 0, (e * v).sum(1, keepdim=True))
        dz = (e - v * dot) / r.clamp_min(eps)
    else:
        f = torch.sigmoid(v)
        dz = e * f * (1 - f)
    if norm == "positions":
        size = x.shape[2:].numel()
        sums = dz.flatten(2).sum(-1) / size, (dz * v).flatten(2).sum(-1) / (size - correction)
        dz = (dz - spread(sums[0], x) - v * spread(sums[1], x)) * spread(stats[1], x)
    return like(x, (g * (1 + f)).to(x.dtype)), like(x, dz.to(x.dtype))


__all__ = ["map_scale", "map_scale_bwd"]
