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
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..plan import ACTIVATIONS, READERS, Refused, Rule, fingerprint, path
from .excite_plan import ExcitePlan, Given
from .se_rules import gate_forward

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
    """(N, C) and `ones` dimensions of size 1, after some layers; `AS_MAP`: as many dimensions as the map has."""

    layers: tuple["Layer", ...]
    ones: int


@dataclass(frozen=True)
class _Scaled:
    """x·gate, plus `offset` times x."""

    layers: tuple["Layer", ...]
    offset: float = 0.0


class Layer(NamedTuple):
    """A child by its name, or what is `Given`, and how many dimensions of size 1 its input has."""

    name: str | Given
    ones: int


AS_MAP = -1
POOL = Given("mean")  # stands for the mean among the layers
_GIVEN: dict[Any, str] = {
    torch.relu: "relu", F.relu: "relu", F.relu6: "relu6", F.silu: "silu", F.gelu: "gelu", F.hardswish: "hardswish",
    torch.sigmoid: "sigmoid", F.sigmoid: "sigmoid", F.hardsigmoid: "hard_sigmoid",
}  # fmt: skip
_POOLS = {F.adaptive_avg_pool1d: 1, F.adaptive_avg_pool2d: 2, F.adaptive_avg_pool3d: 3}


@dataclass(frozen=True)
class Form:
    """What a forward was read as: the layers in order, and what is added to the gate; dims: of space, where known."""

    layers: tuple[Layer, ...]
    offset: float
    dims: int | None


class _Reader:
    """Runs the statements of one forward."""

    def __init__(self, function: Callable[..., Any]) -> None:
        try:
            source = textwrap.dedent(inspect.getsource(function))
            tree = ast.parse(source).body[0]
        except (OSError, TypeError, SyntaxError, IndexError):
            raise Refused("its forward has no source") from None
        if not isinstance(tree, ast.FunctionDef) or tree.decorator_list or hasattr(function, "__wrapped__"):
            raise Refused("its forward isn't a plain method")
        if not _runs(function, source):
            raise Refused("its forward was compiled from another source than there is now")
        a = tree.args
        if len(a.args) != 2 or a.vararg or a.kwarg or a.kwonlyargs or a.posonlyargs or a.defaults:
            raise Refused("its forward takes more than one map")
        self.me = a.args[0].arg
        self.names: dict[str, Any] = {a.args[1].arg: _Map()}
        self.globals = function.__globals__
        self.dims: int | None = None
        self.consumed: set[tuple[Layer, ...]] = set()  # a layer may change its input in place
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
        """What an expression stands for. Raises Refused where that isn't known."""
        if isinstance(node, ast.Name) and node.id in self.names:
            value = self.names[node.id]
            if isinstance(value, _Descriptor) and value.layers in self.consumed:
                raise self._unknown(node)
            return value
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
        if isinstance(left, _Map) and isinstance(right, _Descriptor) and right.ones != 0:
            if right.ones != AS_MAP:
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
        if (
            isinstance(function, ast.Attribute)
            and isinstance(function.value, ast.Name)
            and function.value.id == self.me
        ):
            if len(node.args) == 1 and not given:
                return self._child(function.attr, self.value(node.args[0]), node)
            raise self._unknown(node)
        imported = self._imported(function)
        if imported is not None:
            return self._function(imported, [self.value(a) for a in node.args], given, node)
        if isinstance(function, ast.Attribute):
            return self._method(
                self.value(function.value), function.attr, [self.value(a) for a in node.args], given, node
            )
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
            return _Descriptor((Layer(name, AS_MAP),), AS_MAP)
        if isinstance(value, _Descriptor):
            return self._through(value, name)
        raise self._unknown(node)

    def _through(self, value: _Descriptor, name: str | Given) -> _Descriptor:
        self.consumed.add(value.layers)
        return replace(value, layers=(*value.layers, Layer(name, value.ones)))

    def _function(self, function: Any, args: list[Any], given: dict[str, Any], node: ast.AST) -> Any:
        inplace = {k: v for k, v in given.items() if k != "inplace"}
        try:
            activation = _GIVEN.get(function)
            pool = _POOLS.get(function)
        except TypeError:
            raise self._unknown(node) from None
        if activation is not None and len(args) == 1 and not inplace and isinstance(args[0], _Descriptor):
            return self._through(args[0], Given(activation))
        if pool is not None and not given.keys() - {"output_size"} and isinstance(args[0], _Map):
            if [*args[1:], *given.values()] not in ([1], [(1,) * pool]):
                raise self._unknown(node)
            self._space(pool, node)
            return _Descriptor((Layer(POOL, AS_MAP),), pool)
        if function is torch.mul and len(args) == 2 and not given:
            return self._product(args[0], args[1], node)
        if function is torch.mean and args:
            return self._mean(args[0], args[1:], given, node)
        if function is torch.flatten and args and isinstance(args[0], _Descriptor):
            return self._method(args[0], "flatten", args[1:], given, node)
        raise self._unknown(node)

    def _mean(self, value: Any, args: list[Any], given: dict[str, Any], node: ast.AST) -> _Descriptor:
        """The mean over all of space, written (2, 3) or (-2, -1) and so on."""
        dims: Any = given.get("dim", args[0] if args else None)
        keep = given.get("keepdim", args[1] if len(args) > 1 else False)
        if isinstance(value, _Map) and not given.keys() - {"dim", "keepdim"} and isinstance(keep, bool):
            dims = (dims,) if type(dims) is int else dims
            count = len(dims) if isinstance(dims, tuple) else 0
            if count and sorted(dims) in (list(range(2, 2 + count)), list(range(-count, 0))):
                self._space(count, node)
                return _Descriptor((Layer(POOL, AS_MAP),), count if keep else 0)
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
            if name == "expand_as" and len(args) == 1 and isinstance(args[0], _Map) and value.ones != 0:
                return value  # broadcasting does the same
            if name == "sigmoid" and not args:
                return self._through(value, Given("sigmoid"))
            if name == "unsqueeze" and value.ones >= 0 and args in ([-1], [value.ones + 2]):
                return replace(value, ones=value.ones + 1)
            if name == "contiguous" and not args:
                return value
        raise self._unknown(node)

    @staticmethod
    def _rows(first: Any, second: Any) -> bool:
        """Whether the first two sizes of a view are N and C, or N and whatever is left."""
        return first == _Size(0) and (second == _Size(1) or (type(second) is int and second == -1))


