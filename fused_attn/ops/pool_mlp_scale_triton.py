"""Squeeze-and-excitation out of the other ops' Triton launches: pool (1R), two small ones, scale (1R 1W).

Backward is `compose_bwd`. One launch for all would need a sample on chip, or a barrier over the grid: Triton has none.
"""

import torch
from torch import Tensor

from ..layout import accumulator
from .channel_pool_triton import pool_into
from .pool_mlp_scale import compose_bwd, keeps_max
from .pool_scale_triton import pool_scale_apply, pool_scale_reduce
from .scale_triton import scale
from .shared_mlp import Mlp
from .shared_mlp_triton import mlp_into, saved_size, shared_mlp_bwd


def pool_mlp_scale(x: Tensor, *args: object) -> tuple[Tensor, Tensor, Tensor]:
    mlp, residual = Mlp(*args[:10], *args[11:16]), args[10]  # type: ignore[arg-type]
    max_weight, ties, epilogue, slope = args[16:]
    n, c = x.shape[:2]
    keep, first = keeps_max(max_weight, ties), max_weight != 0 and ties == "first"  # type: ignore[arg-type]
    gate = torch.empty(n, c, dtype=accumulator(x.dtype), device=x.device)
    saved = gate.new_empty(n * c * (1 + keep) + saved_size(mlp, 1, n))
    p, maxima, state = saved.split([n * c, n * c * keep, saved.numel() - n * c * (1 + keep)])
    index = torch.empty((n, c) if first else 0, dtype=torch.int64, device=x.device)
    if max_weight == 0:
        pool_into(x, p, None, None)
    else:
        largest = maxima if keep else torch.empty_like(p)
        pool_into(x, p if max_weight != 1 else None, largest, index if first else None)
        if max_weight == 1:
            p.copy_(largest)
        else:
            p.mul_(1 - max_weight).add_(largest, alpha=max_weight)  # type: ignore[operator]
    mlp_into(p.view(1, n, c), mlp, gate, state)
    return scale(x, gate, residual, None, epilogue, slope, "product"), saved, index  # type: ignore[arg-type]


def pool_mlp_scale_bwd(
    x: Tensor, dy: Tensor, aux: Tensor | None, saved: Tensor, index: Tensor, *args: object
) -> tuple[Tensor, ...]:
    max_weight, ties, epilogue, slope, residual = args[15:]
    return compose_bwd(
        x, dy, aux, saved, index, Mlp(*args[:15]),  # type: ignore[arg-type]
        max_weight, ties, epilogue, slope, residual,  # type: ignore[arg-type]
        pool_scale_reduce, shared_mlp_bwd, pool_scale_apply,
    )  # fmt: skip
