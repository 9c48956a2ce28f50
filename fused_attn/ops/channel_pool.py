"""Channel pooling: a feature map to a descriptor, one read of x.

    mean      p[n, c] = 1/S Σ_s x[n, c, s]
    max       p[n, c] = max_s x[n, c, s]
    mean_max  both, stacked: (2, N, C)
    mean_abs  p[n, c] = 1/S Σ_s |x[n, c, s]|
    mean_var  the mean m, and v[n, c] = 1/S Σ_s (x[n, c, s] − m[n, c])², stacked: (2, N, C)

Squeeze of SE (Hu et al., arXiv:1709.01507, eq. 2), channel gate of CBAM (Woo et al., arXiv:1807.06521, eq. 2),
thresholds of DRSN (Zhao et al., 2020, §III-B), plane statistics of an instance norm. Backward: dx = dp/S, dp at the
maxima, sign(x)·dp/S, dm/S + 2·(x − m)·dv/S.
"""

import torch
from torch import Tensor

from ..layout import accumulator, like
from ..registry import case, op
from . import checks

POOLS = ("mean", "max", "mean_max", "mean_abs", "mean_var")
TIES = ("split", "first")


def has_max(pool: str) -> bool:
    """Whether this pooling needs the maximum."""
    return pool in ("max", "mean_max")


def is_pair(pool: str) -> bool:
    """Whether there are two descriptors, stacked."""
    return pool in ("mean_max", "mean_var")


def spread(v: Tensor, x: Tensor) -> Tensor:
    """(N, C) seen beside x: (N, C, 1, …)."""
    return v.reshape(v.shape + (1,) * (x.dim() - 2))


def pooled(x: Tensor, pool: str, ties: str) -> tuple[Tensor, Tensor | None]:
    """The equations, differentiable: the descriptor in the accumulation dtype, and the argmax where ties ask for it."""
    acc, flat = accumulator(x.dtype), x.flatten(2)
    index = None
    if has_max(pool):
        if ties == "first":
            largest, index = flat.max(-1)
        else:
            largest = flat.amax(-1)
        largest = largest.to(acc)
    if pool == "mean":
        return flat.mean(-1, dtype=acc), None
    if pool == "mean_var":
        return torch.stack([flat.mean(-1, dtype=acc), flat.to(acc).var(-1, correction=0)]), None
    if pool == "mean_abs":
        return flat.abs().mean(-1, dtype=acc), None
    return (largest, index) if pool == "max" else (torch.stack([flat.mean(-1, dtype=acc), largest]), index)


def pool_gradient(x: Tensor, dpooled: Tensor, values: Tensor, index: Tensor, pool: str, ties: str) -> Tensor:
    """d pool / dx · dpooled, broadcast against x, in dpooled's dtype. `values`: what was pooled, for the maximum's
    place."""
    size = x[0, 0].numel() if x.numel() else 1
    dmean, dmax = (dpooled[0], dpooled[1]) if is_pair(pool) else (dpooled, dpooled)
    out = None
    if pool in ("mean", "mean_max", "mean_var"):
        out = spread(dmean / size, x)
    if pool == "mean_var":
        return out + (x.to(dpooled.dtype) - spread(values[0], x)) * spread(2 * dmax / size, x)  # type: ignore[operator]
    if pool == "mean_abs":
        out = torch.sign(x).to(dpooled.dtype) * spread(dmean / size, x)
    if has_max(pool):
        if ties == "first":
            at = torch.zeros(x.shape, dtype=dpooled.dtype, device=x.device).flatten(2)
            at = at.scatter(-1, index.unsqueeze(-1), dmax.unsqueeze(-1)).view(x.shape)
        else:
            largest = values[1] if pool == "mean_max" else values
            where = (x.to(dpooled.dtype) == spread(largest, x)).to(dpooled.dtype)
            at = where * spread(dmax / where.flatten(2).sum(-1), x)
        out = at if out is None else out + at
    assert out is not None
    return out


def _check(x: Tensor, pool: str, ties: str, return_index: bool) -> None:
    checks.feature_map("x", x)
    checks.one_of("pool", pool, POOLS)
    checks.one_of("ties", ties, TIES)
    if return_index and not has_max(pool):
        raise ValueError(f"return_index needs a pool with a maximum, 'max' or 'mean_max'; got pool={pool!r}")


def _formula(x: Tensor, pool: str, ties: str, return_index: bool) -> Tensor | tuple[Tensor, Tensor]:
    value, index = pooled(x, pool, "first" if return_index else ties)
    if not return_index:
        return value
    assert index is not None
    # The index is the first maximum's whatever the rule for ties; the value's gradient follows the rule.
    return pooled(x, pool, ties)[0], index


def _save(args: tuple, outs: tuple[Tensor, Tensor]) -> tuple[tuple[Tensor | None, ...], tuple]:
    x, pool, ties, _ = args
    # The mean's gradient needs no value of x: keep an empty stand-in, and x's memory is free to go.
    kept = x if pool != "mean" else None
    like_x = torch.empty_like(x, device="meta")
    return (kept, outs[0], outs[1]), (pool, ties, x.shape, like_x.stride(), x.dtype)


