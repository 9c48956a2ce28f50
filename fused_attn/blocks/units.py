"""Residual units of anybody's, whose forward is read: a chain of layers, a shortcut, their sum and an activation.

    y = act(f_k(… f_1(x)) + shortcut(x))

Authors' repositories copy ResNet's blocks and put their gate between the last norm and the sum. No class is known by
name here: a forward is followed statement by statement, on the module as it is, and it is a unit where every statement
is one of these, v and w being chains of layers from x on:

    v = self.child(w)                   v = F.relu(w)       a name for a value, a call within a call
    v = v + w, v += w, torch.add(v, w)  return v
    if self.flag: …                     on plain attributes of the module, or on which children there are; only the
                                        branch that is taken is followed, and the attributes are compared on each call

All else is left as it is: a method or a function that isn't an activation of torch, a loop, a number. So are an input
that is changed in place, a layer that is called without use, and chains that share a layer's output, as where the
shortcut starts behind an activation. The shortcut has layers that draw no random numbers, because it runs last.

Within a unit, children that are made of such statements without a sum are looked into; so are Sequentials. A forward
that has a sum, but not for this module, is a unit where it holds a gate: MBConv with a stride.
"""

import ast
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..plan import ACTIVATIONS, PARENTS, Fused, Refused, Rule, author, fingerprint, path, tampered
from . import normed
from .chain import IDLE, Leaf, Tail, TailPlan, by_plan, forward, inside
from .proof import parsed

# Layers that neither change their input nor draw random numbers.
_PURE = frozenset(
    f"torch.nn.modules.{name}"
    for name in (
        *(f"conv.Conv{d}d" for d in (1, 2, 3)),
        *(f"batchnorm.BatchNorm{d}d" for d in (1, 2, 3)),
        *(f"pooling.{kind}Pool{d}d" for kind in ("Avg", "Max", "AdaptiveAvg", "AdaptiveMax") for d in (1, 2, 3)),
        "batchnorm.SyncBatchNorm", "normalization.GroupNorm", "linear.Identity", "container.Sequential",
    )
)  # fmt: skip
# Functions that stand for a layer, which is made with the keyword arguments beside `inplace`.
_FUNCTIONS: dict[Any, type[nn.Module]] = {
    F.relu: nn.ReLU, torch.relu: nn.ReLU, F.relu_: nn.ReLU, F.relu6: nn.ReLU6, F.silu: nn.SiLU,
    F.hardswish: nn.Hardswish, F.leaky_relu: nn.LeakyReLU, F.gelu: nn.GELU,
}  # fmt: skip
_MADE = frozenset(_FUNCTIONS.values())
# Other layers that don't change their input, with the fingerprint of their forward; and TensorFlow's padding.
_KNOWN_PURE = {
    "pytorchcv.models.ghostnet.GhostConvBlock": "4c85a9094de8",
    "pytorchcv.models.mixnet.MixConv": "7e2f25207261",
}
_TF_PADDING = "e05d748c8217"
_DEPTH = 4  # of children within children


Fixed = tuple[dict[str, Any], str, Any]


class _Unread(Exception):
    """The forward isn't such a one."""


