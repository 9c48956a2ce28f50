"""What a fused module may rely on: a plan read off its children once, and the check that tells when it no longer holds.

A fused module computes what its children describe without calling them, so whatever hangs on a child (a hook, a
parametrisation, another class, a `forward` of its own) would be lost. A `Plan` remembers each child it skips; `ready`
compares that on every call, by dictionary reads; where something changed, the module gets a new plan or runs unfused.

    module --ready--> plan: run(x, residual, epilogue, slope)        one op
                      None: the module's own forward                 and `explain` tells why

A `Rule` says which foreign class is understood and how its plan is read; `fused_class` makes the dynamic subclass that
its modules get. A module stays the object it was, so references, hooks, optimizers and `isinstance` checks hold.
"""

import functools
import hashlib
import inspect
import io
import textwrap
import tokenize
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter
from torch.nn.modules import module as _torch_module
from torch.utils.hooks import RemovableHandle

from .autograd import is_inference_compiled
from .backend import is_free

_PICKLING = ("__reduce__", "__reduce_ex__", "__getstate__", "__setstate__")
KEY = "_fused_attn_plan"  # where a module's __dict__ keeps its plan; never pickled, copied or part of the state_dict

# Hooks on every module of the process: they expect to see the children, too.
_GLOBAL_HOOKS = tuple(
    getattr(_torch_module, name)
    for name in (
        "_global_forward_hooks",
        "_global_forward_pre_hooks",
        "_global_backward_hooks",
        "_global_backward_pre_hooks",
    )
)
PLAIN = frozenset({Parameter, Tensor})
_EXACT = (torch.float32, torch.float64)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# explain listens here to what ran unfused, and why.
unfused_observers: list[Callable[[nn.Module, str], None]] = []


class Refused(Exception):
    """This module can't be fused, or not now; the message is the reason that reports print."""


def path(cls: type) -> str:
    """How rules name a class, so that no library is imported to recognise its modules."""
    return f"{cls.__module__}.{cls.__qualname__}"


