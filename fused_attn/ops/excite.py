"""The excite between pool and apply, where it is any function of small tensors: run, and run again for its gradient.

    gate[, *statistics] = excite(*descriptors, *params)

No graph is kept between forward and backward: that would hold tensors that autograd doesn't know of. So excite must be
pure; what it has to remember (the batch statistics of a BatchNorm) it returns beside the gate.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks


def check(excite: Any, params: Sequence[Tensor]) -> None:
    """Raises TypeError for an excite that can't be called, or a parameter that is no tensor."""
    if not callable(excite):
        raise TypeError(f"excite must be callable; got {type(excite).__name__}")
    for i, p in enumerate(params):
        checks.tensor(f"params[{i}]", p)


def run(
    excite: Callable[..., Any],
    descriptors: Sequence[Tensor],
    params: Sequence[Tensor],
    shape: Sequence[int],
    what: str,
    recording: bool = True,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The gate, and the statistics beside it, without a graph.

    shape, what: the gate's, and how to write it in a complaint
    recording: whether gradients may be asked for; without, nobody misses a tensor that isn't in params
    Raises ValueError for a gate of another shape, or one that depends on a tensor which isn't in params.
    """
    if not recording or torch.compiler.is_compiling():
        gate, statistics = split(excite(*descriptors, *params))
        checks.shaped("excite's gate", gate, shape, what)
    else:
        with torch.enable_grad():
            gate, statistics = split(excite(*descriptors, *(q.detach() for q in params)))
        complete(gate, shape, what)
    return gate, statistics


def complete(gate: Tensor, shape: Sequence[int], what: str) -> None:
    """Raises ValueError for a gate of another shape, or one that depends on a tensor which isn't in params."""
    if gate.requires_grad:
        raise ValueError("excite must get tensors that need a gradient through params; it closes over one")
    checks.shaped("excite's gate", gate, shape, what)


def gradient(
    excite: Callable[..., Any],
    descriptors: Sequence[Tensor],
    params: Sequence[Tensor],
    dgate: Tensor,
    needs: Sequence[bool],
) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """The gradients of the descriptors, and of the params that `needs` marks.

    In eager, plain autograd over a second run costs half of what `torch.func.vjp` does; compilers take only the latter.
    """
    count = len(descriptors)
    if torch.compiler.is_compiling():
        back = torch.func.vjp(lambda *inputs: split(excite(*inputs))[0], *descriptors, *params)[1](dgate)
        return back[:count], back[count:]
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in descriptors]
        weights = [t.detach().requires_grad_(need) for t, need in zip(params, needs, strict=True)]
        gate, _ = split(excite(*leaves, *weights))
    wanted = leaves + [t for t in weights if t.requires_grad]
    if not gate.requires_grad:
        found = iter([torch.zeros_like(t) for t in wanted])
    else:
        found = iter(torch.autograd.grad(gate, wanted, dgate.to(gate.dtype), allow_unused=True, materialize_grads=True))
    dpooled = tuple(next(found) for _ in leaves)
    return dpooled, tuple(next(found) if t.requires_grad else None for t in weights)


def split(out: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The gate, and what comes beside it."""
    return (out[0], tuple(t.detach() for t in out[1:])) if isinstance(out, tuple) else (out, ())
