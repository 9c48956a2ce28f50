"""The declaration all else derives from: an `Op` is one hot path with its equations, its operators and its cases.

    public function --> Op.__call__ -- tensors are plain, no gradient   --> backend.run        (one backend, and why)
                                    -- tensors are plain, gradient      --> autograd.Function  (launch, save, backward)
                                    -- compiling, tracing, modes, …     --> torch.ops.fused_attn.<op>

Tests, benches, the C++ prototypes, the support table and the documentation read `OPS` and `BLOCKS`; nothing else lists
them.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._C import _DisableAutocast

from . import autograd, backend
from .autograd import is_inference_compiled, is_plain, is_transformed, is_watched

__all__ = ["BLOCKS", "OPS", "Block", "Case", "Op", "case", "op"]

LIB = torch.library.Library("fused_attn", "DEF")
OPS: dict[str, "Op"] = {}
BLOCKS: dict[str, "Block"] = {}


@dataclass(frozen=True)
class Case:
    """Arguments of one call, as shapes and values: drawn anew for each dtype, device and layout by
    `fused_attn.testing`."""

    args: Mapping[str, Any]
    tags: frozenset[str] = frozenset()

    def __str__(self) -> str:
        show = lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else str(v)
        return ",".join(f"{k}={show(v)}" for k, v in self.args.items()) or "defaults"


def case(*tags: str, **args: Any) -> Case:
    """A case: a tuple stands for a tensor of that shape, anything else for itself. Tag `bench` makes it a benchmark
    row."""
    return Case(args, frozenset(tags))


class Op:
    """One hot path: its equations, its backward, and the backends that run it. Made by the decorator `op`."""

    def __init__(
        self,
        eager: Callable[..., Any],
        *,
        formula: Callable[..., Any] | None,
        check: Callable[..., None],
        save: Callable[..., tuple[tuple[Tensor | None, ...], tuple[Any, ...]]] | None,
        backward: Callable[..., tuple[Tensor | None, ...]] | None,
        public: Callable[..., Any] | None,
        alone: Callable[..., bool] | None,
        maps: Sequence[str],
        budget: Callable[..., tuple[float, float]] | None,
        reduces: Callable[..., int],
        opens: bool,
        cases: Sequence[Case],
    ) -> None:
        self.__name__ = self.name = eager.__name__
        self.__doc__, self.__module__ = eager.__doc__, eager.__module__
        self.__signature__ = signature = inspect.signature(eager)
        self.eager, self.formula, self.check, self.budget = _keeping_dtypes(eager), formula, check, budget
        self._equations, self.opens = eager, opens
        self.maps, self.reduces, self.cases = tuple(maps), reduces, tuple(cases)
        self.schema = torch.library.infer_schema(eager, mutates_args=(), op_name=self.name)
        self.arguments = tuple(signature.parameters)
        self._defaults = tuple(p.default for p in signature.parameters.values())
        self.arity = len(self.arguments)
        self.save, self.backward, self._public, self.alone = save, backward, public, alone
        LIB.define(self.schema)
        self.overload = getattr(torch.ops.fused_attn, self.name).default
        arguments, returns = self.overload._schema.arguments, self.overload._schema.returns
        self.tensors = tuple(i for i, a in enumerate(arguments) if "Tensor" in str(a.type))
        assert self.tensors == tuple(range(len(self.tensors))), f"{self.name}: tensors come before options"
        self.count, self.returns = len(self.tensors), len(returns)
        self.map_indices = tuple((name, self.arguments.index(name)) for name in self.maps)
        LIB.impl(self.name, lambda *args: self.launch(self.bind(args, {})), "CompositeExplicitAutograd")
        torch.library.register_fake(f"fused_attn::{self.name}", self.eager, lib=LIB)
        self._launching = autograd.launching(self) if backward else None
        self.compiled: backend.CppImplementation | None = None  # once it is loaded
        self._calls: dict[tuple[Any, ...], backend.Call] = {}
        self._transformed = autograd.transformed(self)
        autograd.register(self, LIB)
        OPS[self.name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != self.arity:
            args = self.bind(args, kwargs)
        if is_watched():
            return self._watched(args)
        return self._unwatched(args, self.call(args))

    def at(self, *options: Any) -> Callable[..., Any]:
        """This op with all its options fixed, to be called with all its tensors: for who calls it again and again.
        Spares the look at the options, a microsecond of a call's five."""
        calls: dict[tuple[type, ...], backend.Call | None] = {}

        def run(*tensors: Tensor | None) -> Any:
            args = tensors + options
            if is_watched():
                return self._watched(args)
            types = tuple(map(type, tensors))
            call = calls.get(types)
            if call is None:
                call = calls[types] = self.call(args)
            return self._unwatched(args, call)

        return run

    def _unwatched(self, args: tuple[Any, ...], call: backend.Call | None) -> Any:
        try:
            if call is None or args[0].is_meta:
                return self._watched(args)
            tensors = call.pick(args)
            if torch.is_grad_enabled():
                for t in tensors:
                    if t.requires_grad:
                        if self._launching is None:
                            raise autograd.no_second(self)
                        return self._launching((args, call), *tensors)
            return backend.run(self, args, True, tensors, call)
        except (AttributeError, IndexError, RuntimeError):
            self.check(*args)  # something that isn't a tensor, or not a dense one, stands where one is expected
            raise

    def _watched(self, args: tuple[Any, ...]) -> Any:
        """The call that somebody watches, or whose arguments aren't plain."""
        if self.opens and is_inference_compiled() and backend.is_free():
            with torch.autocast(args[0].device.type, enabled=False):
                return self.public(args, self._equations(*args))
        outs = (self._transformed.apply if is_transformed() else self.overload)(*args)
        return self.public(args, outs)

    def call(self, args: tuple[Any, ...]) -> backend.Call | None:
        """What all calls with arguments of these types, and these options, share; None where no launcher takes them."""
        key = (*map(type, args[: self.count]), *args[self.count :])
        try:
            return self._calls[key]
        except KeyError:
            pass
        except TypeError:  # an option that has no hash is none
            return None
        if not is_plain(args):
            return None
        call = backend.Call(self, args)
        if len(self._calls) < backend.MOST_CALLS:
            self._calls[key] = call
        return call

    def __repr__(self) -> str:
        return f"<fused_attn op {self.schema}>"

    def launch(self, args: tuple[Any, ...]) -> Any:
        """Runs one backend on plain tensors, recording nothing, and returns all outputs."""
        call = self.call(args) or backend.Call(self, args)
        return backend.run(self, args, False, call.pick(args), call)

    def public(self, args: tuple[Any, ...], outs: Any) -> Any:
        """What the caller of the public function sees of all outputs of the operator."""
        return self._public(args, outs) if self._public is not None else outs

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """All arguments by position, defaults filled in. Raises TypeError as a call of the function would.

        A string where an optional tensor could stand is the first option: the tensors left out are None.
        """
        first = next((i for i, a in enumerate(args[1 : self.count], 1) if type(a) is str), self.count)
        if first < self.count and all(d is None for d in self._defaults[first : self.count]):
            args = (*args[:first], *self._defaults[first : self.count], *args[first:])
        if not kwargs and len(args) < self.arity and self._defaults[len(args)] is not inspect.Parameter.empty:
            return args + self._defaults[len(args) :]
        bound = self.__signature__.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.args


