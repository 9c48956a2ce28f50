"""A parent of gates as a chain: its layers in the order in which its forward calls them, and what ends it.

    y = act(gate(norm(f(x))) + shortcut)

A BatchNorm is computed together with what follows it, where that is understood (blocks/normed.py):

    norm → act → gate          a gate behind an activation: MBConv, RegNet
    norm → act                 no gate
    norm → gate → add → act    the tail of a bottleneck; without a gate, too
    gate → norm → act          a gate that weighs branches: EPSANet

A parent is described by data: which children are called, what the shortcut is, and what comes after. Containers whose
forward is known are looked into. A forward is rewritten only where the original's source is a known one and nothing
stands between gate, add and activation. Any mechanism's gate fits, as long as its plan runs a residual and an epilogue;
a norm joins in where its gate says how it runs behind one: a function of the means, CBAM's two, shuffle attention's.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..ops import activations
from ..plan import (
    KEY,
    READERS,
    Plan,
    Planned,
    Refused,
    Rule,
    activation,
    author,
    fingerprint,
    left_to_compiler,
    path,
    ready,
    rule_of,
    tampered,
    unfused,
)  # fmt: skip
from . import normed

# Modules that may stand between gate and add: idle ones, and DropPath, which is idle in evaluation and at rate 0.
IDLE = "torch.nn.modules.linear.Identity"
_DROP_PATHS = {"timm.layers.drop.DropPath": "drop_prob", "torchvision.ops.stochastic_depth.StochasticDepth": "p"}
_SEQUENTIAL = (
    "torch.nn.modules.container.Sequential",
    "torchvision.ops.misc.Conv2dNormActivation",
    "torchvision.models.regnet.BottleneckTransform",
)
_CV = "pytorchcv.models."
# Other containers: the fingerprint of forward, and the children that it calls in order, each with the attribute that
# must be true for that.
_CONTAINERS: dict[str, tuple[str, tuple[tuple[str, str | None], ...]]] = {
    "timm.layers.conv_bn_act.ConvNormAct": ("edd86b823f1f", (("conv", None), ("bn", None), ("aa", None))),
    f"{_CV}common.conv.ConvBlock": (
        "234ab5542f9c", (("pad", "use_pad"), ("conv", None), ("bn", "normalize"), ("activ", "activate")),
    ),
    f"{_CV}resnet.ResBlock": ("c9baabe17f74", (("conv1", None), ("conv2", None))),
    **{
        f"{_CV}{where}": ("acfc8acf1ed9", (("conv1", None), ("conv2", None), ("conv3", None)))
        for where in ("resnet.ResBottleneck", "resnext.ResNeXtBottleneck", "senet.SENetBottleneck")
    },
}  # fmt: skip
_NORM_ACT = {normed.WITH_ACT: "34994d9669ff"}

Branch = Callable[[Any, Tensor], tuple[Any, "Tensor | None"]]


class Leaf(NamedTuple):
    """A layer of a chain: its path from the parent, and the module."""

    name: str
    module: nn.Module


class Step(NamedTuple):
    """What runs at once: a module by itself, or a norm with what follows it.

    alone: the modules to be called one after the other where the step can't run as one
    gate: behind norm and activation; ahead: before them
    """

    alone: tuple[nn.Module, ...]
    norm: normed.Norm | None = None
    act: str = "identity"
    slope: float = 0.01
    gate: nn.Module | None = None
    ahead: nn.Module | None = None


def by_plan(module: nn.Module) -> bool:
    """Whether a module is a gate that runs, or may run, by a plan."""
    if isinstance(module, Planned):
        rule = getattr(module, "rule", None)
        return rule is None or rule.tail is None
    if (rule := rule_of(type(module))) is not None:
        return rule.tail is None and (rule.holds is None or rule.holds(module))
    own = not type(module).__module__.startswith("torch.")
    return own and any(reader(type(module), module) is not None for reader in READERS)


def goes_ahead(module: nn.Module) -> bool:
    """Whether a norm behind a gate may be computed with it."""
    if not by_plan(module):
        return False
    if isinstance(module, Planned):
        rule = getattr(module, "rule", None)
        return module.ahead if rule is None else rule.ahead
    return (rule := rule_of(type(module))) is not None and rule.ahead


def _more_than_its_plan(gate: nn.Module) -> str | None:
    """What a call of a gate would do besides its plan, or None."""
    if type(gate).__call__ is not nn.Module.__call__:
        return "has a __call__ of its own"
    if isinstance(gate, Planned) and type(gate).forward is not type(gate).by_plan:
        return "overrides the forward that its plan replaces"
    return tampered(gate)


def inside(name: str, child: nn.Module | None) -> Iterator[Leaf]:
    """The layers that a child is made of; the child itself where its forward isn't known, or something hangs on it."""
    if child is None:
        return
    where, children = path(type(child)), vars(child)["_modules"]
    parts: tuple[str, ...] | None = None
    if where in _SEQUENTIAL and type(child).forward is nn.Sequential.forward:
        parts = tuple(children)
    elif where in _CONTAINERS and fingerprint(type(child).forward) == _CONTAINERS[where][0]:
        parts = tuple(part for part, flag in _CONTAINERS[where][1] if flag is None or vars(child).get(flag))
    if not parts or tampered(child) is not None or by_plan(child):
        yield Leaf(name, child)
        return
    for part in parts:
        yield from inside(f"{name}.{part}", children.get(part))


