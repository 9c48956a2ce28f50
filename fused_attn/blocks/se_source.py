"""Squeeze-and-excitation of classes that no rule names: their forward is read, statement by statement.

Every repository has its own SELayer, and what their forwards do is the same. Names tell nothing, and a comparison of
numbers on some input proves nothing about others. So the source of `forward` is run on symbols: a map, its sizes, a
descriptor of it and the layers that the descriptor went through. Each construct below means exactly what PyTorch does
with it; at the first one that isn't below, or a shape that doesn't fit, reading stops and the class is refused with
that reason. What comes out is the order of layers; `ExcitePlan` then checks each layer by itself, as it does for rules.

    y = pool(x).view(b, c)      map -> descriptor (N, C)
    y = fc(y).view(b, c, 1, 1)  descriptor, through fc, (N, C, 1, 1)
    return x * y                the map times its gate
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..plan import Refused, Rule, fingerprint, path
from .excite_plan import ExcitePlan, Given

# What a symbol stands for: the map x (N, C, *S); its sizes; one size; a descriptor; the product of map and gate.


@dataclass(frozen=True)
class _Map:
    """x itself."""


@dataclass(frozen=True)
class _Sizes:
    """x.shape, from one dimension on, up to another."""

    start: int = 0
    stop: int | None = None


@dataclass(frozen=True)
class _Size:
    """One of x's sizes: 0 is N, 1 is C, others are of space."""

    dim: int


@dataclass(frozen=True)
class _Descriptor:
    """(N, C) and `ones` dimensions of size 1, after the layers named: paths of children, or what is `Given`."""

    layers: tuple[str | Given, ...]
    ones: int


@dataclass(frozen=True)
class _Scaled:
    """x·gate, plus `offset` times x."""

    layers: tuple[str | Given, ...]
    offset: float = 0.0


POOL = Given("mean")  # stands for the mean among the layers
_GIVEN: dict[Any, str] = {
    torch.relu: "relu", F.relu: "relu", F.relu6: "relu6", F.silu: "silu", F.gelu: "gelu", F.hardswish: "hardswish",
    torch.sigmoid: "sigmoid", F.sigmoid: "sigmoid", F.hardsigmoid: "hard_sigmoid",
}  # fmt: skip
_POOLS = {F.adaptive_avg_pool1d: 1, F.adaptive_avg_pool2d: 2, F.adaptive_avg_pool3d: 3}


@dataclass(frozen=True)
class Form:
    """What a forward was read as: the layers in order, and what is added to the gate; dims: of space, where known."""

    layers: tuple[str | Given, ...]
    offset: float
    dims: int | None