def op(
    *,
    formula: Callable[..., Any] | None = None,
    check: Callable[..., None],
    save: Callable[..., tuple[tuple[Tensor | None, ...], tuple[Any, ...]]] | None = None,
    backward: Callable[..., tuple[Tensor | None, ...]] | None = None,
    public: Callable[..., Any] | None = None,
    alone: Callable[..., bool] | None = None,
    maps: Sequence[str] = ("x",),
    budget: Callable[..., tuple[float, float]] | None = None,
    reduces: Callable[..., int] = lambda *args: 1,
    opens: bool = False,
    cases: Sequence[Case] = (),
) -> Callable[[Callable[..., Any]], Op]:
    """Declares an op. The decorated function is its eager form: its signature is the schema, its docstring the manual.

    formula: the equations in differentiable PyTorch, returning the public outputs; in float64 it is the truth of the
        tests
    check: raises for arguments that no backend could take, naming the argument, what was expected and what came
    save: (args, outs) -> (tensors kept for backward, constants)
    backward: (tensors, constants, gradients of the public outputs, needs) -> one gradient or None per tensor argument
    public: (args, outs) -> what the caller sees, where that isn't all of the operator's outputs
    alone: args -> whether that is the first output alone, so that a kernel which returns no other may run without
        gradients
    maps: names of the arguments as large as a feature map; a compiled backend must find each of them in x's layout
    budget: args -> (reads, writes) of feature maps: the most that a compiled backend may make
    reduces: args -> how many terms the longest sum of an output has, which scales the tolerance
    opens: whether a program compiled without gradients gets the eager form's lines: its compiler joins them with the
        norm in front, which an operator that it can't look into would keep apart
    """
    return lambda eager: Op(
        eager,
        formula=formula,
        check=check,
        save=save,
        backward=backward,
        public=public,
        alone=alone,
        maps=maps,
        budget=budget,
        reduces=reduces,
        opens=opens,
        cases=cases,
    )


def _keeping_dtypes(eager: Callable[..., Any]) -> Callable[..., Any]:
    """The eager form out of autocast's reach, which would run its dense layers in half precision, as no kernel does."""

    @functools.wraps(eager)
    def run(*args: Any) -> Any:
        with _DisableAutocast():
            return eager(*args)

    return run


@dataclass(frozen=True)
class Block:
    """One mechanism: its module, what it converts, and the cases that prove it. Declared at the end of its file.

    name: the registry's key; module: the nn.Module class; paper: title, link
    ops: names of the ops it runs; rules: conversion rules (fused_attn.plan.Rule)
    cases: constructor arguments and input shape, `case(args=dict(channels=64), x=(2, 64, 7, 7))`
    ports: names of classes that are known by their source, wherever they are imported from
    """

    name: str
    module: type[torch.nn.Module]
    paper: str
    ops: tuple[str, ...]
    rules: tuple[Any, ...] = ()
    cases: tuple[Case, ...] = field(default=())
    ports: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        BLOCKS[self.name] = self
        self.module.__doc__ = f"{inspect.cleandoc(self.module.__doc__ or '')}\n\nSource: {self.paper}."