@dataclass(frozen=True)
class Tail:
    """The order of a parent's forward, by the names of its children.

    before: children called one after the other on x, those that there are; or (module, x) -> what the gate gets, and
        the shortcut or None
    gate; act: the gate and the activation at the end, or None
    drop_path: child between gate and add, or None
    downsample: child that makes the shortcut, where it isn't x itself; or (module, x) -> the shortcut or None
    skip: name of the attribute or child that must be there, and true, for a shortcut and drop_path; None: always
    inplace: the original adds in place, so that the sum has the gate's dtype whatever the shortcut's
    needs: attributes that must be true for the gate to be called
    after: (module, y, x) -> what forward returns, where it goes on after the activation
    """

    before: tuple[str, ...] | Branch
    gate: str | None
    act: str | None
    drop_path: str | None = None
    downsample: str | Callable[[Any, Tensor], Tensor | None] = "downsample"
    skip: str | None = None
    inplace: bool = False
    needs: tuple[str, ...] = ()
    after: Callable[[Any, Tensor, Tensor], Tensor] | None = None

    def leaves(self, module: nn.Module) -> list[Leaf]:
        """The layers before the gate at the end."""
        children = vars(module)["_modules"]
        if callable(self.before):
            return []
        return [leaf for name in self.before for leaf in inside(name, children.get(name))]

    def last(self, module: nn.Module) -> nn.Module | None:
        """The gate at the end; None where there is none, or a layer that does nothing stands for it."""
        child: nn.Module | None = vars(module)["_modules"].get(self.gate)
        return None if path(type(child)) == IDLE else child

    def ends(self, module: nn.Module) -> nn.Module | None:
        """The activation at the end, or None."""
        return None if self.act is None else vars(module)["_modules"][self.act]

    def more(self, module: nn.Module) -> list[Leaf]:
        """Layers besides `leaves` that aren't children of the module itself, and are skipped."""
        return []

    def gates(self, module: nn.Module) -> list[nn.Module]:
        """The gates of a parent: at the end, and among its layers."""
        last = self.last(module)
        found = [leaf.module for leaf in self.leaves(module) if by_plan(leaf.module)]
        return found if last is None else [*found, last]

    def skips(self, module: nn.Module) -> bool:
        """Whether there is a shortcut."""
        return self.skip is None or bool(vars(module).get(self.skip) or vars(module)["_modules"].get(self.skip))

    def shortcut(self, module: Any, x: Tensor) -> Tensor | None:
        """The shortcut of x, or None."""
        if callable(self.downsample):
            return self.downsample(module, x)
        child = module._modules.get(self.downsample)
        return x if child is None else child(x)