class Plan:
    """What was read off a module and its children, and what to compare on each call.

    module: whose children are skipped; skipped: their names; fixed: names of its plain attributes that decide the maths
    Raises Refused where something hangs on a child already.
    """

    # Nothing in a plan refers to the module, which must be freed as soon as nobody else does.
    __slots__ = ("children", "cls", "fixed", "forwards", "handles", "methods", "own", "places", "skipped")

    # Whether `run` is the module's whole forward, and takes a residual and an epilogue: what a parent's tail needs.
    fits_tail: ClassVar[bool] = False
    closes: ClassVar[bool] = True  # whether its op adds the residual and applies the epilogue, in the same pass
    opens: ClassVar[bool] = False  # whether compilers, where nothing is differentiated, look into what `run` calls
    traces: ClassVar[bool] = True  # whether `run` takes what torch.fx puts in a tensor's place

    def __init__(self, module: nn.Module, skipped: Iterable[str], fixed: Iterable[str] = ()) -> None:
        modules = vars(module)["_modules"]
        named = [(name, modules[name]) for name in skipped if modules.get(name) is not None]
        self.cls = type(module)
        self.children = tuple(modules.values())
        self.skipped = tuple((child, type(child), vars(child)) for _, child in named)
        if (missing := next((name for name in fixed if name not in vars(module)), None)) is not None:
            raise Refused(f"has no attribute {missing}")
        self.own = tuple((name, vars(module)[name]) for name in fixed)
        self.forwards: tuple[tuple[type, Any], ...] = ()
        self.methods: tuple[tuple[type, str, Any], ...] = ()
        self.fixed: tuple[tuple[dict[str, Any], str, Any], ...] = ()
        self.places: tuple[tuple[dict[str, Any], bool], ...] = ()
        self.handles = RemovableHandle.next_id
        for name, child in named:
            if hasattr(self.cls, name):
                raise Refused(f"{name} is an attribute of {self.cls.__qualname__}, which stands before the child")
            if (why := tampered(child)) is not None:
                raise Refused(f"{name} {why}")

    def seal(self, module: nn.Module) -> None:
        """Remembers the methods that aren't called: forward of the children's classes, and what the module's rule read.
        Raises Refused where a child's class has another than its own."""
        # Of the class that the plan was read under: another thread may give the module its own one back meanwhile.
        classes = dict.fromkeys(author(cls) for _, cls, _ in self.skipped)
        for cls in classes:
            if cls.__call__ is not nn.Module.__call__:
                raise Refused(f"{cls.__qualname__} has a __call__ of its own")
            if not own_forward(cls):
                raise Refused(f"forward of {cls.__qualname__} isn't its own")
        mine = author(self.cls)
        if issubclass(self.cls, Fused):
            classes[mine] = None
            sources = self.cls.rule.sources
            self.methods = tuple((mine, name, getattr(mine, name)) for name in sources if name != "forward")
        self.forwards = tuple((cls, cls.forward) for cls in classes)

    def fix(self, child: nn.Module, name: str) -> Any:
        """The value of a child's plain attribute, which from now on is compared on each call."""
        if name not in vars(child):
            raise Refused(f"a {path(type(child))} has no attribute {name}")
        value = vars(child)[name]
        self.fixed += ((vars(child), name, value),)
        return value

    def weights(self, name: str, child: nn.Module, bias: bool = True) -> dict[str, Any]:
        """Where a child keeps `weight` and `bias`: read again on every call, because `.to`, `functional_call` and
        `load_state_dict(assign=True)` put other tensors there. Raises Refused for a weight that isn't a plain one.

        bias: whether there is a place for one, though it be None
        """
        attributes = vars(child)
        # FSDP's flat parameters and DataParallel's replicas hold weights as plain attributes.
        place: dict[str, Any] = attributes["_parameters"] if "weight" in attributes["_parameters"] else attributes
        weight = place.get("weight")
        if weight is None or (bias and "bias" not in place):
            raise Refused(f"{name} keeps no {'weight' if weight is None else 'bias'} where one is expected")
        if not usual(weight):
            sharded = ": call fuse_ before the model is sharded" if type(weight).__name__ == "DTensor" else ""
            raise Refused(f"{name}.weight is a {type(weight).__name__}{sharded}")
        self.places += ((place, bias),)
        return place

    def intact(self, attributes: dict[str, Any]) -> bool:
        """Whether the children are what they were, with nothing hanging on those that are skipped: on every call."""
        # Every registration of a hook, anywhere, takes a new number: as long as none was taken, no hook dictionary is
        # looked at. Traced code always looks, because it would be compiled again for each new number.
        if is_dynamo_compiling() or self.handles != RemovableHandle.next_id:
            for child, _, _ in self.skipped:
                if tampered(child) is not None:
                    return False
            if not is_dynamo_compiling():
                self.handles = RemovableHandle.next_id
        if tuple(attributes["_modules"].values()) != self.children:
            return False
        for child, cls, its in self.skipped:
            if type(child) is not cls or "forward" in its:
                return False
        for cls, forward in self.forwards:
            if cls.forward is not forward:
                return False
        for cls, name, method in self.methods:
            if getattr(cls, name) is not method:
                return False
        for place, bias in self.places:
            if type(place.get("weight")) not in PLAIN or (bias and "bias" not in place):
                return False
        for name, value in self.own:
            if attributes.get(name) != value:
                return False
        for its, name, value in self.fixed:  # noqa: SIM110  (a generator costs more than the loop)
            if its.get(name) != value:
                return False
        return True

    def run(self, x: Tensor, residual: Tensor | None, epilogue: str, epilogue_slope: float) -> Tensor:
        """The fused computation: gate, then residual and activation."""
        raise NotImplementedError

    def means(self) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]] | None:
        """The gate as a function of the means (N, C) of its input and of tensors, and those tensors; None where it
        depends on more."""
        return None

    def behind(self) -> Any:
        """How the gate runs at once with a BatchNorm before it, residual and activation behind it: `means`, or what
        else `blocks.normed.run` takes; None where it can't."""
        return self.means()

    def maps(self, x: Tensor) -> tuple[Tensor, ...] | None:
        """The maps that the gate weighs and merges, where a norm may stand behind it; None where it doesn't take x."""
        return None

    def weighed(self, maps: tuple[Tensor, ...]) -> Tensor:
        """What `run` makes of these maps."""
        raise NotImplementedError

    def weighs(self) -> tuple[Callable[..., Tensor], tuple[Tensor, ...], str]:
        """How it weighs its maps: the gates (N, C) as a function of the means (N, C) of what they are merged into, and
        of tensors; those tensors; and the merge."""
        raise NotImplementedError

    def covers(self, plan_of: Callable[[nn.Module], "Plan | None"]) -> str:
        """What it computes at once, in words. plan_of: the plan of a gate inside it."""
        return "gate"


