"""The moments of every plane, in one read of x: what a BatchNorm, an average pool and a maximum pool all need.

    mean[n, c] = 1/S Σ_s x[n, c, s]        m2[n, c] = Σ_s (x[n, c, s] − mean[n, c])²
    largest[n, c] = max_s x[n, c, s]       smallest[n, c] = min_s x[n, c, s]        and where they first occur

Any affine image a·x + b of the planes has the mean a·mean + b and the maximum a·largest + b, or a·smallest + b where a
is negative; the batch's mean and variance are μ = mean_n mean[n, c] and, by Chan, Golub and LeVeque's formula,
(1/S Σ_n m2[n, c] + Σ_n (mean[n, c] − μ)²) / N. So one pass serves the normalisation and the pooling behind it.

The squares are of differences to the mean, as Welford's are: Σx² − S·mean² would cancel in float32.

Backward: dx = dmean/S + 2·(x − mean)·dm2, and each extremum's gradient at its place.
"""

import torch
from torch import Tensor

from ..layout import accumulator
from ..registry import case, op
from . import checks
from .moments_affine_apply import moments_affine_apply


def _check(x: Tensor, extrema: bool) -> None:
    checks.feature_map("x", x)


def _formula(x: Tensor, extrema: bool) -> Tensor | tuple[Tensor, Tensor]:
    flat = x.flatten(2)
    wide = flat.to(accumulator(x.dtype))
    # A sum of numbers far from zero loses digits that their differences to one of them keep.
    origin = torch.nan_to_num(wide.detach()[..., :1], 0.0, 0.0, 0.0)
    mean = (wide - origin).mean(-1, keepdim=True) + origin
    moments = [mean.squeeze(-1), (wide - mean).square().sum(-1)]
    if not extrema:
        return torch.stack(moments)
    ends = flat.max(-1), flat.min(-1)
    return torch.stack([*moments, *(e.values.to(wide.dtype) for e in ends)]), torch.stack([e.indices for e in ends])


def _save(args: tuple, outs: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor | None, ...], tuple]:
    return (args[0], *outs), (args[1],)


def _backward(saved: tuple, consts: tuple, grads: tuple, needs: tuple) -> tuple[Tensor | None, ...]:
    (x, moments, index), (extrema,), (dmean, dm2, *dvalues) = saved, consts, grads[0]
    size = x[0, 0].numel() if x.numel() else 1
    dx = moments_affine_apply(
        x, None, None, None, moments[0], None, None, 2 * dm2, dmean / size,
        torch.stack(dvalues) if extrema else None, index if extrema else None, "identity", 0.01,
    )  # fmt: skip
    return (dx,)


@op(
    formula=_formula,
    check=_check,
    save=_save,
    backward=_backward,
    public=lambda args, outs: (outs[0], outs[1]) if args[1] else outs[0],
    alone=lambda x, extrema: not extrema,
    budget=lambda x, extrema: (1, 0),
    reduces=lambda x, extrema: x[0, 0].numel() if x.numel() else 1,
    cases=[
        case("bench", x=(8, 256, 56, 56)),
        case("bench", x=(8, 512, 28, 28), extrema=True),
        case(x=(2, 3, 7, 7)),
        case(x=(2, 33, 14, 14), extrema=True),
        case(x=(2, 17, 13), extrema=True),
        case(x=(1, 5, 3, 4, 5)),
        case(x=(2, 4, 1, 1), extrema=True),
        case(x=(0, 4, 5, 5), extrema=True),
        case(x=(1, 2, 127, 9)),
    ],
)
def channel_moments(x: Tensor, extrema: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and squared deviations of every plane, and its extrema with their places, in one read of x.

    x: (N, C, *S) feature map, one or more spatial dimensions
    extrema: also return the maximum and the minimum; where several positions hold it, the first one gets its gradient

    Returns moments (2, N, C): mean, m2 = Σ (x − mean)². With extrema moments (4, N, C): mean, m2, largest, smallest;
        and index (2, N, C), int64, the first places of the last two in the flattened spatial dimensions. Float32 for
        half-precision x, else x's dtype.
    Raises ValueError or TypeError, naming the argument, for a wrong rank, dtype or an empty spatial dimension.
    """
    out = _formula(x, extrema)
    return out if isinstance(out, tuple) else (out, x.new_empty((0,), dtype=torch.int64))


__all__ = ["channel_moments"]