class TailPlan(Plan):
    """What a parent's rewritten forward relies on: norms, activations, gates and drop_path are skipped.

    steps: the layers before the gate at the end
    norm: the BatchNorm before that gate, with the module itself; or None
    end: that gate, and gated: whether there is one; opaque: it has a plan that compilers don't look into
    between: DropPath behind it; act: the activation at the end
    """

    __slots__ = (
        "act", "between", "drop_path", "end", "epilogue", "gated", "last", "norm", "opaque", "skips", "slope",
        "steps", "tail",
    )  # fmt: skip

    def __init__(self, module: nn.Module, tail: Tail) -> None:
        children = module.__dict__["_modules"]
        names = [n for n in (tail.gate, tail.act, tail.drop_path) if n is not None]
        own = [n for n in (tail.skip,) if n is not None and n in vars(module)]
        super().__init__(module, names, (*tail.needs, *own))
        self.skips = tail.skips(module)
        if not all(vars(module)[name] for name in tail.needs):
            raise Refused(f"{tail.gate} isn't called")
        gate = tail.last(module)
        self.end, self.gated = gate, gate is not None
        its: Plan | None = None if gate is None else vars(gate).get(KEY)
        self.opaque = its is not None and its.fits_tail and not its.opens
        if gate is not None and (why := _more_than_its_plan(gate)) is not None:
            raise Refused(f"{tail.gate} is a {path(type(gate))}, which {why}")
        self.tail = tail
        self.epilogue, self.slope = "identity", 0.01
        self.act = tail.ends(module)
        if self.act is not None:
            self.epilogue, self.slope = activation(self, tail.act or "", self.act, activations.EPILOGUES)
        between = children.get(tail.drop_path) if tail.drop_path and self.skips else None
        self.drop_path, self.between = None, between
        if between is not None and path(type(between)) != IDLE:
            rate = _DROP_PATHS.get(path(type(between)))
            if rate is None:
                raise Refused(f"{tail.drop_path} is a {path(type(between))}")
            self.drop_path = vars(between), rate
        self.steps, self.norm, self.last = self._compile(module, tail)
        if not self.gated and self.norm is None and all(step.norm is None for step in self.steps):
            raise Refused("it holds no gate, and no BatchNorm that something follows")

    def _skip(self, leaf: Leaf) -> None:
        if any(leaf.module is other for other, _, _ in self.skipped):
            return
        if (why := tampered(leaf.module)) is not None:
            raise Refused(f"{leaf.name} {why}")
        self.skipped += ((leaf.module, type(leaf.module), vars(leaf.module)),)

    def _containers(self, module: nn.Module, leaves: list[Leaf]) -> None:
        """Containers that were looked into stay what they are, with the children they have."""
        for name in dict.fromkeys(leaf.name.rpartition(".")[0] for leaf in leaves):
            within: Any = module
            for step in name.split(".") if name else ():
                within = vars(within)["_modules"][step]
                if not any(within is other for other, _, _ in self.skipped):
                    self._skip(Leaf(name, within))
                    self.fixed += ((vars(within), "_modules", dict(vars(within)["_modules"])),)
                    for _, flag in _CONTAINERS.get(path(type(within)), ("", ()))[1]:
                        if flag is not None:
                            self.fix(within, flag)

    def _follows(self, leaf: Leaf) -> tuple[str, float] | None:
        """The ops' name of an activation layer and its slope, or None where it is something else."""
        try:
            found = activation(self, leaf.name, leaf.module, activations.EPILOGUES)
        except Refused:
            return None
        return found if path(type(leaf.module)) != IDLE and tampered(leaf.module) is None else None

    def _compile(self, module: nn.Module, tail: Tail) -> tuple[tuple[Step, ...], normed.Norm | None, nn.Module | None]:
        leaves, also = tail.leaves(module), tail.more(module)
        self._containers(module, leaves + also)
        for leaf in also:
            self._skip(leaf)
        # Layers that do nothing stand between none.
        idle = [leaf for leaf in leaves if path(type(leaf.module)) == IDLE and tampered(leaf.module) is None]
        for leaf in idle:
            self._skip(leaf)
        leaves = [leaf for leaf in leaves if all(leaf is not other for other in idle)]
        steps: list[Step] = []
        ends = self.gated or self.act is not None or self.skips
        i = 0
        while i < len(leaves):
            leaf = leaves[i]
            if (step := self._ahead(leaves[i : i + 3])) is not None:
                steps.append(step)
                i += 3
                continue
            norm = normed.read(leaf.module) if tampered(leaf.module) is None else None
            alone, act, slope, gate = [leaf.module], "identity", 0.01, None
            i += 1
            if norm is None:
                steps.append(Step((leaf.module,)))
                continue
            with_act = self._own_act(leaf)
            if with_act is not None:
                act, slope = with_act
            elif path(type(leaf.module)) in _NORM_ACT:  # its activation, or its version, isn't known
                steps.append(Step((leaf.module,)))
                continue
            elif i < len(leaves) and (found := self._follows(leaves[i])) is not None:
                (act, slope), more = found, leaves[i]
                self._skip(more)
                alone.append(more.module)
                i += 1
            if (
                i < len(leaves)
                and by_plan(leaves[i].module)
                and not goes_ahead(leaves[i].module)
                and _more_than_its_plan(leaves[i].module) is None
            ):
                gate = leaves[i].module
                self._skip(leaves[i])
                i += 1
            if gate is None and act == "identity":
                if i == len(leaves) and ends:
                    self._skip(leaf)
                    return tuple(steps), norm, leaf.module
                norm = None  # by itself it is PyTorch's
            else:
                self._skip(leaf)
            steps.append(Step(tuple(alone), norm, act, slope, gate))
        return tuple(steps), None, None

    def _ahead(self, leaves: Sequence[Leaf]) -> Step | None:
        """The step of a gate, the norm behind it and an activation, where the next three layers are these."""
        if len(leaves) < 3 or not goes_ahead(leaves[0].module) or _more_than_its_plan(leaves[0].module) is not None:
            return None
        gate, norm, act = leaves
        view = None if tampered(norm.module) is not None else normed.read(norm.module)
        if view is None or path(type(norm.module)) in _NORM_ACT or (found := self._follows(act)) is None:
            return None
        for leaf in leaves:
            self._skip(leaf)
        return Step(tuple(leaf.module for leaf in leaves), view, *found, ahead=gate.module)

    def _own_act(self, leaf: Leaf) -> tuple[str, float] | None:
        """The activation inside a norm, ("identity", …) where that does nothing; None where there is none, or it isn't
        known."""
        known = _NORM_ACT.get(path(type(leaf.module)))
        if known is None or fingerprint(type(leaf.module).forward) != known:
            return None
        children = vars(leaf.module)["_modules"]
        drop, act = children.get("drop"), children.get("act")
        if path(type(drop)) != IDLE or act is None:
            return None
        try:
            found = activation(self, f"{leaf.name}.act", act, activations.EPILOGUES)
        except Refused:
            return None
        for name, child in (("drop", drop), ("act", act)):
            if tampered(child) is not None:
                return None
            self._skip(Leaf(f"{leaf.name}.{name}", child))
        self.fixed += ((vars(leaf.module), "_modules", dict(children)),)
        return found

    def drops(self) -> bool:
        """Whether DropPath is at work."""
        if self.drop_path is None:
            return False
        its, rate = self.drop_path
        return its["training"] and its[rate] > 0

    def covers(self, plan_of: Callable[[nn.Module], Plan | None]) -> str:
        """What is computed at once, in words: each kind of step once, and the end. plan_of: a gate's plan."""

        def words(norm: bool, act: bool, gate: nn.Module | None, add: bool = False) -> list[str]:
            its = None if gate is None else plan_of(gate)
            apart = norm and gate is not None and (its is None or (its.behind() if add else its.means()) is None)
            first = [w for w, there in (("norm", norm and not (apart and add)), ("act", act and not add)) if there]
            closes = add and (its is None or its.closes)
            rest = [w for w, there in (("gate", gate is not None), ("add", closes), ("act", act and closes)) if there]
            if apart and not add:  # the gate needs more than means, so it isn't in the norm's step
                return [" + ".join(first)] if act else []
            return [" + ".join([*first, *rest])]

        found: list[str] = []
        for step in self.steps:
            if step.ahead is not None:
                found += ["gate + norm + act"]
            elif step.norm is not None:
                found += words(True, step.act != "identity", step.gate)
        if self.norm is not None or self.gated:
            found += words(self.norm is not None, self.epilogue != "identity", self.end, True)
        return ", ".join(dict.fromkeys(found))