def _runs(function: Any, source: str) -> bool:
    """Whether a function's bytecode is that of the source: a file may have changed since it was imported."""
    code = function.__code__
    if code.co_freevars:  # what they stand for may change
        return False
    same = lambda again, name: getattr(code, name) == getattr(again, name)
    # CPython calls the functions of an imported module by other instructions than those of any other name.
    for imports in ("", f"import {', '.join(code.co_names)}\n" if code.co_names else ""):
        compiled = compile(imports + source, "<forward>", "exec", dont_inherit=True)
        again = next((c for c in compiled.co_consts if isinstance(c, type(code))), None)
        if again and all(same(again, name) for name in ("co_code", "co_names", "co_varnames", "co_consts")):
            return True
    return False


@functools.cache
def read(function: Callable[..., Any]) -> Form:
    """What a forward does. Raises Refused, with the first construct that isn't understood."""
    return _Reader(function).read


# From what was read to a plan

_DENSE = re.compile(r"torch\.nn\.modules\.(?:linear\.Linear|conv\.Conv([123])d)")
_OF_GATES = re.compile(r"torch\.nn\.modules\.(linear|conv|activation|pooling|dropout|flatten|batchnorm|container)\.")
_GATES = ("sigmoid", "hard_sigmoid")


def _leaves(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The layers in a module by path, through Sequentials."""
    for name, child in module.named_children():
        if path(type(child)) == "torch.nn.modules.container.Sequential":
            yield from _leaves(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def _plan(module: nn.Module, form: Form) -> ExcitePlan:
    """The plan of what was read. Raises Refused where the layers, or what they are applied to, aren't those of SE."""
    cls, children = type(module), vars(module)["_modules"]
    layers: list[Layer] = []
    for layer in form.layers:
        if isinstance(layer.name, str):
            if not isinstance(children.get(layer.name), nn.Module) or hasattr(cls, layer.name):
                raise Refused(f"{layer.name} isn't one of its children")
            start = f"{layer.name}."
            layers += [Layer(n, layer.ones) for n, _ in _leaves(module) if n == layer.name or n.startswith(start)]
        else:
            layers.append(layer)
    pool, *layers = layers
    names: list[str | Given] = [layer.name for layer in layers]
    if len(names) not in (2, 3, 4) or not isinstance(names[0], str):
        raise Refused("its layers aren't those of squeeze-and-excitation")
    fc2 = names[-2] if len(names) > 2 else None
    if fc2 is not None and not isinstance(fc2, str):
        raise Refused("its layers aren't those of squeeze-and-excitation")
    act = names[1] if len(names) == 4 else None
    plan = ExcitePlan(
        module, names[0], fc2, names[-1], act, pool=pool.name if isinstance(pool.name, str) else None,
        offset=form.offset,
    )  # fmt: skip
    dims = plan.dim - 2 if isinstance(pool.name, str) else form.dims
    if dims is None or form.dims not in (None, dims):
        raise Refused(f"its pooling layer leaves {dims} dimensions, its forward {form.dims}")
    plan.dim = dims + 2
    leaves = dict(_leaves(module))
    for layer in layers:
        if isinstance(layer.name, str) and (found := _DENSE.fullmatch(path(type(leaves[layer.name])))) is not None:
            ones = dims if layer.ones == AS_MAP else layer.ones
            if ones != int(found[1] or 0):
                raise Refused(f"{layer.name} is applied to {ones + 2} dimensions")
    return plan


def _forward_of(cls: type) -> tuple[type, Any] | None:
    """The class that defines forward, and the function."""
    for base in cls.__mro__:
        if "forward" in vars(base):
            return base, vars(base)["forward"]
    return None


@functools.cache
def _rule(base: type, function: Any) -> Rule | str:
    """The rule for a class whose forward was read, or why it can't be."""
    try:
        form = read(function)
    except Refused as why:
        return str(why)
    return Rule(path(base), gate_forward, lambda module: _plan(module, form), {"forward": (fingerprint(function),)})


def _resembles(module: nn.Module) -> bool:
    """Whether a module's layers, whatever its forward does with them, are those of squeeze-and-excitation."""
    leaves = [child for _, child in _leaves(module)]
    if not 3 <= len(leaves) <= 8 or not all(_OF_GATES.match(path(type(m))) for m in leaves):
        return False
    dense = [m for m in leaves if _DENSE.fullmatch(path(type(m)))]
    if len(dense) != 2 or not any(ACTIVATIONS.get(path(type(m))) in _GATES for m in leaves):
        return False
    (h1, c1), (c2, h2) = (tuple(m.weight.shape)[:2] for m in dense)  # type: ignore[arg-type]
    return bool(c1 == c2 and h1 == h2 and h1 <= c1)


def by_source(cls: type, module: nn.Module | None) -> Rule | None:
    """The rule for a class that none names, where its forward can be read; a rule that refuses, where it can't and the
    module's layers are those of squeeze-and-excitation. module: None where only the class is known."""
    found = _forward_of(cls)
    if found is None or (cls.__module__.startswith("torch.nn.modules") and cls is not nn.Sequential):
        return None
    if cls is nn.Sequential:
        why: Rule | str = "is a Sequential, which returns the gate and leaves the product to its parent"
    elif not inspect.isfunction(found[1]) or (module is not None and len(module._modules) > 6):
        return None
    else:
        why = _rule(*found)
    if isinstance(why, Rule):
        return why
    if module is None or not _resembles(module):
        return None
    reason = why

    def plan(_: nn.Module) -> ExcitePlan:
        raise Refused(reason)

    return Rule(path(cls), gate_forward, plan, {})


READERS.append(by_source)
