"""What is timed: one implementation of one case, on sets of arguments, in a mode; and what compilers make of it."""

import itertools
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import fused_attn

from .measure import Candidate

BASELINES = ("eager", "inductor", "max-autotune", "clone")
INDUCTORS = ("inductor", "inductor, no layout", "inductor, max-autotune")


@dataclass
class Subject:
    """One implementation of one case: `function(*args)` for each set of arguments; `wrt`: what has gradients; `data`:
    which arguments are no weights, all unless said."""

    name: str
    source: str
    function: Callable[..., Any]
    args: list[tuple[Any, ...]]
    wrt: list[list[Tensor]]
    forced: str | None = None
    data: tuple[int, ...] | None = None

    def candidate(self, mode: str, upstream: list[Tensor]) -> Candidate:
        """Ready to be timed. upstream: the gradients that backward starts from, one per set of arguments."""

        def forward(args: tuple[Any, ...]) -> Callable[[], object]:
            return lambda: self.function(*args)

        def backward(args: tuple[Any, ...], wrt: list[Tensor], dy: Tensor) -> Callable[[], object]:
            return lambda: torch.autograd.grad(first(self.function(*args)), wrt, dy)

        def train(args: tuple[Any, ...], wrt: list[Tensor], dy: Tensor) -> Callable[[], object]:
            data = {id(a) for i, a in enumerate(args) if self.data is None or i in self.data}
            weights = [t for t in wrt if id(t) not in data]

            def step() -> None:
                first(self.function(*args)).backward(dy)
                with torch.no_grad():
                    if weights:
                        torch._foreach_add_(weights, [w.grad for w in weights], alpha=-1e-6)  # type: ignore[misc]
                for t in wrt:
                    t.grad = None

            return step

        if mode in ("forward+backward", "train-step"):
            make = backward if mode == "forward+backward" else train
            calls = [make(*each) for each in zip(self.args, self.wrt, upstream, strict=True)]
        else:
            calls = [forward(args) for args in self.args]
        return Candidate(self.name, calls, lambda: self._context(mode))

    @contextmanager
    def _context(self, mode: str) -> Iterator[None]:
        with ExitStack() as stack:
            if mode == "forward":
                stack.enter_context(torch.inference_mode())
            if self.forced is not None:
                stack.enter_context(fused_attn.use_backend(self.forced))
            yield


def first(out: Any) -> Tensor:
    """The output that gradients start from."""
    return out[0] if isinstance(out, tuple) else out


_fresh = itertools.count()


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """torch.compile with a cache of its own: Dynamo counts recompilations per code object, so each gets a new one."""

    def call(*args: Any) -> Any:
        return function(*args)

    code = call.__code__.replace(co_name=f"call_{next(_fresh)}")
    alone = types.FunctionType(code, call.__globals__, code.co_name, call.__defaults__, call.__closure__)
    return torch.compile(alone, dynamic=False, options=options or None)


def rivals(eager: Subject, baselines: tuple[str, ...], device: str) -> Iterator[Subject]:
    """What torch.compile makes of a subject, in every way that is asked for."""
    if "inductor" in baselines:
        yield replace(eager, name=INDUCTORS[0], function=compiled(eager.function))
        if device == "cpu":
            yield replace(eager, name=INDUCTORS[1], function=compiled(eager.function, layout_optimization=False))
    if "max-autotune" in baselines:
        options = torch._inductor.list_mode_options("max-autotune")
        yield replace(eager, name=INDUCTORS[2], function=compiled(eager.function, **options))


def clones(xs: list[Tensor]) -> Subject:
    """The roofline: one read and one write."""
    return Subject("clone", "x.clone()", lambda x: x.detach().clone(), [(x,) for x in xs], [[x] for x in xs])