def vars_of(child: nn.Module | None) -> dict[str, Any]:
    """The child's own dictionary: `Module.__getattr__` costs half a microsecond per weight, this a thirtieth of it."""
    return {} if child is None else vars(child)


def tampered(child: nn.Module | None) -> str | None:
    """What hangs on a child and would be lost if it weren't called, or None."""
    if child is None:
        return None
    attributes = vars(child)
    # Read as attributes where this is traced: so a compiler, as for its own calls, looks now and never again.
    hooks = (
        (child._forward_hooks, child._forward_pre_hooks, child._backward_hooks, child._backward_pre_hooks)
        if is_dynamo_compiling()
        else map(attributes.get, _HOOKS)
    )
    if any(hooks):
        return "has hooks"
    if any(_GLOBAL_HOOKS):
        return "is under a hook on all modules"
    if "forward" in attributes:
        return "has a forward of its own"
    if "parametrizations" in attributes["_modules"]:
        return "is parametrised"
    return None


def author(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that a fused module had before, or the module's own."""
    return cls.original if issubclass(cls, Fused) else cls


def own_forward(cls: type[nn.Module]) -> bool:
    """Whether the forward that a class has or inherits is the one in the source of a class, not put there later."""
    if cls.forward is nn.Module.forward:  # a container, which isn't called
        return True
    base = next(base for base in cls.__mro__ if "forward" in vars(base))
    method = vars(base)["forward"]
    where = f"{getattr(method, '__module__', '')}.{getattr(method, '__qualname__', '')}"
    return where == f"{path(base)}.forward" and not hasattr(method, "__wrapped__")


def usual(weight: Any) -> bool:
    """Whether an op may read a weight's numbers; not where a subclass gives them another meaning (quantised)."""
    if type(weight) in PLAIN or not isinstance(weight, Tensor):
        return not nn.parameter.is_lazy(weight)
    return type(weight).__module__.startswith("torch._subclasses")  # fake and functional tensors


def ready(module: nn.Module) -> Plan | None:
    """The module's plan, where it holds; a new one, where its children changed into something understood; or None."""
    attributes = module.__dict__
    plan: Plan | None = attributes.get(KEY)
    if plan is not None and type(module) is plan.cls and plan.intact(attributes):
        return plan
    if is_dynamo_compiling():  # a plan isn't made in traced code
        return None
    return renew(module)


def leaf(module: nn.Module, x: Any, *more: Any) -> Any:
    """One node that calls the module, where x stands for a tensor in a graph of torch.fx, and the module isn't all that
    is traced; else None. So its norms go on learning in the graph, and train and eval reach it."""
    if not isinstance(x, torch.fx.Proxy) or getattr(x.tracer, "root", None) is module:
        return None
    return x.tracer.create_proxy("call_module", x.tracer.path_of_module(module), (x, *more), {})  # type: ignore[attr-defined]


def left_to_compiler(x: Any, opaque: bool = False) -> bool:
    """Whether a module's own equations do as well as its plan: in a program compiled without gradients, where the
    plan's ops would be these equations too, and looking the plan over is what costs: each thing looked at is looked at
    again on every call.

    opaque: the plan's ops are such that no compiler looks into them. Then on a CPU alone, where whole networks were
        measured to be faster with the compiler's own code
    """
    return (
        is_inference_compiled()
        and is_free()
        and isinstance(x, Tensor)
        and (x.dtype in _EXACT or torch.is_autocast_enabled(x.device.type))  # half maps beside wide weights need the op
        and (x.is_cpu or not opaque)
    )


def renew(module: nn.Module) -> Plan | None:
    """Reads the plan off the module again. None, and observers hear why, where that is refused."""
    attributes = module.__dict__
    attributes.pop(KEY, None)
    cls = type(module)  # once: another thread may be fusing or unfusing it
    if not issubclass(cls, Planned):
        return None
    try:
        if (why := overridden(module, cls)) is not None:
            raise Refused(why)
        plan: Plan = cls.rule.plan(module) if issubclass(cls, Fused) else module._plan()  # type: ignore[operator]
        plan.seal(module)
    except Refused as why:
        unfused(module, str(why))
        return None
    plan.own += tuple((name, None) for name in equations(cls))
    attributes[KEY] = plan
    if not isinstance(module, Planned):
        attributes.pop(KEY, None)
    return plan


def equations(cls: type[Any]) -> tuple[str, ...]:
    """Names of the methods, besides forward, that a plan of class `cls` runs instead of."""
    if issubclass(cls, Fused):
        return tuple(name for name in cls.rule.sources if name != "forward")
    made = _planner(cls).__mro__
    names = [name for base in made[: made.index(Planned)] for name, value in vars(base).items() if callable(value)]
    return tuple(dict.fromkeys(n for n in names if n[0] != "_" and n != "by_plan" and not hasattr(nn.Module, n)))


def _planner(cls: type[Any]) -> type[Any]:
    """The class that says what a plan of `cls` computes."""
    return cls.original if issubclass(cls, Fused) else next(c for c in cls.__mro__ if "_plan" in vars(c))


def overridden(module: nn.Module, cls: type["Planned"]) -> str | None:
    """Which of these methods isn't the one that the plan was written for: a subclass has its own, or the module, whose
    class is `cls`."""
    planner = _planner(cls)
    for name in equations(cls):
        if name in vars(module):
            return f"has its own {name}"
        if getattr(cls, name) is not getattr(planner, name):
            return f"{cls.__qualname__} overrides {name} of {planner.__qualname__}"
    return cls.rule.refuses(cls.original) if issubclass(cls, Fused) else None


def run_original(module: nn.Module, plan: Plan | None, x: Any) -> Any:
    """The forward that a foreign module had, where its plan doesn't hold, or wasn't made for x: then observers hear
    so."""
    if plan is not None and isinstance(x, Tensor) and not is_dynamo_compiling():
        unfused(module, f"it is fused for maps of another kind than {tuple(x.shape)}")
    return author(type(module)).forward(module, x)


def unfused(module: nn.Module, why: str) -> None:
    """Tells observers that this call runs unfused."""
    for observer in unfused_observers:
        observer(module, why)


class Planned(nn.Module):
    """A module that runs by a plan: it makes one in `_plan`, and its copies make their own.

    by_plan: the forward that does what the plan does and nothing else; a subclass may have wrapped another around it
    """

    by_plan: ClassVar[Callable[..., Any]]
    ahead: ClassVar[bool] = False  # whether its plan has `maps`, which a norm behind it may be computed with

    def _plan(self) -> Plan:
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != KEY}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        renew(self)  # now, not on the first call, which may be traced

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script asks for first; its own complaint would be about a line of this file."""
        raise RuntimeError(
            f"torch.jit.script can't compile {path(type(self))}, which runs a fused op: "
            + ("call fused_attn.unfuse_(model) first, or " if isinstance(self, Fused) else "")
            + "use torch.jit.trace or torch.export, which can"
        )


# Attributes of the classes below.
OURS = ("rule", "original", "by_plan", "ahead")


class Fused(Planned):
    """Base of the dynamic classes: a module of a foreign class that runs by a plan."""

    rule: ClassVar["Rule"]
    original: ClassVar[type[nn.Module]]

    def _plan(self) -> Plan:
        return self.rule.plan(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.original, self.rule.path), self.__getstate__()


@dataclass(frozen=True, eq=False)
class Rule:
    """A foreign class that is understood.

    path: its module and name
    forward: what its `forward` becomes, (module, x) -> y
    plan: module -> Plan; raises Refused where an option isn't understood
    sources: names of the methods that make its forward, and the fingerprints of the versions that do what the plan does
    tail: None for a gate; for its parent, what stands between the gate and the end
    holds: module -> whether it has a gate, where only some modules of the class do
    ahead: whether the gate's plan has `maps`, which a norm behind it may be computed with
    alone: it is a part of other gates, which compute it; only one that stands by itself is converted
    """

    path: str
    forward: Callable[..., Any]
    plan: Callable[[nn.Module], Plan]
    sources: Mapping[str, Iterable[str]]
    tail: Any = None
    holds: Callable[[nn.Module], bool] | None = None
    ahead: bool = False
    alone: bool = False

    def refuses(self, cls: type) -> str | None:
        """Why modules of class `cls`, this rule's or a subclass, don't run the forward that the rule knows; or None."""
        if any(getattr(cls, name) is not getattr(nn.Module, name) for name in ("__getattr__", "__getattribute__")):
            return f"{cls.__qualname__} looks up attributes by itself"
        if any(getattr(cls, name, None) is not getattr(nn.Module, name, None) for name in _PICKLING):
            return f"{cls.__qualname__} is copied and pickled in a way of its own"
        if any("__init_subclass__" in vars(base) for base in cls.__mro__[:-1]):
            return f"{cls.__qualname__} has a say in its subclasses, of which a fused one would be one"
        for name, known in self.sources.items():
            method: Any = getattr(cls, name, None)
            where = f"{getattr(method, '__module__', '')}.{getattr(method, '__qualname__', '')}"
            if where != f"{self.path}.{name}":
                if path(cls) == self.path:
                    return f"{name} of {cls.__qualname__} isn't its own"
                return f"{cls.__qualname__} overrides {name} of {self.path.rpartition('.')[2]}"
            if hasattr(method, "__wrapped__"):
                return f"{name} of {cls.__qualname__} is wrapped"
            if fingerprint(method) not in known:
                return f"{name} of this version's {self.path} isn't one that is known"
        return None


@functools.cache
def fingerprint(function: Callable[..., Any]) -> str:
    """A hash of a function's source, whatever its comments, blank lines and Python's version; "" without source."""
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return ""
    skip = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE)
    names = {tokenize.INDENT: "INDENT", tokenize.DEDENT: "DEDENT", tokenize.ENDMARKER: ""}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    text = " ".join(names.get(token.type, token.string) for token in tokens if token.type not in skip)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


_classes: dict[tuple[Rule, type[nn.Module]], type["Fused"]] = {}


def fused_class(rule: Rule, original: type[nn.Module]) -> type["Fused"]:
    """The class that modules of class `original` become: the same attributes and methods, the rule's forward."""
    found = _classes.get((rule, original))
    if found is not None:
        return found
    forward = _taking(rule.forward, original.forward)
    body = {
        "forward": forward,
        "by_plan": forward,
        "rule": rule,
        "original": original,
        "__module__": original.__module__,
        "__doc__": original.__doc__,
    }
    made = _classes[rule, original] = type(f"Fused{original.__name__}", (Fused, original), body)
    return made


