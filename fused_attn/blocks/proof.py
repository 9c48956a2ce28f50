"""A proof, at fuse time, that a module of somebody else's does what a plan does: its source is read, then both are run.

Classes that no library publishes have one name and many forwards; so a name decides nothing. A trial on random numbers
vouches for a forward only if there is nothing that a trial could miss. So both are asked for:

    straight    the source has no branch or loop that depends on numbers, no constant that matters for some inputs only,
                and calls only torch, child modules, and functions of which the same holds
    agree       in float64, outputs, gradients and running statistics are the plan's, in training and in evaluation, on
                inputs of several magnitudes and sizes

Of a module, source may read what is then compared on every call: its children, its parameters, and small plain
attributes, on which it may branch.
"""

import ast
import copy
import functools
import inspect
import itertools
import textwrap
from collections.abc import Callable, Iterable
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..backend import unobserved, use_backend
from ..plan import KEY, Plan, Refused, author, path

_BRANCHES = (
    ast.If, ast.IfExp, ast.For, ast.While, ast.Try, ast.With, ast.Match, ast.BoolOp, ast.Compare, ast.Lambda,
    ast.FunctionDef, ast.ListComp, ast.GeneratorExp, ast.DictComp, ast.SetComp, ast.Assert, ast.Raise, ast.Global,
    ast.Nonlocal, ast.NamedExpr, ast.Yield, ast.Await,
)  # fmt: skip
_EQUALITIES = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)
# What makes a difference for what isn't finite, in another dtype or on another device, or to somebody else, only.
_UNSEEN = frozenset(
    ("nan_to_num", "nan_to_num_", "nansum", "nanmean", "nanmedian", "isnan", "isinf", "isfinite", "double", "float64",
     "cpu", "cuda", "register_hook", "retain_grad", "is_grad_enabled", "is_autocast_enabled")
)  # fmt: skip
_TOLERANCE = 1e-9  # float64 rounding, through a batch norm of three descriptors
# Layers that do the same on every call, in training and in evaluation but for running statistics.
LAYERS = frozenset(
    f"torch.nn.modules.{name}"
    for name in (
        "activation.ReLU", "activation.Sigmoid", "batchnorm.BatchNorm1d", "batchnorm.BatchNorm2d",
        "container.Sequential", "conv.Conv1d", "conv.Conv2d", "flatten.Flatten", "linear.Identity", "linear.Linear",
        "normalization.GroupNorm", "pooling.AdaptiveAvgPool2d", "pooling.AdaptiveMaxPool2d",
    )
)  # fmt: skip
FAILURES = (RuntimeError, TypeError, ValueError, NameError, AttributeError, IndexError)


def _harmless(value: Any) -> bool:
    return value is None or isinstance(value, (bool, str)) or (isinstance(value, int) and abs(value) <= 4)


def _of_torch(value: Any) -> bool:
    return isinstance(value, ModuleType) and value.__name__.partition(".")[0] == "torch"


def _plain(value: Any) -> bool:
    """Whether an attribute may be read: a size or a choice, not a bound."""
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (bool, int, str))


@functools.cache
def parsed(function: Any) -> ast.Module | None:
    """A function's source, or None where there is none."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None


def methods(cls: type, name: str = "forward") -> dict[str, Callable[..., Any]]:
    """The method, and those of the same class that its source names as self's."""
    found: dict[str, Callable[..., Any]] = {}
    left = [name]
    while left:
        name = left.pop()
        method = getattr(cls, name)
        found[name] = method
        tree = parsed(method)
        if tree is None:
            continue
        read = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        left += sorted(n for n in read - set(found) if inspect.isfunction(getattr(cls, n, None)) and n in vars(cls))
    return found


