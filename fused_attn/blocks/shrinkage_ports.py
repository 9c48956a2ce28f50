"""Shrinkage modules of ports of deep residual shrinkage networks, which no library publishes under one name.

A class is looked at where it is called Shrinkage, RSBU_CW or RSBU_CS and its module keeps a network fc or FC of Linear,
BatchNorm, ReLU, Linear, Sigmoid. Ports differ in what is pooled (|x| or x) and in what α is multiplied by, under the
same names; so names decide nothing. It is fused where both hold:

    * its forward is straight-line code without numbers: no branch or loop that a trial could miss, no constant (a
      clamp's bound, say) that matters for some inputs only, no function but torch's, and of self nothing but child
      modules is read;
    * in float64, outputs, gradients and running statistics agree with one of the forms that a plan has, in training and
      in evaluation, on random inputs of three magnitudes, which are left as they were.

Trials see no tie |x| = τ and nothing infinite; there relu(|x| − τ) is what runs, as `blocks.shrinkage` says.
"""

import ast
import copy
import functools
import inspect
import textwrap
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..plan import KEY, READERS, Plan, Refused, Rule, fingerprint, path, ready
from .shrinkage import FACTORS, ShrinkagePlan

_NAMES = ("shrinkage", "rsbu_cw", "rsbu_cs")
_SIDES = {f"torch.nn.modules.pooling.AdaptiveAvgPool{d}d": (7, 5, 3)[:d] for d in (1, 2, 3)}
_IDLE = ("torch.nn.modules.flatten.Flatten",)
_BRANCHES = (
    ast.If, ast.IfExp, ast.For, ast.While, ast.Try, ast.With, ast.Match, ast.BoolOp, ast.Compare, ast.Lambda,
    ast.FunctionDef, ast.ListComp, ast.GeneratorExp, ast.DictComp, ast.SetComp, ast.Assert, ast.Raise, ast.Global,
    ast.Nonlocal, ast.NamedExpr, ast.Yield, ast.Await,
)  # fmt: skip
_TOLERANCE = 1e-9  # float64 rounding, through a batch norm of three descriptors


def _harmless(value: Any) -> bool:
    return value is None or isinstance(value, (bool, str)) or (isinstance(value, int) and abs(value) <= 4)


def _of_torch(value: Any) -> bool:
    return isinstance(value, ModuleType) and value.__name__.partition(".")[0] == "torch"


def _straight(function: Any, children: set[str]) -> None:
    """Raises Refused for a forward that a trial can't vouch for."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        raise Refused("its forward has no source to look at") from None
    body = tree.body[0]
    if not isinstance(body, ast.FunctionDef) or body.decorator_list or len(body.args.args) != 2:
        raise Refused("its forward isn't a plain function of x")
    me, known = body.args.args[0].arg, function.__code__.co_varnames
    for node in (n for statement in body.body for n in ast.walk(statement)):
        if isinstance(node, _BRANCHES):
            raise Refused(f"its forward has a {type(node).__name__} in line {node.lineno}")
        # Dimensions are small integers; a float, or a larger number, is a bound or a scale.
        if isinstance(node, ast.Constant) and not _harmless(node.value):
            raise Refused(f"its forward has the number {node.value!r}")
        if isinstance(node, ast.Name) and node.id not in known and not _of_torch(function.__globals__.get(node.id)):
            raise Refused(f"its forward uses {node.id}, which isn't torch's")
        if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == me):
            continue
        if node.attr not in children:
            raise Refused(f"its forward reads self.{node.attr}")


def _run(module: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """Output, gradients and buffers of one step."""
    leaf = x.clone().requires_grad_()
    given = leaf.clone()
    y = forward(given)
    if not torch.equal(given, x):
        raise Refused("its forward changes its input")
    if not isinstance(y, Tensor) or y.shape != x.shape:
        raise Refused(f"its forward turns {tuple(x.shape)} into {tuple(getattr(y, 'shape', ()))}")
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    grads = torch.autograd.grad(y, [leaf, *module.parameters()], dy, allow_unused=True)
    if any(g is None for g in grads):
        raise Refused("its forward leaves parameters unused")
    return [y.detach(), *grads, *(b.detach().to(y.dtype).clone() for b in module.buffers())]


def _agree(module: nn.Module, plan: Callable[[nn.Module], Plan], channels: int, sides: tuple[int, ...]) -> bool:
    """Whether a plan does what the module's own forward does."""
    generator = torch.Generator().manual_seed(0)
    for training in (True, False):
        for magnitude in (1.0, 1e-3, 1e3):
            x = torch.randn((3, channels, *sides), generator=generator, dtype=torch.float64) * magnitude
            x += 0.3 * magnitude  # a mean that isn't 0: x and |x| have different ones anyway
            theirs, ours = (copy.deepcopy(module).double().train(training) for _ in range(2))
            want = _run(theirs, lambda t: type(theirs).forward(theirs, t), x)  # noqa: B023
            got = _run(ours, lambda t: plan(ours).run(t, None, "identity", 0.01), x)  # noqa: B023
            # A gradient that is 0 but for rounding (the bias before a batch norm) is measured by the largest one.
            floor = 1e-3 * max(float(t.norm()) for t in want)
            for a, b in zip(got, want, strict=True):
                if not float((a - b).norm()) <= _TOLERANCE * max(float(b.norm()), floor):
                    return False
    return True


