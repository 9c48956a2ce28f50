"""A BatchNorm that a fused module computes by itself: read off its child, and its running statistics kept."""

from typing import Any

import torch
import torch.nn.functional as F
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


def uses_batch(norm: dict[str, Any]) -> bool:
    """Whether a BatchNorm, by its attributes, normalises by the statistics of the batch."""
    buffers = norm["_buffers"]
    return norm["training"] or (buffers["running_mean"] is None and buffers["running_var"] is None)


def affine(norm: dict[str, Any], place: str = "_parameters") -> tuple[Tensor | None, Tensor | None]:
    """weight and bias. FSDP's flat parameters and DataParallel's replicas hold them as plain attributes."""
    where = norm[place] if "weight" in norm[place] else norm
    return where["weight"], where["bias"]


def state(norm: dict[str, Any]) -> tuple[Tensor | None, ...]:
    """weight, bias, and the running mean and variance where those are used."""
    buffers = norm["_buffers"]
    running = (None, None) if uses_batch(norm) else (buffers["running_mean"], buffers["running_var"])
    return *affine(norm), *running


def norm_state(norm: dict[str, Any] | None) -> tuple[str, tuple[Tensor | None, ...], float]:
    """Which statistics a BatchNorm uses, its weight, bias, mean and variance as `shared_mlp` takes them, and eps."""
    if norm is None:
        return "none", (None,) * 4, 1e-5
    return "batch" if uses_batch(norm) else "running", state(norm), norm["eps"]


def normalise(
    z: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor | None, var: Tensor | None, eps: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """BatchNorm of z (N, C, *S), in z's dtype; and its batch statistics (2, C), of which the second is the biased
    variance, where it used them."""
    to = lambda t: None if t is None else t.to(z.dtype)
    if mean is not None:
        if not torch.compiler.is_compiling():
            return F.batch_norm(z, to(mean), to(var), to(weight), to(bias), False, 0.0, eps), ()
        # A compiler takes the derivative by all that an excite is given, and torch's has none by the statistics.
        over: Any = lambda t: t.to(z.dtype).reshape(-1, *(1,) * (z.dim() - 2))
        scale = torch.rsqrt(over(var) + eps) * (1 if weight is None else over(weight))
        return (z - over(mean)) * scale + (0 if bias is None else over(bias)), ()
    out = F.batch_norm(z, None, None, to(weight), to(bias), True, 0.0, eps)
    with torch.no_grad():
        dims = [d for d in range(z.dim()) if d != 1]
        return out, (torch.stack(torch.var_mean(z, dims, correction=0)[::-1]),)


@torch.no_grad()
def keep(norm: dict[str, Any], statistics: Tensor, n: int) -> None:
    """Updates running statistics as BatchNorm does, by the mean and biased variance (2, H) of n values."""
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
    if n > 0:  # else there is nothing to remember, but the batch counts
        batch = statistics.detach().to(mean.dtype)
        mean.mul_(1 - momentum).add_(batch[0] * momentum)
        var.mul_(1 - momentum).add_(batch[1] * (momentum * (n / (n - 1))))
    if not torch.compiler.is_compiling() and torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        # A checkpoint that recomputes stops at the last tensor that was saved. BatchNorm saves after it has updated.
        with torch.enable_grad():
            torch.zeros((), device=mean.device, requires_grad=True).exp()