def _extracting(x: Any) -> bool:
    """Whether torchvision's or timm's feature extractor traces: its users may ask for the gate, the sum, the activation
    by name, so each must be a node of its own."""
    return not isinstance(x, Tensor) and any(
        cls.__name__ == "NodePathTracer" for cls in type(getattr(x, "tracer", None)).__mro__
    )


def _together(norm: normed.Norm, x: Any, behind_act: bool = False) -> bool:
    """Whether a norm is computed with what follows it. Compilers do that by themselves, tracers want its module, what
    the norm doesn't take is for its module to refuse, and for small maps it doesn't pay."""
    return (
        isinstance(x, Tensor)
        and not is_compiling()
        and not torch.jit.is_tracing()
        and norm.takes(x)
        and normed.pays(norm, x, behind_act)
    )


def _behind(gate: Plan, norm: normed.Norm, x: Tensor) -> Any:
    """How the gate runs behind a norm, or None where it needs the norm's output, or that is as fast."""
    found = gate.behind()
    return found if found is not None and normed.pays(norm, x, gate=found) else None


def _run(step: Step, x: Any) -> Any:
    """One step before the end."""
    if step.ahead is not None and step.norm is not None:
        x, done = _weighed(step.ahead, step.norm, x, step.act, step.slope)
        return x if done else _run(step._replace(alone=step.alone[1:], ahead=None), x)
    behind_act = step.gate is not None and step.act != "identity"
    if step.norm is not None and _together(step.norm, x, behind_act):
        plan = None if step.gate is None else ready(step.gate)
        means = plan.means() if plan is not None and plan.fits_tail and getattr(plan, "dim", 4) == 4 else None
        if means is not None:
            if step.act == "identity":
                return normed.run(step.norm, means, x)
            return normed.run_inside(step.norm, means, x, step.act, step.slope)
        if step.act != "identity":
            x = normed.run(step.norm, None, x, None, step.act, step.slope)
            return x if step.gate is None else step.gate(x)
    for module in step.alone:
        x = module(x)
    return x if step.gate is None else step.gate(x)