class _Reader:
    """Runs the statements of one forward."""

    def __init__(self, function: Callable[..., Any]) -> None:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        except (OSError, TypeError, SyntaxError, IndexError):
            raise Refused("its forward has no source") from None
        if not isinstance(tree, ast.FunctionDef) or tree.decorator_list or hasattr(function, "__wrapped__"):
            raise Refused("its forward isn't a plain method")
        a = tree.args
        if len(a.args) != 2 or a.vararg or a.kwarg or a.kwonlyargs or a.posonlyargs or a.defaults:
            raise Refused("its forward takes more than one map")
        self.me = a.args[0].arg
        self.names: dict[str, Any] = {a.args[1].arg: _Map()}
        self.globals = function.__globals__  # type: ignore[attr-defined]
        self.dims: int | None = None
        self.read = self._body(tree.body)

    def _body(self, statements: list[ast.stmt]) -> Form:
        for statement in statements:
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                continue  # a docstring
            if isinstance(statement, ast.Return) and statement.value is not None:
                value = self.value(statement.value)
                if isinstance(value, _Descriptor):
                    raise Refused("its forward returns the gate and leaves the product to its parent")
                if not isinstance(value, _Scaled):
                    raise Refused("its forward doesn't return its input times a gate")
                return Form(value.layers, value.offset, self.dims)
            if not isinstance(statement, ast.Assign) or len(statement.targets) != 1:
                raise Refused(f"its forward holds `{ast.unparse(statement).splitlines()[0]}`, which isn't understood")
            self._assign(statement.targets[0], self.value(statement.value))
        raise Refused("its forward returns nothing")

    def _assign(self, target: ast.expr, value: Any) -> None:
        if isinstance(target, ast.Name) and target.id != self.me:
            self.names[target.id] = value
            return
        if isinstance(target, ast.Tuple) and isinstance(value, _Sizes) and value.start == 0:
            count = len(target.elts)
            if value.stop is None:
                self._space(count - 2, target)
            elif value.stop != count:
                raise self._unknown(target)
            for dim, name in enumerate(target.elts):
                self._assign(name, _Size(dim))
            return
        raise self._unknown(target)

    def _space(self, dims: int, node: ast.AST) -> None:
        """x has that many dimensions of space, or forward fails."""
        if dims not in (1, 2, 3) or self.dims not in (None, dims):
            raise self._unknown(node)
        self.dims = dims

    @staticmethod
    def _unknown(node: ast.AST) -> Refused:
        return Refused(f"its forward holds `{ast.unparse(node)}`, which isn't understood")

    # Expressions

    def value(self, node: ast.expr) -> Any:
        if isinstance(node, ast.Name) and node.id in self.names:
            return self.names[node.id]
        if isinstance(node, ast.Constant) and type(node.value) in (int, bool):
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            value = self.value(node.operand)
            if type(value) is int:
                return -value
        if isinstance(node, (ast.Tuple, ast.List)):
            return tuple(self.value(e) for e in node.elts)
        if isinstance(node, ast.Attribute) and node.attr == "shape" and isinstance(self.value(node.value), _Map):
            return _Sizes()
        if isinstance(node, ast.Subscript):
            return self._item(node)
        if isinstance(node, ast.BinOp):
            left, right = self.value(node.left), self.value(node.right)
            if isinstance(node.op, ast.Mult):
                return self._product(left, right, node)
            if isinstance(node.op, ast.Add):
                return self._sum(left, right, node)
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Attribute, ast.Name)):
            return self._call(node)
        raise self._unknown(node)

    def _item(self, node: ast.Subscript) -> Any:
        sizes, index = self.value(node.value), node.slice
        if sizes == _Sizes():
            if isinstance(index, ast.Slice) and index.lower is None and index.step is None and index.upper is not None:
                if self.value(index.upper) == 2:
                    return _Sizes(0, 2)
            elif not isinstance(index, ast.Slice) and self.value(index) in (0, 1):
                return _Size(self.value(index))
        raise self._unknown(node)

    def _product(self, left: Any, right: Any, node: ast.AST) -> _Scaled:
        if isinstance(left, _Descriptor):
            left, right = right, left
        if isinstance(left, _Map) and isinstance(right, _Descriptor) and right.ones > 0:
            self._space(right.ones, node)
            return _Scaled(right.layers)
        raise self._unknown(node)

    def _sum(self, left: Any, right: Any, node: ast.AST) -> _Scaled:
        if isinstance(left, _Map):
            left, right = right, left
        if isinstance(left, _Scaled) and left.offset == 0 and isinstance(right, _Map):
            return replace(left, offset=1.0)
        raise self._unknown(node)

    def _call(self, node: ast.Call) -> Any:
        given = {k.arg: self.value(k.value) for k in node.keywords if k.arg is not None}
        if len(given) != len(node.keywords):
            raise self._unknown(node)
        function = node.func
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            if function.value.id == self.me and function.value.id not in self.names:
                if len(node.args) == 1 and not given:
                    return self._child(function.attr, self.value(node.args[0]), node)
                raise self._unknown(node)
        imported = self._imported(function)
        if imported is not None:
            return self._function(imported, [self.value(a) for a in node.args], given, node)
        if isinstance(function, ast.Attribute):
            return self._method(self.value(function.value), function.attr, [self.value(a) for a in node.args], given, node)
        raise self._unknown(node)

    def _imported(self, node: ast.expr) -> Any:
        """What a name that isn't local stands for: a function, by way of modules."""
        if isinstance(node, ast.Name):
            return None if node.id in self.names or node.id == self.me else self.globals.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self._imported(node.value)
            return getattr(owner, node.attr, None) if isinstance(owner, ModuleType) else None
        return None

    def _child(self, name: str, value: Any, node: ast.AST) -> _Descriptor:
        if isinstance(value, _Map):  # a pooling layer, which ExcitePlan checks; it knows how many dimensions are left
            return _Descriptor((name,), -1)
        if isinstance(value, _Descriptor):
            return replace(value, layers=(*value.layers, name))
        raise self._unknown(node)

    def _function(self, function: Any, args: list[Any], given: dict[str, Any], node: ast.AST) -> Any:
        inplace = {k: v for k, v in given.items() if k != "inplace"}
        try:
            activation = _GIVEN.get(function)
            pool = _POOLS.get(function)
        except TypeError:
            raise self._unknown(node) from None
        if activation is not None and len(args) == 1 and not inplace and isinstance(args[0], _Descriptor):
            return replace(args[0], layers=(*args[0].layers, Given(activation)))
        if pool is not None and not given.keys() - {"output_size"} and isinstance(args[0], _Map):
            if [*args[1:], *given.values()] in ([1], [(1,) * pool]):
                self._space(pool, node)
                return _Descriptor((POOL,), pool)
        if function is torch.mul and len(args) == 2 and not given:
            return self._product(args[0], args[1], node)
        if function is torch.mean and args:
            return self._mean(args[0], args[1:], given, node)
        if function is torch.flatten and args and isinstance(args[0], _Descriptor):
            return self._method(args[0], "flatten", args[1:], given, node)
        raise self._unknown(node)

    def _mean(self, value: Any, args: list[Any], given: dict[str, Any], node: ast.AST) -> _Descriptor:
        """The mean over all of space, written (2, 3) or (-2, -1) and so on."""
        dims = given.get("dim", args[0] if args else None)
        keep = given.get("keepdim", args[1] if len(args) > 1 else False)
        if isinstance(value, _Map) and not given.keys() - {"dim", "keepdim"} and isinstance(keep, bool):
            dims = (dims,) if type(dims) is int else dims
            count = len(dims) if isinstance(dims, tuple) else 0
            if count and sorted(dims) in (list(range(2, 2 + count)), list(range(-count, 0))):
                self._space(count, node)
                return _Descriptor((POOL,), count if keep else 0)
        raise self._unknown(node)

    def _method(self, value: Any, name: str, args: list[Any], given: dict[str, Any], node: ast.AST) -> Any:
        if name == "mean":
            return self._mean(value, args, given, node)
        if isinstance(value, _Map) and name == "size" and not given:
            if not args:
                return _Sizes()
            if args[0] in (0, 1):
                return _Size(args[0])
        if isinstance(value, _Map) and name == "mul" and len(args) == 1 and not given:
            return self._product(value, args[0], node)
        if isinstance(value, _Descriptor) and not given:
            if name in ("view", "reshape"):
                shape = args[0] if len(args) == 1 and isinstance(args[0], tuple) else tuple(args)
                ones = len(shape) - 2
                if ones >= 0 and self._rows(shape[0], shape[1]) and all(type(s) is int and s == 1 for s in shape[2:]):
                    return replace(value, ones=ones)
            if name == "flatten" and args == [1]:
                return replace(value, ones=0)
            if name == "expand_as" and len(args) == 1 and isinstance(args[0], _Map) and value.ones > 0:
                return value  # broadcasting does the same
            if name == "sigmoid" and not args:
                return replace(value, layers=(*value.layers, Given("sigmoid")))
            if name == "unsqueeze" and value.ones >= 0 and args in ([-1], [value.ones + 2]):
                return replace(value, ones=value.ones + 1)
            if name == "contiguous" and not args:
                return value
        raise self._unknown(node)

    @staticmethod
    def _rows(first: Any, second: Any) -> bool:
        """Whether the first two sizes of a view are N and C, one of which may be left to be found."""
        n, c = first == _Size(0), second == _Size(1)
        left = lambda size: type(size) is int and size == -1
        return (n and c) or (n and left(second)) or (left(first) and c)


@functools.cache
def read(function: Callable[..., Any]) -> Form:
    """What a forward does. Raises Refused, with the first construct that isn't understood."""
    return _Reader(function).read