class _Padding(nn.Module):
    """Zeros around an image, so that a convolution of this size and stride makes ⌈size/stride⌉ of it, the odd one at
    the end. As published: an image that isn't square gets its height's along its width, and the other way round."""

    def __init__(self, kernel_size: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation

    def forward(self, x: Tensor) -> Tensor:
        sides: list[int] = []
        for size in x.shape[2:]:
            steps = (size - 1) // self.stride
            lacking = max(steps * self.stride + (self.kernel_size - 1) * self.dilation + 1 - size, 0)
            sides += [lacking // 2, lacking - lacking // 2]
        return F.pad(x, sides)


@dataclass(frozen=True, eq=False)
class _Chain:
    """What layers make of x, one after the other. called: the children that these are, or are in."""

    leaves: tuple[Leaf, ...] = ()
    called: tuple[nn.Module, ...] = ()


@dataclass(frozen=True, eq=False)
class _Sum:
    """Two chains added, and the activation behind, or None."""

    first: _Chain
    second: _Chain
    inplace: bool
    act: Leaf | None = None


@dataclass(frozen=True)
class Unit(Tail):
    """A tail that was read: its layers are these, not children by name.

    layers: before the gate; gate_at_end, act_at_end: or None
    summed: whether there is a shortcut; way: what that calls
    """

    layers: tuple[Leaf, ...] = ()
    gate_at_end: Leaf | None = None
    act_at_end: Leaf | None = None
    way: tuple[nn.Module, ...] = ()
    summed: bool = True

    def leaves(self, module: nn.Module) -> list[Leaf]:
        """The layers before the gate at the end."""
        return list(self.layers)

    def last(self, module: nn.Module) -> nn.Module | None:
        """The gate at the end, or None."""
        return None if self.gate_at_end is None else self.gate_at_end.module

    def ends(self, module: nn.Module) -> nn.Module | None:
        """The activation at the end, or None."""
        return None if self.act_at_end is None else self.act_at_end.module

    def skips(self, module: nn.Module) -> bool:
        """Whether there is a shortcut."""
        return self.summed

    def more(self, module: nn.Module) -> list[Leaf]:
        """The gate and the activation."""
        return [leaf for leaf in (self.gate_at_end, self.act_at_end) if leaf is not None]

    def shortcut(self, module: Any, x: Tensor) -> Tensor | None:
        """The shortcut of x."""
        for called in self.way:
            x = called(x)
        return x


class _UnitPlan(TailPlan):
    """What a unit's rewritten forward relies on; also the attributes that its own branches on.

    fixed: those, each with its owner's dictionary
    """

    __slots__ = ()

    def __init__(self, module: nn.Module, unit: Unit, fixed: Sequence[Fixed]) -> None:
        super().__init__(module, unit)
        for its, name, value in fixed:
            if its is vars(module):
                self.own += ((name, value),)
            else:
                self.fixed += ((its, name, value),)


@dataclass
class _Reading:
    """One module's forward, followed. calls: layers that were called, in order."""

    module: nn.Module
    name: str
    depth: int
    fixed: list[Fixed] = field(default_factory=list)
    calls: list[Leaf] = field(default_factory=list)
    names: dict[str, Any] = field(default_factory=dict)

    def run(self) -> Any:
        """What forward returns."""
        function = author(type(self.module)).forward
        self.globals = function.__globals__
        definition = _definition(function)
        if definition is None:
            raise _Unread
        self.me, given = (arg.arg for arg in definition.args.args)
        self.names = {given: _Chain()}
        found = self.block(definition.body)
        if found is None:
            raise _Unread
        return found

    def block(self, statements: list[ast.stmt]) -> Any:
        """What these statements return, or None where they go on."""
        for statement in statements:
            if isinstance(statement, ast.Return) and statement.value is not None:
                return self.value(statement.value)
            if isinstance(statement, ast.If):
                found = self.block(statement.body if self.settled(statement.test) else statement.orelse)
                if found is not None:
                    return found
            elif isinstance(statement, ast.Assign):
                if len(statement.targets) != 1 or not isinstance(statement.targets[0], ast.Name):
                    raise _Unread
                self.names[statement.targets[0].id] = self.value(statement.value)
            elif isinstance(statement, ast.AugAssign):
                self.add_to(statement)
            elif not (isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)):
                raise _Unread
        return None

    def add_to(self, statement: ast.AugAssign) -> None:
        """v += w: v must be the branch, and nobody else's."""
        if not (isinstance(statement.op, ast.Add) and isinstance(statement.target, ast.Name)):
            raise _Unread
        name = statement.target.id
        first, second = self.names.get(name), self.value(statement.value)
        if not isinstance(first, _Chain) or sum(value is first for value in self.names.values()) != 1:
            raise _Unread
        self.names[name] = self.sum(first, second, True)

    def sum(self, first: Any, second: Any, inplace: bool = False) -> _Sum:
        if not (isinstance(first, _Chain) and isinstance(second, _Chain)):
            raise _Unread
        if not inplace and len(first.leaves) < len(second.leaves):
            first, second = second, first
        if any(a is b for a in first.leaves for b in second.leaves):
            raise _Unread
        return _Sum(first, second, inplace)

    def value(self, node: ast.expr) -> Any:
        """A chain or a sum."""
        if isinstance(node, ast.Name) and node.id in self.names:
            return self.names[node.id]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return self.sum(self.value(node.left), self.value(node.right))
        if not isinstance(node, ast.Call):
            raise _Unread
        if isinstance(node.func, ast.Attribute) and self.root(node.func) == self.me:
            if len(node.args) != 1 or node.keywords:
                raise _Unread
            value = self.value(node.args[0])
            name, child = self.child(node.func)
            if not isinstance(child, nn.Module):
                raise _Unread
            return self.apply(value, child, self.expanded(name, child))
        which = self.outer(node.func)
        if which is torch.add and len(node.args) == 2 and not node.keywords:
            return self.sum(self.value(node.args[0]), self.value(node.args[1]))
        if which is F.pad and len(node.args) == 1 and len(node.keywords) == 1 and node.keywords[0].arg == "pad":
            made = self.padding(node.keywords[0].value, node.args[0])
        elif len(node.args) == 1 and which in _FUNCTIONS:
            made = self.made(_FUNCTIONS[which], node.keywords)
        elif len(node.args) == 1 and not node.keywords and isinstance(node.func, ast.Call) and not node.func.args:
            which = self.outer(node.func.func)
            if which not in _MADE:
                raise _Unread
            made = self.made(which, node.func.keywords)
        else:
            raise _Unread
        return self.apply(self.value(node.args[0]), made, [Leaf(type(made).__name__.lower(), made)])

    def made(self, cls: type[nn.Module], keywords: list[ast.keyword]) -> nn.Module:
        """The layer that a function stands for."""
        given = {}
        for keyword in keywords:
            if keyword.arg is None or not isinstance(keyword.value, ast.Constant):
                raise _Unread
            given[keyword.arg] = keyword.value.value
        if set(given) - {"inplace", "negative_slope"} or ("inplace" in given and cls is nn.GELU):
            raise _Unread
        return cls(**given)

    def padding(self, node: ast.expr, of: ast.expr) -> nn.Module:
        """The layer that `F.pad(x, pad=calc_tf_padding(x, …))` is."""
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and isinstance(of, ast.Name)):
            raise _Unread
        same = len(node.args) == 1 and isinstance(node.args[0], ast.Name) and node.args[0].id == of.id
        if not same or fingerprint(self.globals.get(node.func.id)) != _TF_PADDING:
            raise _Unread
        given: dict[str, Any] = {str(keyword.arg): self.plain(keyword.value) for keyword in node.keywords}
        if not all(type(value) is int for value in given.values()):
            raise _Unread
        return _Padding(**given)

    def apply(self, value: Any, called: nn.Module, leaves: list[Leaf]) -> Any:
        """Layers called on a value."""
        self.calls += leaves
        if isinstance(value, _Chain):
            return _Chain((*value.leaves, *leaves), (*value.called, called))
        if isinstance(value, _Sum) and value.act is None and len(leaves) == 1:
            return _Sum(value.first, value.second, value.inplace, leaves[0])
        raise _Unread

    def root(self, node: ast.expr) -> str | None:
        while isinstance(node, ast.Attribute):
            node = node.value
        return node.id if isinstance(node, ast.Name) else None

    def outer(self, node: ast.expr) -> Any:
        """What a dotted name of the file means; None where it isn't torch's."""
        steps = []
        while isinstance(node, ast.Attribute):
            steps.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name) or node.id in self.names or node.id == self.me:
            return None
        found: Any = self.globals.get(node.id)
        for step in reversed(steps):
            found = getattr(found, step, None)
        return found if getattr(found, "__hash__", None) is not None else None

    def child(self, node: ast.Attribute) -> tuple[str, Any]:
        """Name and value of self.a.b: a module, or None for one that isn't there."""
        steps: list[str] = []
        within: ast.expr = node
        while isinstance(within, ast.Attribute):
            steps.insert(0, within.attr)
            within = within.value
        found: Any = self.module
        for step in steps:
            if not isinstance(found, nn.Module) or hasattr(author(type(found)), step):
                raise _Unread
            own = vars(found)
            if step in own["_modules"]:
                found = own["_modules"][step]
            elif step in own and step != "training" and found is self.module and len(steps) == 1:
                found = own[step]
                self.fixed.append((own, step, found))
            else:
                raise _Unread
        return ".".join(([self.name] if self.name else []) + steps), found

    def expanded(self, name: str, child: nn.Module) -> list[Leaf]:
        if by_plan(child):
            return [Leaf(name, child)]
        found: list[Leaf] = []
        for leaf in inside(name, child):
            unit = _adds(author(type(leaf.module)).forward)
            if self.depth and not unit and not by_plan(leaf.module) and tampered(leaf.module) is None:
                within = _read(leaf.module, leaf.name, self.depth - 1)
                if within is not None and isinstance(within[0], _Chain) and within[0].leaves:
                    found += within[0].leaves
                    self.fixed += within[1]
                    continue
            found.append(leaf)
        return found

    def settled(self, test: ast.expr) -> bool:
        """What a test on the module's attributes comes to."""
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            return not self.settled(test.operand)
        if isinstance(test, ast.BoolOp):
            found = (self.settled(part) for part in test.values)
            return all(found) if isinstance(test.op, ast.And) else any(found)
        if isinstance(test, ast.Compare) and len(test.ops) == 1:
            a, b = self.plain(test.left), self.plain(test.comparators[0])
            op = type(test.ops[0])
            if op in (ast.Is, ast.IsNot) and (a is None or b is None):
                return (a is b) == (op is ast.Is)
            compare: Callable[[Any, Any], bool] | None = _COMPARED.get(op)
            if compare is None or not all(isinstance(side, (bool, int, float, str)) for side in (a, b)):
                raise _Unread
            return compare(a, b)
        found = self.plain(test)
        if not (found is None or isinstance(found, (bool, int, float, str))):
            raise _Unread
        return bool(found)

    def plain(self, node: ast.expr) -> Any:
        """A constant, a plain attribute of the module, or a child."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Attribute) and self.root(node) == self.me:
            return self.child(node)[1]
        raise _Unread


_COMPARED: dict[type, Callable[[Any, Any], bool]] = {
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Gt: lambda a, b: a > b,
    ast.Lt: lambda a, b: a < b,
    ast.GtE: lambda a, b: a >= b,
    ast.LtE: lambda a, b: a <= b,
}


@functools.cache
def _definition(function: Any) -> ast.FunctionDef | None:
    """The source of a forward of self and x alone, or None."""
    found = parsed(function) if isinstance(function, FunctionType) and not hasattr(function, "__wrapped__") else None
    body = None if found is None else found.body[0]
    if not isinstance(body, ast.FunctionDef) or body.decorator_list or function.__closure__:
        return None
    given = body.args
    if given.vararg or given.kwarg or given.kwonlyargs or given.posonlyargs or len(given.args) != 2 or given.defaults:
        return None
    return body


@functools.cache
def _adds(function: Any) -> bool:
    body = _definition(function)
    return body is not None and any(isinstance(node, ast.Add) or _is_add(node) for node in ast.walk(body))


def _is_add(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "add"


def _read(module: nn.Module, name: str = "", depth: int = _DEPTH) -> tuple[Any, list[Fixed]] | None:
    """What a module's forward makes of its input, and the attributes that decide it; None where it can't be read."""
    cls = author(type(module))
    if cls.__module__.startswith(("torch.", "fused_attn.")) or "forward" in vars(module):
        return None
    if cls.__call__ is not nn.Module.__call__:
        return None
    reading = _Reading(module, name, depth)
    try:
        found = reading.run()
    except (_Unread, ValueError):
        return None
    used = [*found.leaves] if isinstance(found, _Chain) else [*found.first.leaves, *found.second.leaves]
    if isinstance(found, _Sum) and found.act is not None:
        used.append(found.act)
    if {id(leaf) for leaf in reading.calls} != {id(leaf) for leaf in used}:  # one was called without use
        return None
    return found, reading.fixed


def _pure(leaf: Leaf) -> bool:
    cls = type(leaf.module)
    if cls is _Padding:
        return True
    if path(cls) in _KNOWN_PURE:
        return fingerprint(cls.forward) == _KNOWN_PURE[path(cls)]
    return all(path(type(m)) in _PURE for m in leaf.module.modules())


def read(module: nn.Module) -> tuple[Unit, list[Fixed]] | None:
    """The unit that a module is, and the attributes that decide it; or None."""
    within = _read(module)
    if within is None:
        return None
    found, fixed = within
    skips = isinstance(found, _Sum)
    if isinstance(found, _Chain):
        if not any(by_plan(leaf.module) for leaf in found.leaves):
            return None
        found = _Sum(found, _Chain(), False)
    branch = [leaf for leaf in found.first.leaves if path(type(leaf.module)) != IDLE or tampered(leaf.module)]
    way = found.second.leaves
    if not branch or not all(_pure(side[0]) or by_plan(side[0].module) for side in (branch, way) if side):
        return None
    if not all(_pure(leaf) or path(type(leaf.module)) in ACTIVATIONS for leaf in way):
        return None
    if found.act is not None and path(type(found.act.module)) not in ACTIVATIONS:
        return None
    layers, gate = found.first.leaves, None
    if by_plan(branch[-1].module):
        layers, gate = tuple(leaf for leaf in layers if leaf is not branch[-1]), branch[-1]
    if gate is None and all(normed.read(leaf.module) is None for leaf in layers):
        return None
    unit = Unit(
        (), None if gate is None else gate.name, None if found.act is None else found.act.name,
        inplace=found.inplace, layers=layers, gate_at_end=gate, act_at_end=found.act, way=found.second.called,
        summed=skips,
    )  # fmt: skip
    return unit, fixed


class _Reader:
    """The tail of a rule for units: what they are is read off each."""

    def gates(self, module: nn.Module) -> list[nn.Module]:
        """The gates of a unit."""
        found = read(module)
        if found is None:
            return []
        last = found[0].last(module)
        return [leaf.module for leaf in found[0].layers if by_plan(leaf.module)] + ([] if last is None else [last])

    def last(self, module: nn.Module) -> nn.Module | None:
        """The gate at the end of a unit, or None."""
        found = read(module)
        return None if found is None else found[0].last(module)


def _plan(module: nn.Module) -> TailPlan:
    found = read(module)
    if found is None:
        raise Refused("its forward isn't a chain of layers and a shortcut")
    return _UnitPlan(module, *found)


@functools.cache
def _rule(cls: Any) -> Rule:
    base = next(base for base in cls.__mro__ if "forward" in vars(base))
    return Rule(path(base), forward, _plan, {"forward": (fingerprint(cls.forward),)}, _Reader())


def by_source(cls: type, module: nn.Module | None) -> Rule | None:
    """The rule for a class whose forward has a sum, where the module is a unit."""
    if not issubclass(cls, nn.Module) or issubclass(cls, Fused):
        return None
    if cls.__module__.startswith(("torch.", "fused_attn.")) or not _adds(cls.forward):
        return None
    found: Any = cls  # mypy takes Module's __hash__ for an instance's
    return _rule(found) if module is None or read(module) is not None else None


PARENTS.append(by_source)