def _weighed(gate: nn.Module, norm: normed.Norm, x: Any, act: str, slope: float = 0.01) -> tuple[Any, bool]:
    """act(norm(gate(x))) and True, as one; or where that can't be, gate(x) and False."""
    watched = not isinstance(x, Tensor) or is_compiling() or torch.jit.is_tracing()
    plan = None if watched else ready(gate)
    maps = None if plan is None else plan.maps(x)
    if plan is None or maps is None:
        return gate(x), False
    if not _together(norm, normed.merged(maps)):
        return plan.weighed(maps), False
    excite, tensors, merge = plan.weighs()
    return normed.run_ahead(norm, (excite, tensors), maps, merge, act, slope), True


def _opaque(self: Any) -> bool:
    """Whether a parent ends in a gate whose ops no compiler looks into, so that it joins nothing to them itself."""
    plan: TailPlan | None = self.__dict__.get(KEY)
    return plan is not None and plan.opaque


def forward(self: Any, x: Tensor) -> Tensor:
    """What a parent's forward becomes: the original's order, a norm with what follows it as one op."""
    if left_to_compiler(x) and (left_to_compiler(x, opaque=True) or not _opaque(self)):
        return author(type(self)).forward(self, x)
    plan: TailPlan | None = ready(self)  # type: ignore[assignment]
    if plan is None or (type(x) is not Tensor and _extracting(x)):
        return author(type(self)).forward(self, x)
    tail, gate = plan.tail, None
    if plan.end is not None and ((gate := ready(plan.end)) is None or not gate.fits_tail):
        unfused(self, "its gate runs unfused" if gate is None else "its gate takes no residual and activation")
        return author(type(self)).forward(self, x)
    if gate is not None and not (gate.traces or isinstance(cast(Any, x), Tensor)):
        return author(type(self)).forward(self, x)
    given, norm = x, plan.norm
    if callable(tail.before):
        x, shortcut = tail.before(self, x)
    else:
        for step in plan.steps:
            x = _run(step, x)
        shortcut = tail.shortcut(self, given) if plan.skips else None
    together = norm is not None and _together(norm, x)
    behind = _behind(gate, norm, x) if norm is not None and together and gate is not None else None
    if norm is not None and (not together or (gate is not None and behind is None)):
        x, norm = plan.last(x), None  # type: ignore[misc]
    joined, drops = True, plan.drops()
    if norm is None and gate is None:
        joined = False
    elif isinstance(x, Tensor) and x.dim() != getattr(gate, "dim", 4):
        unfused(self, f"the branch has shape {tuple(x.shape)}")
        x = x if norm is None else plan.last(x)  # type: ignore[misc]
        x, joined = plan.end(x) if plan.gated else x, False  # type: ignore[misc]
    else:
        if drops:
            unfused(self, "drop_path stands between gate and add")
            joined = False
        elif shortcut is not None and isinstance(x, Tensor) and (x.dtype, x.shape) != (shortcut.dtype, shortcut.shape):
            unfused(
                self, f"the shortcut is {shortcut.dtype} {tuple(shortcut.shape)}, the branch {x.dtype} {tuple(x.shape)}"
            )
            joined = False
        end = (shortcut, plan.epilogue, plan.slope) if joined else (None, "identity", 0.01)
        x = normed.run(norm, behind, x, *end) if norm is not None else gate.run(x, *end)  # type: ignore[union-attr]
    if not joined:
        x = plan.between(x) if drops else x  # type: ignore[misc]
        if shortcut is not None:
            if tail.inplace:
                x += shortcut
            else:
                x = x + shortcut
        x = x if plan.act is None else plan.act(x)
    return x if tail.after is None else tail.after(self, x, given)