class _Reading(ast.NodeVisitor):
    """One function's source. module: whose method it is, or None; deep: whether plain attributes may be read, and
    methods and functions of the same file be called; added: floats that may be added to something."""

    def __init__(self, function: Any, module: nn.Module | None, deep: bool, added: tuple[float, ...]) -> None:
        tree = parsed(function)
        if tree is None:
            raise Refused("its forward has no source to look at")
        body = tree.body[0]
        plain = isinstance(body, ast.FunctionDef) and isinstance(function, FunctionType)
        decorators = [getattr(d, "id", "") for d in body.decorator_list] if isinstance(body, ast.FunctionDef) else []
        bound = module is not None
        if not plain or (decorators and (bound or decorators != ["staticmethod"])):
            raise Refused("its forward isn't a plain function of x")
        assert isinstance(body, ast.FunctionDef)
        given = body.args
        if given.vararg or given.kwarg or given.kwonlyargs or given.defaults or (bound and not given.args):
            raise Refused("its forward isn't a plain function of x")
        self.function, self.module, self.deep, self.added = function, module, deep, added
        self.me = given.args[0].arg if bound else None
        self.local = set(function.__code__.co_varnames)
        self.loops: set[str] = set()
        self.attributes: set[str] = set()
        self.calls: list[tuple[Any, nn.Module | None]] = []
        for statement in body.body:
            self.visit(statement)

    def visit(self, node: ast.AST) -> None:
        if isinstance(node, (ast.If, ast.IfExp)) and self.deep:
            self.settled(node.test, node)
            for child in (*_listed(node.body), *_listed(node.orelse)):
                self.visit(child)
        elif isinstance(node, ast.For) and self.deep and isinstance(node.target, ast.Name):
            self.settled(node.iter, node)
            self.loops.add(node.target.id)
            for child in (*node.body, *node.orelse):
                self.visit(child)
        elif isinstance(node, _BRANCHES):
            raise Refused(f"its forward has a {type(node).__name__} in line {node.lineno}")
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            for side in (node.left, node.right):
                if not (isinstance(side, ast.Constant) and type(side.value) is float and side.value in self.added):
                    self.visit(side)
        # Dimensions are small integers; a float, or a larger number, is a bound or a scale.
        elif isinstance(node, ast.Constant) and not _harmless(node.value):
            raise Refused(f"its forward has the number {node.value!r}")
        elif isinstance(node, ast.Attribute) and node.attr in _UNSEEN:
            raise Refused(f"its forward has {node.attr} in line {node.lineno}, which trials don't see")
        elif isinstance(node, ast.Attribute) and self.mine(node):
            if not isinstance(node.ctx, ast.Load):
                raise Refused(f"its forward sets self.{node.attr}")
            self.read(node.attr)
        elif isinstance(node, ast.Name) and node.id not in self.local:
            self.named(node.id)
        else:
            self.generic_visit(node)

    def mine(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == self.me

    def read(self, name: str) -> None:
        """self.name"""
        assert self.module is not None
        own: dict[str, Any] = vars(self.module)
        if name in own["_modules"]:
            return
        if self.deep:
            if name in own["_parameters"]:
                return
            if name in own and name != "training" and _plain(own[name]):
                self.attributes.add(name)
                return
            cls = author(type(self.module))
            if name not in own and name in vars(cls):
                method = getattr(cls, name)
                if inspect.isfunction(method):
                    static = isinstance(vars(cls)[name], staticmethod)
                    self.calls.append((method, None if static else self.module))
                    return
            # Not there: a branch that isn't taken, as long as the attribute holds that decides; else a trial fails.
            if name not in own and name not in own["_buffers"] and not hasattr(cls, name):
                return
        raise Refused(f"its forward reads self.{name}")

    def named(self, name: str) -> None:
        """A name from outside of the function."""
        value = self.function.__globals__.get(name)
        if _of_torch(value):
            return
        if self.deep and isinstance(value, FunctionType) and value.__module__ == self.function.__module__:
            self.calls.append((value, None))
            return
        raise Refused(f"its forward uses {name}, which isn't torch's")

    def settled(self, test: ast.AST, where: Any) -> None:
        """Raises Refused where something else than plain attributes, and which variables are set, decides."""
        none = lambda node: isinstance(node, ast.Constant) and node.value is None
        parts: Iterable[ast.AST] = ()
        if isinstance(test, ast.Compare) and all(isinstance(op, _EQUALITIES) for op in test.ops):
            identity = isinstance(test.ops[0], (ast.Is, ast.IsNot)) and none(test.comparators[0])
            if identity and isinstance(test.left, ast.Name) and test.left.id in self.local:
                return
            parts = (test.left, *test.comparators)
        elif isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            parts = (test.operand,)
        elif isinstance(test, ast.BoolOp):
            parts = test.values
        elif isinstance(test, (ast.Tuple, ast.List)):
            parts = test.elts
        elif self.mine(test):
            assert isinstance(test, ast.Attribute)
            self.read(test.attr)
        elif not ((isinstance(test, ast.Constant) and _harmless(test.value))
                  or (isinstance(test, ast.Name) and test.id in self.loops)):  # fmt: skip
            raise Refused(f"its forward has a {type(where).__name__} in line {where.lineno}, on what isn't settled")
        for part in parts:
            self.settled(part, where)


def _listed(part: Any) -> list[ast.AST]:
    return part if isinstance(part, list) else [part]


def straight(
    function: Any, module: nn.Module, deep: bool = False, added: tuple[float, ...] = ()
) -> dict[nn.Module, set[str]]:
    """Raises Refused for a forward that a trial can't vouch for. Returns the plain attributes that it reads, by module.

    deep: read children's forwards, too, methods, functions of the same file, and branches on plain attributes
    added: floats that may be added to something
    """
    read: dict[nn.Module, set[str]] = {}
    seen: set[tuple[Any, nn.Module | None]] = set()
    left: list[tuple[Any, nn.Module | None]] = [(function, module)]
    if deep:
        for name, child in module.named_modules():
            if child is not module and path(type(child)) not in LAYERS:
                if type(child).__module__.startswith("torch."):
                    raise Refused(f"{name} is a {path(type(child))}")
                if type(child).__call__ is not nn.Module.__call__:
                    raise Refused(f"{name} has a __call__ of its own")
                left.append((type(child).forward, child))
    while left:
        which = left.pop()
        if which in seen:
            continue
        seen.add(which)
        source = _Reading(*which, deep, added)
        if which[1] is not None:
            read.setdefault(which[1], set()).update(source.attributes)
        left += source.calls
    return read


def original(module: nn.Module) -> nn.Module:
    """A copy of the module, of the class that it had before it was fused: for trials."""
    cls = author(type(module))
    twin: nn.Module = cls.__new__(cls)
    twin.__dict__.update(copy.deepcopy({name: value for name, value in vars(module).items() if name != KEY}))
    return twin


def redrawn(module: nn.Module) -> nn.Module:
    """A module of the original class in float64 on the CPU, whose numbers all matter: weights that start at 0 hide what
    they weigh."""
    with torch.inference_mode(False), torch.no_grad():
        twin = original(module).double().to_empty(device="cpu").requires_grad_(True)
        draw = torch.Generator().manual_seed(3)
        for p in twin.parameters():
            fan = max(p[0].numel() if p.dim() > 1 else 1, 1)
            p.copy_(torch.randn(p.shape, generator=draw, dtype=p.dtype, device="cpu") * fan**-0.5 + 0.1)
        for b in twin.buffers():
            b.copy_(0.5 + torch.rand(b.shape, generator=draw, dtype=torch.float64, device="cpu"))
    return twin


def _step(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Output and gradients of one step, and parameters and buffers after it."""
    leaf = x.clone().requires_grad_()
    given = leaf.clone()
    y = forward(given)
    if not torch.equal(given, x):
        raise Refused("its forward changes its input")
    if not isinstance(y, Tensor) or y.shape != x.shape:
        raise Refused(f"its forward turns {tuple(x.shape)} into {tuple(getattr(y, 'shape', ()))}")
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype, device="cpu")
    grads = torch.autograd.grad(y, [leaf, *module.parameters()], dy, allow_unused=True)
    if any(g is None for g in grads):
        raise Refused("its forward leaves parameters unused")
    state = (*module.parameters(), *module.buffers())
    return [y.detach(), *grads, *(t.detach().to(y.dtype).clone() for t in state)]


def _inputs(channels: Iterable[int], sizes: Iterable[tuple[int, ...]], ties: bool) -> Iterable[Tensor]:
    generator = torch.Generator().manual_seed(0)
    for c, size in itertools.product(channels, sizes):
        for magnitude in (1.0, 1e-3, 1e3):
            x = torch.randn((3, c, *size), generator=generator, dtype=torch.float64, device="cpu") * magnitude
            yield x + 0.3 * magnitude  # a mean that isn't 0: x and |x| have different ones anyway
        if ties:
            yield torch.randn((3, c, *size), generator=generator, dtype=torch.float64, device="cpu").round().relu()


def agree(
    module: nn.Module,
    draft: Callable[[nn.Module], Plan],
    channels: Iterable[int],
    sizes: Iterable[tuple[int, ...]],
    run: Callable[[nn.Module, Plan, Tensor], Tensor] = lambda module, plan, x: plan.run(x, None, "identity", 0.01),
    ties: bool = False,
) -> bool:
    """Whether a plan does what the module's own forward does.

    channels, sizes: of the inputs, all combined; draft: module -> plan; run: how the plan runs
    ties: whether equal values are tried, too, for what picks one of several maxima
    """
    for training, x in itertools.product((True, False), list(_inputs(channels, sizes, ties))):
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            copies = (copy.deepcopy(module).to("cpu", torch.float64).requires_grad_(True) for _ in range(2))
            theirs, ours = (twin.train(training) for twin in copies)
            want = _step(theirs, lambda t: type(theirs).forward(theirs, t), x)  # noqa: B023
            with unobserved(), use_backend("eager"):
                got = _step(ours, lambda t: run(ours, draft(ours), t), x)  # noqa: B023
        # A gradient that is 0 but for rounding (the bias before a batch norm) is measured by the largest one.
        floor = 1e-3 * max(float(t.norm()) for t in want)
        for a, b in zip(got, want, strict=True):
            if not float((a - b).norm()) <= _TOLERANCE * max(float(b.norm()), floor):
                return False
    return True
