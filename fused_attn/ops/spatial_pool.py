"""Pooling over channels: a feature map to planes, one read of x.

    u[n, c, s] = x[n, c, s] · gate[n, c]        (or x itself)

    mean      q[n, 0, s] = 1/C Σ_c u[n, c, s]
    max       q[n, 0, s] = max_c u[n, c, s]
    mean_max  both, in this order

The input of CBAM's spatial gate (Woo et al., arXiv:1807.06521, eq. 3): u is the output of the channel gate, which is
never a feature map of its own. Backward, h = dmean/C + dmax at the maxima: dx = gate·h, dgate = Σ_s x·h.
"""

import torch
from torch import Tensor

from ..layout import accumulator, like
from ..registry import case, op
from . import checks
from .channel_pool import TIES, has_max, spread
from .scale import over

POOLS = ("mean", "max", "mean_max")


def planes_of(pool: str) -> int:
    """P, the number of planes."""
    return 2 if pool == "mean_max" else 1


def gated(x: Tensor, gate: Tensor | None, affine: Tensor | None = None) -> Tensor:
    """u, in the accumulation dtype; with affine (2, N, C), centre and shift, gate·(x − centre) + shift."""
    acc = accumulator(x.dtype)
    if affine is not None:
        centre, shift = affine.to(acc)
        x = x.to(acc) - spread(centre, x)
        assert gate is not None
        return x * spread(gate.to(acc), x) + spread(shift, x)
    return x.to(acc) if gate is None else x.to(acc) * spread(gate.to(acc), x)


def pooled(u: Tensor, pool: str, ties: str) -> tuple[Tensor, Tensor | None]:
    """The equations, differentiable: planes (N, P, *S), and the first channel of each maximum where ties ask for it."""
    index = None
    parts = [u.mean(1)] if pool != "max" else []
    if has_max(pool):
        if ties == "first":
            largest, index = u.max(1)
        else:
            largest = u.amax(1)
        parts.append(largest)
    return torch.stack(parts, 1), index


def plane_gradient(u: Tensor, dplanes: Tensor, planes: Tensor, index: Tensor, pool: str, ties: str) -> Tensor:
    """h = d pool / du · dplanes, broadcast against u, in u's dtype."""
    h = None
    if pool != "max":
        h = dplanes[:, :1] / u.shape[1]
    if has_max(pool):
        dmax, largest = dplanes[:, -1:], planes[:, -1:]
        if ties == "first":
            at = torch.zeros_like(u).scatter(1, over(index), dmax)
        else:
            where = (u == largest).to(u.dtype)
            at = where * (dmax / where.sum(1, keepdim=True))
        h = at if h is None else h + at
    assert h is not None
    return h


def check_planes(name: str, value: Tensor, x: Tensor, pool: str) -> None:
    """Planes of this pooling of x."""
    checks.shaped(name, value, (x.shape[0], planes_of(pool), *x.shape[2:]), "(N, P, *S)")


def check_places(index: Tensor, x: Tensor) -> None:
    """The channel of each pixel's maximum."""
    checks.index("index", index, (x.shape[0], *x.shape[2:]), "(N, *S)")


def _check(x: Tensor, gate: Tensor | None, pool: str, ties: str, return_index: bool) -> None:
    checks.feature_map("x", x)
    checks.shaped("gate", gate, x.shape[:2], "(N, C)")
    checks.same_device("x", x, gate=gate)
    checks.one_of("pool", pool, POOLS)
    checks.one_of("ties", ties, TIES)
    if return_index and not has_max(pool):
        raise ValueError(f"return_index needs a pool with a maximum, 'max' or 'mean_max'; got pool={pool!r}")


def _formula(
    x: Tensor, gate: Tensor | None, pool: str, ties: str, return_index: bool
) -> Tensor | tuple[Tensor, Tensor]:
    planes, index = pooled(gated(x, gate), pool, ties)
    if not return_index:
        return planes
    if index is None:
        index = gated(x, gate).max(1).indices
    return planes, index


def _save(args: tuple, outs: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor | None, ...], tuple]:
    x, gate, pool, ties, _ = args
    return (x, gate, outs[0], outs[1]), (pool, ties)