class Joining(nn.Module):
    """Base of the library's own parents that hand gates to `joined` and `weighed`, where those aren't called unless
    something hangs on them.

    joins: the gates' names
    """

    joins: tuple[str, ...]


def joined(
    norm: nn.Module, gate: nn.Module | None, x: Tensor, shortcut: Tensor | None = None, act: str = "relu"
) -> Tensor:
    """act(gate(norm(x)) + shortcut) for the library's own networks: as one where that can be, else one by one.

    gate: one of the library's modules, or None
    """
    view = normed.read(norm) if tampered(norm) is None else None
    if view is not None and _together(view, x):
        plan = None if gate is None or _more_than_its_plan(gate) is not None else ready(gate)
        behind = None if plan is None or not plan.fits_tail else _behind(plan, view, x)
        if gate is None or behind is not None:
            return normed.run(view, behind, x, shortcut, act)
    x = norm(x)
    if gate is not None:
        return gate(x, shortcut, act)
    return activations.apply(act, x if shortcut is None else x + shortcut)


def weighed(gate: nn.Module, norm: nn.Module, x: Tensor, act: str = "relu") -> Tensor:
    """act(norm(gate(x))) for the library's own networks: as one where that can be, else one by one."""
    view = normed.read(norm) if tampered(norm) is None else None
    if view is None or not (isinstance(gate, Planned) and goes_ahead(gate)) or _more_than_its_plan(gate) is not None:
        return joined(norm, None, gate(x), None, act)
    x, done = _weighed(gate, view, x, act)
    return x if done else joined(norm, None, x, None, act)


def tail_rule(where: str, sources: tuple[str, ...], tail: Tail) -> Rule:
    """The rule for a parent: path of its class, fingerprints of its forward, and what that does."""
    return Rule(where, forward, lambda module: TailPlan(module, tail), {"forward": sources}, tail)
