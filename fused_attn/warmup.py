"""Everything that a first call would wait for, done before: `warmup(model, x)`.

Loads the extension, and compiles the Triton kernels and whatever else the model compiles (torch.compile, cuDNN's choice
of algorithms) for inputs like these: without gradients, and where something needs a gradient, with them and backward.
"""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import backend, plan
from .explain import Explanation, not_fused, recording

__all__ = ["warmup"]


def warmup(model: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Explanation:
    """Runs a model forward, and backward where it needs gradients, so that the next call waits for nothing.

    model: a model, a module, or any callable, such as an op; in the mode, train() or eval(), that it is to run in
    inputs, kwargs: its arguments, of the shapes, dtypes and memory formats that it will get; numbers don't matter

    Backward runs where a parameter or an input requires a gradient, unless gradients are off, as under
    `torch.no_grad()`. Autocast and `use_backend` hold as in any call.

    Parameters, buffers, gradients, inputs and random states are left as they were. Forward and backward hooks of the
    model run; hooks that wait for accumulated gradients (DistributedDataParallel's, an optimizer's in backward) don't.
    With tqdm installed, a terminal shows how far it is.

    Returns what ran, as `explain` does: the forward without gradients first. Raises what the calls raise, and
    ValueError for backward of FullyShardedDataParallel, which wouldn't train on.
    """
    passes = [False]
    leaves = pytree.tree_leaves((inputs, kwargs))
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    needing = [t for t in (*parameters, *leaves) if isinstance(t, Tensor) and t.requires_grad]
    if needing and torch.is_grad_enabled() and not torch.is_inference_mode_enabled():
        passes.append(True)
        if isinstance(model, nn.Module) and any(map(_is_flat, model.modules())):
            raise ValueError(
                "warmup: FullyShardedDataParallel doesn't train on after torch.autograd.grad; warm up the model before "
                "it is wrapped, or under torch.no_grad()"
            )
    with (
        _as_it_was(model, leaves),
        _progress(model, len(passes)) as advance,
        backend.observe(advance),
        recording(model) as lines,
    ):
        for gradients in passes:
            _run(model, inputs, kwargs, parameters if gradients else None)
    return Explanation(lines + not_fused(model))


def _is_flat(module: nn.Module) -> bool:
    """Whether this is FSDP of the first generation: only its hooks on accumulated gradients put its state back."""
    where = "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel"
    return any(plan.path(cls) == where for cls in type(module).__mro__)


def _run(model: Callable[..., Any], inputs: Any, kwargs: Any, parameters: list[nn.Parameter] | None) -> None:
    """One forward, and where the parameters are given, one backward, on copies of the inputs."""
    leaves: list[Tensor] = []

    def copy(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        leaf = value.detach().clone()
        if value.requires_grad:
            leaves.append(leaf.requires_grad_())
        return leaf

    with torch.set_grad_enabled(parameters is not None):
        args, named = pytree.tree_map(copy, (inputs, kwargs))
        outputs = pytree.tree_leaves(model(*args, **named))
        if parameters is None:
            return
        wanted = [p for p in parameters if p.requires_grad] + leaves
        ends = [y for y in outputs if isinstance(y, Tensor) and y.requires_grad]
        if ends:
            torch.autograd.grad(ends, wanted, [torch.zeros_like(y) for y in ends], allow_unused=True)


@contextmanager
def _as_it_was(model: Any, leaves: list[Any]) -> Iterator[None]:
    """Puts buffers and random states back."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    kept = [(vars(m)["_buffers"], dict(vars(m)["_buffers"])) for m in modules]
    values = [(b, b.detach().clone()) for _, old in kept for b in old.values() if b is not None]
    tensors = [
        t for t in (*leaves, *(p for m in modules for p in m.parameters(recurse=False))) if isinstance(t, Tensor)
    ]
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy and numpy.random.get_state()
    with torch.random.fork_rng(sorted({t.get_device() for t in tensors if t.is_cuda})):
        try:
            yield
        finally:
            random.setstate(states[0])
            if numpy:
                numpy.random.set_state(states[1])
            for buffers, old in kept:
                buffers.clear()
                buffers.update(old)
            for buffer, value in values:
                buffer.data.copy_(value)  # not counted as a write: a graph that is still to run backward may hold it


@contextmanager
def _progress(model: Any, passes: int) -> Iterator[Callable[[backend.Choice], None]]:
    """What to call after each op: it moves a line on stderr, where tqdm is installed and stderr is a terminal."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda choice: None
        return
    # A fused module is one op forward and one backward; a parent's gate is within the parent's.
    planned = [m for m in model.modules() if isinstance(m, plan.Planned)] if isinstance(model, nn.Module) else []
    inside = {id(child) for m in planned for child in m.modules() if child is not m}
    count = sum(id(m) not in inside for m in planned)
    with ExitStack() as stack:
        bar = stack.enter_context(
            tqdm(desc="fused_attn warmup", total=count * (2 * passes - 1), unit="op", file=sys.stderr, disable=None)
        )

        def advance(choice: backend.Choice) -> None:
            bar.set_postfix_str(f"{choice.op} {'×'.join(map(str, choice.shape))} on {choice.backend}", refresh=False)
            bar.update()

        yield advance
