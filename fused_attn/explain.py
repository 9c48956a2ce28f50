"""What ran, and why: `explain(model, x)` runs a model, a module or an op once and tells the backend of every op call.

For each fused module: its ops, each with the backend that ran it, why, and what it ran on; or why it ran unfused.
For each module that `fuse_` would know but that isn't fused: why not.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from . import backend, plan
from .blocks.chain import Joining
from .convert import recognised, refusal, table

__all__ = ["Explanation", "Line", "explain"]


@dataclass(frozen=True)
class Line:
    """One op call; or one module that ran unfused, then op is "" and backend "unfused"."""

    module: str
    op: str
    backend: str
    reason: str
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None


@dataclass
class Explanation:
    """`print` it for a table. lines: in the order of the run, then the modules that aren't fused."""

    lines: list[Line] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.lines:
            return "no op of fused_attn ran, and no module of a class that it knows was found"
        counts: dict[tuple[str, ...], list[str]] = {}
        for line in self.lines:
            on = "×".join(map(str, line.shape)) + f" {str(line.dtype).removeprefix('torch.')}" if line.shape else ""
            key: tuple[str, ...] = (line.op, line.backend, on, line.reason)
            counts.setdefault(key, []).append(line.module)
        cells: list[tuple[str, ...]] = [("module", "op", "backend", "on", "why")]
        for key, modules in counts.items():
            first = modules[0] or "(model)"
            cells.append((first if len(modules) == 1 else f"{first} … ({len(modules)})", *key))
        return "\n".join(table(cells))

    def __repr__(self) -> str:
        ran = sum(1 for line in self.lines if line.op)
        return f"<Explanation: {ran} op calls, {len(self.lines) - ran} modules unfused>"


def explain(module_or_model: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Explanation:
    """Runs a callable once on the inputs, and tells what ran and why.

    module_or_model: a model, a module, or any callable, such as an op
    inputs, kwargs: its arguments. Buffers of a model in training mode are put back afterwards

    Returns an Explanation to print. Raises what the call raises.
    """
    kept = []
    if isinstance(module_or_model, nn.Module):
        kept = [(buffer, buffer.detach().clone()) for buffer in module_or_model.buffers()]
    try:
        with recording(module_or_model) as lines:
            module_or_model(*inputs, **kwargs)
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
    return Explanation(lines + not_fused(module_or_model))


@contextmanager
def recording(root: Any) -> Iterator[list[Line]]:
    """The list to which every op call inside the block is added, and every module of `root` that runs unfused."""
    lines: list[Line] = []
    running: list[str] = []  # the fused modules that are being called, outermost first
    names: dict[int, str] = {}
    handles: list[Any] = []
    if isinstance(root, nn.Module):
        names = {id(module): name for name, module in root.named_modules()}

    def chose(choice: backend.Choice) -> None:
        module = running[-1] if running else ""
        lines.append(Line(module, choice.op, choice.backend, choice.reason, choice.shape, choice.dtype))

    def ran_unfused(module: nn.Module, why: str) -> None:
        line = Line(names.get(id(module), ""), "", "unfused", why)
        if line not in lines:  # a parent asks its gate before it calls it
            lines.append(line)

    try:
        handles = _track(root, names, running)
        plan.unfused_observers.append(ran_unfused)
        with backend.observe(chose):
            yield lines
    finally:
        if ran_unfused in plan.unfused_observers:
            plan.unfused_observers.remove(ran_unfused)
        for handle in handles:
            handle.remove()


def _is_compiled(module: nn.Module) -> bool:
    """Whether this module is what torch.compile returned, or was compiled in place."""
    return getattr(module, "_compiled_call_impl", None) is not None or "_orig_mod" in vars(module)["_modules"]


def _track(root: Any, names: dict[int, str], running: list[str]) -> list[Any]:
    """Hooks that say which fused module is being called. Only on modules that no fused module skips: a hook on such a
    one would make its parent run unfused, and explain would tell of what it did itself."""
    # Hooks on what is compiled would be compiled with it, and the next call would compile again.
    if not isinstance(root, nn.Module) or any(_is_compiled(module) for module in root.modules()):
        return []
    # The library's own bottlenecks run the gate that they join with a norm.
    planned = [module for module in root.modules() if isinstance(module, (plan.Planned, Joining))]
    inside: set[int] = set()
    for module in planned:
        if not isinstance(module, Joining):
            inside |= {id(child) for child in module.modules() if child is not module}
        else:
            inside |= {id(module.get_submodule(name)) for name in module.joins}
    handles = []
    for module in planned:
        if id(module) in inside:
            continue
        name = names[id(module)]
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
        handles.append(module.register_forward_hook(lambda *_: running.pop() and None, always_call=True))
    return handles


def not_fused(model: Any) -> list[Line]:
    """The gates of known classes in a model that aren't fused, each with its reason."""
    lines = []
    for name, module, rule in recognised(model) if isinstance(model, nn.Module) else ():
        if rule is None or rule.tail is not None or isinstance(module, plan.Planned):
            continue
        lines.append(Line(name, "", "unfused", refusal(module, rule) or "not converted: call fuse_"))
    return lines