def _taking(forward: Callable[..., Any], theirs: Callable[..., Any]) -> Callable[..., Any]:
    """A rule's forward with the name that x has in the original's, by which callers may pass it: the same code, where a
    wrapper would cost every call."""
    known = getattr(theirs, "__code__", None)
    given = known.co_varnames[1] if known is not None and known.co_argcount > 1 else "x"
    code = forward.__code__
    mine = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    if given in mine or code.co_argcount < 2:
        return forward
    rename = lambda names: tuple(given if name == mine[1] else name for name in names)
    made = types.FunctionType(
        code.replace(co_varnames=rename(code.co_varnames), co_cellvars=rename(code.co_cellvars)),
        forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__,
    )  # fmt: skip
    made.__module__, made.__qualname__, made.__doc__ = forward.__module__, forward.__qualname__, forward.__doc__
    return made


RULES: dict[str, Rule] = {}
# Classes of authors' repositories, which are no packages: named by wherever their file is imported from. By the class's
# own name: (class) -> Rule, or None where its source isn't the one that is known.
STRUCTURES: dict[str, Callable[[type], Rule | None]] = {}
# Who is asked about a class that no rule names: (class, module or None) -> Rule or None.
READERS: list[Callable[[type, nn.Module | None], Rule | None]] = []
# And who is asked whether it is a parent, of gates that need not be its own.
PARENTS: list[Callable[[type, nn.Module | None], Rule | None]] = []


