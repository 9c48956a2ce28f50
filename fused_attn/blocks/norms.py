"""A BatchNorm that a fused module computes by itself: read off its child, and its running statistics kept."""

from typing import Any

import torch
from torch import Tensor, nn

from ..plan import Refused, path, vars_of

_IDENTITY = "torch.nn.modules.linear.Identity"
_NORMS = tuple(f"torch.nn.modules.batchnorm.BatchNorm{d}d" for d in (1, 2, 3))


def norm_of(name: str, child: nn.Module | None) -> dict[str, Any] | None:
    """The attributes of a BatchNorm, None where there is no norm. Raises Refused for any other."""
    if path(type(child)) == _IDENTITY:
        return None
    if path(type(child)) not in _NORMS:
        raise Refused(f"{name} is a {path(type(child))}, not a BatchNorm")
    return vars_of(child)


def norm_state(norm: dict[str, Any] | None) -> tuple[str, tuple[Tensor | None, ...], float]:
    """Which statistics a BatchNorm uses now, and its weight, bias, mean and variance as `shared_mlp` takes them."""
    if norm is None:
        return "none", (None,) * 4, 1e-5
    parameters, buffers = norm["_parameters"], norm["_buffers"]
    affine = parameters["weight"], parameters["bias"]
    mean, var = buffers["running_mean"], buffers["running_var"]
    if norm["training"] or (mean is None and var is None):
        return "batch", (*affine, None, None), norm["eps"]
    return "running", (*affine, mean, var), norm["eps"]


@torch.no_grad()
def keep(norm: dict[str, Any], statistics: Tensor, n: int) -> None:
    """Updates running statistics as BatchNorm does, by the mean and biased variance (2, H) of n descriptors."""
    buffers = norm["_buffers"]
    mean, var, count = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
    if not (norm["training"] and norm["track_running_stats"]) or mean is None:
        return
    momentum: Any = norm["momentum"]
    if count is not None:
        count.add_(1)
        if momentum is None:
            momentum = 1.0 / count.to(mean.dtype)
    if momentum is None:
        momentum = 0.0
    if n == 0:  # there is nothing to remember, but the batch counts
        return
    batch = statistics.detach().to(mean.dtype)
    mean.mul_(1 - momentum).add_(batch[0] * momentum)
    var.mul_(1 - momentum).add_(batch[1] * (momentum * (n / (n - 1))))