def _backward(saved: tuple, consts: tuple, grads: tuple, needs: tuple) -> tuple[Tensor | None, ...]:
    x, gate, planes, index = saved
    dx, dgate = spatial_pool_bwd(x, gate, grads[0], planes, index, *consts)
    return dx, None if gate is None else dgate


@op(
    formula=_formula,
    check=_check,
    save=_save,
    backward=_backward,
    public=lambda args, outs: (outs[0], outs[1]) if args[4] else outs[0],
    alone=lambda x, gate, pool, ties, return_index: not return_index,
    budget=lambda *args: (1, 0),
    reduces=lambda x, *rest: max(x.shape[1], x[0, 0].numel() if x.numel() else 1),
    cases=[
        case("bench", x=(8, 512, 28, 28), gate=(8, 512)),
        case("bench", x=(8, 512, 28, 28), gate=(8, 512), ties="first"),
        case(x=(2, 3, 7, 7)),
        case(x=(2, 64, 9, 9), gate=(2, 64)),
        case(x=(2, 17, 13), gate=(2, 17), pool="max"),
        case(x=(1, 6, 3, 4, 5), pool="mean"),
        case(x=(2, 9, 6, 4), gate=(2, 9), pool="mean"),
        case(x=(3, 31, 5, 1), gate=(3, 31), ties="first"),
        case(x=(2, 33, 7, 7), gate=(2, 33), ties="first", return_index=True),
        case(x=(2, 7, 8, 8), pool="max", return_index=True),
        case(x=(2, 5, 5, 5), pool="max", ties="first"),
        case(x=(2, 40, 1, 1), gate=(2, 40)),
        case(x=(2, 1, 5, 5), gate=(2, 1)),
        case(x=(0, 4, 5, 5), gate=(0, 4)),
    ],
)
def spatial_pool(
    x: Tensor, gate: Tensor | None = None, pool: str = "mean_max", ties: str = "split", return_index: bool = False
) -> tuple[Tensor, Tensor]:
    """Pools a feature map over its channels, at every pixel, in one read of x.

    x: (N, C, *S) feature map, one or more spatial dimensions
    gate: (N, C) factors of the channels before they are pooled, or None
    pool: "mean" | "max" | "mean_max"
    ties: where several channels hold the maximum, its gradient is divided evenly ("split": `torch.amax`, timm) or
        goes to the first ("first": `torch.max(dim)`, the authors of CBAM, pytorchcv)
    return_index: also return the first channel (N, *S), int64, of each maximum

    Returns planes (N, P, *S): the mean, the maximum, or both in this order; float32 for half-precision x, else x's
    dtype.
    Raises ValueError or TypeError, naming the argument, for a wrong rank, dtype, option or an empty spatial dimension.
    """
    u = gated(x, gate)
    planes, _ = pooled(u, pool, "split")
    index = None
    if has_max(pool) and (ties == "first" or return_index):
        index = u.max(1).indices
    return planes, x.new_empty((0,), dtype=torch.int64) if index is None else index.contiguous()


def _check_bwd(
    x: Tensor, gate: Tensor | None, dplanes: Tensor, planes: Tensor, index: Tensor, pool: str, ties: str
) -> None:
    _check(x, gate, pool, ties, False)
    check_planes("dplanes", dplanes, x, pool)
    if has_max(pool) and ties == "first":
        check_places(index, x)


def _bwd_budget(
    x: Tensor, gate: Tensor | None, dplanes: Tensor, planes: Tensor, index: Tensor, pool: str, ties: str
) -> tuple[int, int]:
    count = has_max(pool) and ties == "split"
    return 2 * count if gate is None else 1 + count, 1


@op(check=_check_bwd, budget=_bwd_budget)
def spatial_pool_bwd(
    x: Tensor, gate: Tensor | None, dplanes: Tensor, planes: Tensor, index: Tensor, pool: str, ties: str
) -> tuple[Tensor, Tensor]:
    """Gradient of `spatial_pool`: dx in x's dtype and layout, and dgate (empty without a gate)."""
    u = gated(x, gate)
    h = plane_gradient(u, dplanes.to(u.dtype), planes, index, pool, ties).expand(x.shape)
    if gate is None:
        return like(x, h.to(x.dtype)), x.new_empty((0,))
    dgate = (x.to(h.dtype) * h).flatten(2).sum(-1)
    return like(x, (h * spread(gate.to(h.dtype), x)).to(x.dtype)), dgate.to(gate.dtype)