def register(*rules: Rule) -> tuple[Rule, ...]:
    """Makes rules known to `fuse_`, and to pickles."""
    RULES.update((rule.path, rule) for rule in rules)
    return rules


def rule_of(cls: type) -> Rule | None:
    """The rule for a class, or for the nearest that it derives from; None where none names it."""
    for base in cls.__mro__:
        rule = RULES.get(path(base))
        if rule is None and base.__name__ in STRUCTURES:
            rule = STRUCTURES[base.__name__](base)
        if rule is not None:
            return rule
    return None


def by_structure(name: str, make: Callable[[str], Rule]) -> None:
    """Lets `fuse_` know a class by its name and the fingerprint of its forward, wherever it is imported from.

    make: path of the class -> Rule
    """

    @functools.cache
    def found(cls: Any) -> Rule | None:
        rule = make(path(cls))
        return rule if fingerprint(getattr(cls, "forward", None)) in rule.sources["forward"] else None

    STRUCTURES[name] = found


def _read(cls: type) -> Rule | None:
    return next((rule for reader in (*READERS, *PARENTS) if (rule := reader(cls, None)) is not None), None)


def _restore(original: type[nn.Module], rule_path: str) -> nn.Module:
    """What a pickled or copied fused module starts from: the original class, where the rule doesn't hold here."""
    module: nn.Module = original.__new__(original)
    rule = RULES.get(rule_path) or rule_of(original) or _read(original)
    if rule is not None and rule.refuses(original) is None:
        module.__class__ = fused_class(rule, original)
    return module


