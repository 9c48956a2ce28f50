"""Channel pooling of several branches: one read of each, and their sum is never written.

    p[n, c]    = 1/S Σ_b Σ_s x_b[n, c, s]        of the sum over branches
    p[n, b, c] = 1/S Σ_s x_b[n, c, s]            of each branch

Squeeze of selective kernels (Li et al., arXiv:1903.06586, eq. 1–2) and of split attention (Zhang et al.,
arXiv:2004.08955, eq. 1); of each branch for PSA (Zhang et al., arXiv:2105.14447, §3). Backward: dx_b = dp/S.
"""

import torch
from torch import Tensor

from ..layout import accumulator
from ..registry import case, op
from . import branches, checks
from .channel_pool import spread


def _more(count: int, shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    return {f"x{i}": shape for i in range(1, count)}


def _check(
    x: Tensor, x1: Tensor | None, x2: Tensor | None, x3: Tensor | None, x4: Tensor | None, x5: Tensor | None,
    x6: Tensor | None, x7: Tensor | None, splits: int, each: bool,
) -> None:  # fmt: skip
    more = (x1, x2, x3, x4, x5, x6, x7)
    checks.number("splits", splits)
    if x1 is not None and splits != 1:
        raise ValueError(f"splits must be 1 where branches are given one by one; got {splits}")
    branches.check(x, more, len(branches.given(x, more)) if x1 is not None else splits, "splits")


def formula(
    x: Tensor, x1: Tensor | None, x2: Tensor | None, x3: Tensor | None, x4: Tensor | None, x5: Tensor | None,
    x6: Tensor | None, x7: Tensor | None, splits: int, each: bool,
) -> Tensor:  # fmt: skip
    """The equations above, in the accumulation dtype."""
    tensors = branches.given(x, (x1, x2, x3, x4, x5, x6, x7))
    maps = branches.split(tensors, max(len(tensors), splits))
    means = [t.flatten(2).mean(-1, dtype=accumulator(x.dtype)) for t in maps]
    return torch.stack(means, 1) if each else sum(means[1:], means[0])


def _save(args: tuple, p: Tensor) -> tuple[tuple[Tensor | None, ...], tuple]:
    x, more, splits, each = args[0], args[1:8], args[8], args[9]
    stride = torch.empty_like(x, device="meta").stride()
    return (), (x.shape, stride, x.dtype, len(branches.given(x, more)), splits, each)


def _backward(saved: tuple, consts: tuple, grads: tuple, needs: tuple) -> tuple[Tensor | None, ...]:
    (shape, stride, dtype, count, splits, each), dp = consts, grads[0]

    def back(d: Tensor) -> Tensor:
        dx = d.new_empty_strided(shape, stride, dtype=dtype)
        return dx.copy_(spread(d / branches.size(dx), dx))

    if count == 1:  # one map, with all branches inside
        d = dp if each else dp.unsqueeze(1).expand(-1, splits, -1)
        return (back(d.reshape(shape[:2])), *(None,) * 7)
    if each:
        found = [back(dp[:, b]) if need else None for b, need in enumerate(needs[:count])]
    else:
        found = [back(dp)] * count
    return (*found, *(None,) * (8 - count))


@op(
    formula=formula,
    check=_check,
    save=_save,
    backward=_backward,
    maps=("x", "x1", "x2", "x3", "x4", "x5", "x6", "x7"),
    budget=lambda x, x1, x2, x3, x4, x5, x6, x7, splits, each: (
        len(branches.given(x, (x1, x2, x3, x4, x5, x6, x7))),
        0,
    ),
    reduces=lambda x, *rest: branches.size(x),
    cases=[
        case("bench", x=(8, 256, 28, 28), **_more(2, (8, 256, 28, 28))),
        case("bench", x=(8, 512, 28, 28), splits=2),
        case(x=(2, 3, 7, 7), **_more(2, (2, 3, 7, 7))),
        case(x=(2, 17, 13), **_more(3, (2, 17, 13))),
        case(x=(1, 5, 3, 4, 5), **_more(4, (1, 5, 3, 4, 5)), each=True),
        case(x=(2, 3, 5, 3), **_more(8, (2, 3, 5, 3))),
        case(x=(2, 34, 5, 7), splits=2),
        case(x=(2, 12, 9, 5), splits=4, each=True),
        case(x=(2, 6, 1, 1), splits=2),
        case(x=(3, 31, 4, 4)),
        case(x=(0, 4, 5, 5), **_more(2, (0, 4, 5, 5))),
    ],
)
def branch_pool(
    x: Tensor, x1: Tensor | None = None, x2: Tensor | None = None, x3: Tensor | None = None, x4: Tensor | None = None,
    x5: Tensor | None = None, x6: Tensor | None = None, x7: Tensor | None = None, splits: int = 1, each: bool = False,
) -> Tensor:  # fmt: skip
    """Averages up to eight branches over their spatial dimensions, each read once.

    x: (N, C, *S) the first branch; or (N, splits·C, *S), all of them along the channels
    x1 … x7: (N, C, *S) the other branches, of x's shape and dtype, or None
    splits: how many branches x holds; 1 where they are tensors of their own
    each: the mean of each branch, not of their sum

    Returns the descriptor: (N, C), or (N, B, C) for `each`; float32 for half-precision x, else x's dtype.
    Raises ValueError or TypeError, naming the argument, for a wrong shape, dtype, device or number of branches.
    """
    return formula(x, x1, x2, x3, x4, x5, x6, x7, splits, each)


__all__ = ["branch_pool"]