def _original(module: nn.Module) -> nn.Module:
    """A copy of the module, of the class that it had before it was fused: for trials."""
    cls = getattr(type(module), "original", type(module))
    twin: nn.Module = cls.__new__(cls)
    twin.__dict__.update(copy.deepcopy({name: value for name, value in vars(module).items() if name != KEY}))
    return twin


class PortPlan(ShrinkagePlan):
    """A port's: maps of one number of dimensions alone are what its pooling takes."""

    __slots__ = ("rank",)
    rank: int


def _plan(module: nn.Module) -> Plan:
    """The one of the forms that agrees with the module's forward. Raises Refused where none does."""
    children: dict[str, Any] = vars(module)["_modules"]
    fc = next((name for name in ("fc", "FC") if name in children), None)
    pools = [name for name, child in children.items() if path(type(child)) in _SIDES]
    if fc is None or len(pools) != 1:
        raise Refused("it doesn't consist of one adaptive average pooling and a network fc")
    others = [n for n, m in children.items() if n not in (fc, *pools) and path(type(m)) not in _IDLE]
    if others:
        raise Refused(f"it has further layers, {', '.join(others)}: the unit around a shrinkage isn't fused")
    skipped = tuple(name for name in children if name != fc)
    draft = lambda m, factor, pool: PortPlan(m, fc, factor, pool, skipped)
    plan = draft(module, FACTORS[0], "mean_abs")
    pooling = children[pools[0]]
    sides = _SIDES[path(type(pooling))]
    channels = plan.first["weight"].shape[1]
    twin = _original(module)
    _straight(type(twin).forward, set(children))
    try:
        for pool in ("mean_abs", "mean"):
            for factor in FACTORS:
                if _agree(twin, functools.partial(draft, factor=factor, pool=pool), channels, sides):
                    plan.factor, plan.pool, plan.rank = factor, pool, len(sides) + 2
                    plan.fix(pooling, "output_size")
                    return plan
    except (RuntimeError, TypeError, ValueError) as error:
        raise Refused(f"its forward fails on a trial input: {str(error).splitlines()[0]}") from None
    raise Refused("its forward agrees with none of the forms of shrinkage that are known")


def _forward(self: Any, x: Tensor) -> Tensor:
    """What a port's forward becomes; another number of dimensions is left to its own."""
    plan: PortPlan | None = ready(self)  # type: ignore[assignment]
    if plan is None or (isinstance(x, Tensor) and x.dim() != plan.rank):
        return self.original.forward(self, x)
    return plan.run(x, None, "identity", 0.01)


@functools.cache
def _rule(cls: type[nn.Module]) -> Rule:
    return Rule(path(cls), _forward, _plan, {"forward": (fingerprint(cls.forward),)})


def by_name(cls: type, module: nn.Module | None) -> Rule | None:
    """The rule for a class of one of the names, which its plan may still refuse."""
    if cls.__name__.lower() not in _NAMES or not issubclass(cls, nn.Module) or cls.__module__.startswith("fused_attn."):
        return None
    return _rule(cls)  # type: ignore[arg-type]  # mypy takes Module's __hash__ for an instance's


READERS.insert(0, by_name)  # before who would read it as squeeze-and-excitation, and refuse