# Activations by the class that computes them: the ops' name, and the plain attribute that must have a value or is the
# slope.
_SAME_NUMBERS: dict[str, tuple[str, ...]] = {
    "identity": ("torch.nn.modules.linear.Identity",),
    "relu": ("torch.nn.modules.activation.ReLU",),
    "relu6": ("torch.nn.modules.activation.ReLU6",),
    "leaky_relu": ("torch.nn.modules.activation.LeakyReLU",),
    "silu": (
        "torch.nn.modules.activation.SiLU",
        "timm.layers.activations.Swish",
        "timm.layers.activations_me.SwishMe",
        "pytorchcv.models.common.activ.Swish",
        "monai.networks.blocks.activation.MemoryEfficientSwish",
        "monai.networks.blocks.activation.Swish",
        "efficientnet_pytorch.utils.Swish",
        "efficientnet_pytorch.utils.MemoryEfficientSwish",
    ),
    "gelu": ("torch.nn.modules.activation.GELU", "timm.layers.activations.GELU"),
    "hardswish": (
        "torch.nn.modules.activation.Hardswish",
        "timm.layers.activations.HardSwish",
        "timm.layers.activations_me.HardSwishMe",
        "pytorchcv.models.common.activ.HSwish",
    ),
    "prelu": ("torch.nn.modules.activation.PReLU", "timm.layers.activations.PReLU"),
    "sigmoid": ("torch.nn.modules.activation.Sigmoid", "timm.layers.activations.Sigmoid"),
    "hard_sigmoid": (
        "torch.nn.modules.activation.Hardsigmoid",
        "timm.layers.activations.HardSigmoid",
        "timm.layers.activations_me.HardSigmoidMe",
        "pytorchcv.models.common.activ.HSigmoid",
    ),
    "clamp": ("pytorchcv.models.ghostnet.GhostHSigmoid",),
}
# Options that change the numbers, and the values with which they are the ops'.
_OPTIONS: dict[str, dict[str, Any]] = {
    "gelu": {"approximate": "none"}, "silu": {"alpha": 1}, "relu6": {"min_val": 0, "max_val": 6},
}  # fmt: skip
ACTIVATIONS = {cls: name for name, classes in _SAME_NUMBERS.items() for cls in classes}


def activation(plan: Plan, role: str, child: nn.Module | None, allowed: Iterable[str]) -> tuple[str, float]:
    """The ops' name of an activation module, and its slope. Raises Refused where it isn't one of `allowed`."""
    name = ACTIVATIONS.get(path(type(child)))
    for option, usual_value in _OPTIONS.get(name or "", {}).items():
        if option in vars_of(child) and plan.fix(child, option) != usual_value:  # type: ignore[arg-type]
            name = None
    if name is None or name not in allowed:
        raise Refused(f"{role} is {child!r}, which no kernel has")
    return name, plan.fix(child, "negative_slope") if name == "leaky_relu" else 0.01  # type: ignore[arg-type]