def _backward(saved: tuple, consts: tuple, grads: tuple, needs: tuple) -> tuple[Tensor | None, ...]:
    x, values, index = saved
    pool, ties, shape, stride, dtype = consts
    dpooled = grads[0]
    if x is None:
        dx = dpooled.new_empty_strided(shape, stride, dtype=dtype)
        size = dx[0, 0].numel() if dx.numel() else 1
        return (dx.copy_(spread(dpooled / size, dx)),)
    return (channel_pool_bwd(x, dpooled, values, index, pool, ties),)


def _budget(x: Tensor, *rest: object) -> tuple[int, int]:
    return 1, 0


@op(
    formula=_formula,
    check=_check,
    save=_save,
    backward=_backward,
    public=lambda args, outs: (outs[0], outs[1]) if args[3] else outs[0],
    alone=lambda x, pool, ties, return_index: not return_index,
    budget=_budget,
    reduces=lambda x, *rest: x[0, 0].numel() if x.numel() else 1,
    cases=[
        case("bench", x=(8, 256, 56, 56)),
        case("bench", x=(8, 512, 28, 28), pool="mean_max"),
        case(x=(2, 3, 7, 7)),
        case(x=(2, 64, 14, 14), pool="max"),
        case(x=(2, 17, 13), pool="mean_max"),
        case(x=(1, 5, 3, 4, 5), pool="mean_abs"),
        case(x=(3, 31, 5, 1), pool="max", ties="first"),
        case(x=(2, 33, 7, 7), pool="mean_max", ties="first", return_index=True),
        case(x=(2, 4, 1, 1), pool="mean_max"),
        case(x=(0, 4, 5, 5), pool="mean_max"),
        case(x=(1, 2, 127, 9), pool="mean_abs"),
        case("bench", x=(8, 512, 28, 28), pool="mean_var"),
        case(x=(2, 33, 14, 14), pool="mean_var"),
        case(x=(1, 5, 3, 4, 5), pool="mean_var"),
        case(x=(2, 4, 1, 1), pool="mean_var"),
    ],
)
def channel_pool(
    x: Tensor, pool: str = "mean", ties: str = "split", return_index: bool = False
) -> tuple[Tensor, Tensor]:
    """Pools every channel of a feature map over its spatial dimensions, in one read of x.

    x: (N, C, *S) feature map, one or more spatial dimensions
    pool: "mean" | "max" | "mean_max" | "mean_abs" | "mean_var"; "mean_max" and "mean_var" give two, which unpack:
        `mean, largest = channel_pool(x, "mean_max")`. The variance is that of S values, not S − 1
    ties: where several positions hold the maximum, its gradient is divided evenly ("split": `torch.amax`, timm) or
        goes to the first ("first": `torch.max(dim)`, adaptive max pooling, the authors of CBAM, pytorchcv)
    return_index: also return the position (N, C), int64, of the first maximum in the flattened spatial dimensions

    Returns the descriptor: (N, C), or (2, N, C) for "mean_max" and "mean_var"; float32 for half-precision x, else x's
        dtype.
    Raises ValueError or TypeError, naming the argument, for a wrong rank, dtype, option or an empty spatial dimension.
    """
    value, _ = pooled(x, pool, "split")
    index = None
    if has_max(pool) and (ties == "first" or return_index):
        index = x.flatten(2).max(-1).indices
    return value, x.new_empty((0,), dtype=torch.int64) if index is None else index


def _check_bwd(x: Tensor, dpooled: Tensor, values: Tensor, index: Tensor, pool: str, ties: str) -> None:
    _check(x, pool, ties, False)
    shape = (2, *x.shape[:2]) if is_pair(pool) else x.shape[:2]
    checks.shaped("dpooled", dpooled, shape, "(2, N, C)" if is_pair(pool) else "(N, C)")
    if has_max(pool) and ties == "first":
        checks.index("index", index, x.shape[:2], "(N, C)")


def _bwd_budget(x: Tensor, dpooled: Tensor, values: Tensor, index: Tensor, pool: str, ties: str) -> tuple[int, int]:
    if pool == "mean":
        return 0, 1
    return (2 if has_max(pool) and ties == "split" else 0 if has_max(pool) else 1), 1


@op(check=_check_bwd, budget=_bwd_budget)
def channel_pool_bwd(x: Tensor, dpooled: Tensor, values: Tensor, index: Tensor, pool: str, ties: str) -> Tensor:
    """Gradient of `channel_pool`: dx in x's dtype and layout, from dpooled and what forward returned (values,
    index)."""
    dpooled = dpooled.to(accumulator(x.dtype))
    return like(x, pool_gradient(x, dpooled, values, index, pool, ties).expand(x.shape).to(x.dtype))


__all__ = ["channel_pool", "channel_pool_bwd"]
