"""Conversion of a model in place: `fuse_` makes every module that is understood run fused, `unfuse_` undoes it.

A fused module keeps its identity, its children and its Parameters, and changes only its class, to a dynamic subclass
of its own (`plan.fused_class`); so nothing that holds the model or hangs on it breaks. Two kinds of module are fused:
a gate, and the parent of a gate whose residual add and activation then cost no further pass. Everything is decided
before anything changes.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from . import log
from .plan import KEY, OURS, PARENTS, READERS, Fused, Plan, Planned, Refused, Rule, fused_class, path, renew, rule_of

__all__ = ["Report", "Row", "fuse_", "unfuse_"]

Select = str | type | Iterable[str | type] | None


@dataclass(frozen=True)
class Row:
    """One module that was recognised: its name, class, why it wasn't fused, or None, and what of it is fused.

    kind: "gate", "tail" (the parent of a gate) or "plain" (a parent without one)
    """

    name: str
    cls: str
    kind: str
    reason: str | None = None
    part: str = "gate"


@dataclass
class Report:
    """What `fuse_` did. `print` it for a table.

    rows: every module that was recognised; errors, speed: what the check on example inputs measured, or None
    """

    rows: list[Row] = field(default_factory=list)
    errors: dict[str, dict[str, float]] | None = None
    speed: dict[str, dict[str, float]] | None = None

    @property
    def fused(self) -> list[str]:
        """Names of the modules that run fused now, in the model's order."""
        return [row.name for row in self.rows if row.reason is None]

    @property
    def refused(self) -> list[tuple[str, str]]:
        """Name and reason of every module that was recognised and doesn't run fused."""
        return [(row.name, row.reason) for row in self.rows if row.reason is not None]

    def __repr__(self) -> str:
        return f"<Report: {len(self.fused)} fused, {len(self.refused)} refused>"

    def __str__(self) -> str:
        if not self.rows:
            return "nothing to fuse: no module of a class that fused_attn knows"
        seen: dict[tuple[str, str, str | None], list[str]] = {}
        for row in self.rows:
            seen.setdefault((row.cls, row.part, row.reason), []).append(row.name or "(model)")
        cells = [("modules", "class", "part", "")]
        cells += [
            (_names(names), cls.rpartition(".")[2], part, "fused" if reason is None else f"refused: {reason}")
            for (cls, part, reason), names in seen.items()
        ]
        lines = [f"{len(self.fused)} modules fused, {len(self.refused)} refused", *table(cells)]
        for title, measured in (("errors", self.errors), ("speed", self.speed)):
            if measured:
                columns = list(next(iter(measured.values())))
                body = [(name, *(f"{v:.3g}" for v in values.values())) for name, values in measured.items()]
                lines += ["", *table([(title, *columns), *body])]
        return "\n".join(lines)


def _names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)})"


def table(cells: Sequence[Sequence[str]]) -> list[str]:
    """Rows of text, first the head, as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    show = lambda row: "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
    return [show(cells[0]), "  ".join("-" * w for w in widths), *map(show, cells[1:])]


def fuse_(
    model: nn.Module,
    *,
    only: Select = None,
    skip: Select = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    strict: bool = False,
    example_inputs: Any = None,
) -> Report:
    """Makes every module that is understood run fused, in place: the same objects, Parameters and state_dict keys.

    model: the model, which may itself be one block
    only, skip: what to fuse and what not: a name, a class, or several of them. A name is a pattern as in fnmatch
        (`layer4.*.se`). Each selects the modules it matches, and all within them; a parent's tail is fused where the
        parent itself is selected
    filter_fn: (module, name) -> whether to fuse it
    strict: raise where a selected gate was recognised and can't be fused
    example_inputs: a tensor, or a tuple of arguments. The fused model is then compared on them, outputs and gradients,
        with the model as it was and with float64, and timed; the report holds errors and speed

    Calling it again changes nothing. A module of a known class that is configured in a way that isn't understood, or
    that overrides its class's forward, or on whose children something hangs, stays as it is; the report says why.

    Returns the report. Raises TypeError or ValueError for arguments that make no sense, RuntimeError where `strict`
    isn't met or the comparison fails. Whatever is raised, the model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module; got {type(model).__name__}")
    selected = _selection(model, only, skip, filter_fn)
    report, changes = _decide(model, selected)
    for row in report.rows:
        if row.reason is not None:
            log.refused(row.cls, row.reason)
    if strict and (bad := [row for row in report.rows if row.reason is not None and row.kind == "gate"]):
        reasons = "\n".join(f"  {row.name or '(model)'}: {row.reason}" for row in bad)
        raise RuntimeError(f"strict: {len(bad)} modules can't be fused\n{reasons}")
    if example_inputs is None:
        _apply(changes)
    else:
        from .verify import verify  # costs nothing where it isn't asked for

        inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
        report.errors, report.speed = verify(model, inputs, lambda: _apply(changes), lambda: _revert(changes))
    return report


def unfuse_(model: nn.Module) -> nn.Module:
    """Gives every fused module its original class back, in place, and returns the model.

    Raises RuntimeError, changing nothing, where a fused module got another class on top, by a parametrisation say.
    """
    fused = [(name, m) for name, m in model.named_modules() if isinstance(m, Fused)]
    for name, module in fused:
        if "rule" not in vars(type(module)):
            raise RuntimeError(f"{name or '(model)'} became a {path(type(module))} after it was fused: undo that first")
    for _, module in fused:
        _restore(module)
    return model


def _restore(module: nn.Module) -> None:
    # In this order: a thread that runs the module may make a new plan as long as the class asks for one.
    module.__class__ = module.original  # type: ignore[assignment]
    module.__dict__.pop(KEY, None)


Change = tuple[nn.Module, Rule]


def _apply(changes: Sequence[Change]) -> None:
    """Changes the classes; all of them, or where anything raises none."""
    try:
        for module, rule in changes:
            module.__class__ = fused_class(rule, type(module))
            if renew(module) is None:
                raise RuntimeError(f"a {path(module.original)} can't be fused any more")  # type: ignore[arg-type]
    except BaseException:
        _revert(changes)
        raise


def _revert(changes: Sequence[Change]) -> None:
    for module, _ in changes:
        if isinstance(module, Fused):
            _restore(module)


def _decide(model: nn.Module, selected: Callable[[nn.Module, str], bool]) -> tuple[Report, list[Change]]:
    """What to change, gates before their parents, and the report. Changes nothing."""
    rows: dict[int, Row] = {}
    changes: list[Change] = []
    modules = list(model.named_modules())
    gates: set[int] = set()  # modules that run, or will run, by a plan that a parent's tail may run
    within: set[int] = set()  # a gate's own layers aren't read as a parent's
    for name, module, rule in recognised(model):
        if (rule is None and isinstance(module, Planned)) or (rule is not None and rule.tail is None):
            within.update(id(part) for part in module.modules() if part is not module)
        if isinstance(module, Planned):
            plan = vars(module).get(KEY)
            if (rule is None or rule.tail is None) and (plan is None or plan.fits_tail):
                gates.add(id(module))
            if isinstance(module, Fused):
                rows[id(module)] = _row(name, module, module.rule, path(module.original), None)
        elif rule is not None and rule.tail is None and selected(module, name):
            found = read(module, rule)
            reason = None if isinstance(found, Plan) else found
            rows[id(module)] = _row(name, module, rule, path(type(module)), reason)
            if isinstance(found, Plan):
                if found.fits_tail:
                    gates.add(id(module))
                changes.append((module, rule))
    for name, module in modules:
        rule = known(module, id(module) not in within)
        if isinstance(module, Planned) or rule is None or rule.tail is None:
            continue
        inside = rule.tail.gates(module)
        last = rule.tail.last(module)
        if (last is None or id(last) in gates) and selected(module, name):
            reason = refusal(module, rule)
            if not inside and reason is not None:  # there is no gate here, and nothing was asked of it
                continue
            rows[id(module)] = _row(name, module, rule, path(type(module)), reason)
            if reason is None:
                changes.append((module, rule))
    order = [id(module) for _, module in modules]
    return Report([rows[i] for i in order if i in rows]), changes


def _row(name: str, module: nn.Module, rule: Rule, cls: str, reason: str | None) -> Row:
    if rule.tail is None:
        return Row(name, cls, "gate", reason)
    kind = "tail" if rule.tail.gates(module) else "plain"
    plan = None if reason is not None else _plan_of(module)
    return Row(name, cls, kind, reason, "gate + add + act" if plan is None else plan.covers(_plan_of))


def _plan_of(module: nn.Module) -> Plan | None:
    """The plan that a module runs by, or would."""
    rule = known(module)
    found = vars(module).get(KEY) or (None if rule is None else read(module, rule))
    return found if isinstance(found, Plan) else None


def recognised(model: nn.Module) -> Iterator[tuple[str, nn.Module, Rule | None]]:
    """The modules that run by a plan, or that a rule is known for, each with its name and rule."""
    inside: set[int] = set()  # a gate's own layers aren't read once more as a gate
    for name, module in model.named_modules():
        rule = known(module, id(module) not in inside)
        if rule is not None and rule.alone and id(module) in inside and not isinstance(module, Planned):
            continue
        if rule is not None or isinstance(module, Planned):
            if rule is None or rule.tail is None:
                inside.update(map(id, module.modules()))
            yield name, module, rule


def known(module: nn.Module, read: bool = True) -> Rule | None:
    """The rule for a module's class or for the nearest class it derives from; None where it has no gate.

    read: whether the source of a class that no rule names is looked at
    """
    if isinstance(module, Fused):
        return module.rule
    if isinstance(module, Planned):
        return None
    if (rule := rule_of(type(module))) is not None:
        return rule if rule.holds is None or rule.holds(module) else None
    found = (reader(type(module), module) for reader in (*READERS, *PARENTS)) if read else ()
    return next((rule for rule in found if rule is not None), None)


def refusal(module: nn.Module, rule: Rule) -> str | None:
    """Why this module can't be fused, or None."""
    found = read(module, rule)
    return found if isinstance(found, str) else None


def read(module: nn.Module, rule: Rule) -> Plan | str:
    """The plan that this module would run by, or why it can't be fused."""
    if (why := rule.refuses(type(module))) is not None:
        return why
    if "forward" in vars(module):
        return "has a forward of its own"
    if (own := next((name for name in rule.sources if name in vars(module)), None)) is not None:
        return f"has its own {own}"
    attributes = vars(module)
    for name in OURS:  # which would stand before it
        if any(name in attributes.get(kept, ()) for kept in ("_modules", "_parameters", "_buffers")):
            return f"{name} is the name of one of its children, and of an attribute of fused modules"
    try:
        plan = rule.plan(module)
        plan.seal(module)
    except Refused as why:
        return str(why)
    return plan


def _selection(
    model: nn.Module, only: Select, skip: Select, filter_fn: Callable[[nn.Module, str], bool] | None
) -> Callable[[nn.Module, str], bool]:
    """Whether a module was asked for. Raises ValueError for a name that matches nothing: it is a typo."""
    named = list(model.named_modules(remove_duplicate=False))

    def covered(argument: str, value: Select) -> set[int] | None:
        """Identities of the modules that match, or lie within one that does."""
        if value is None:
            return None
        roots: set[str] = set()
        for item in [value] if isinstance(value, (str, type)) else value:
            if isinstance(item, type):
                roots.update(name for name, module in named if isinstance(module, item))
            elif isinstance(item, str):
                matches = {name for name, _ in named if fnmatchcase(name, item)}
                if not matches:
                    raise ValueError(f"{argument}: no module's name matches {item!r}")
                roots |= matches
            else:
                raise TypeError(f"{argument} must hold names and classes; got {item!r}")
        inside = lambda name: name in roots or "" in roots or any(name.startswith(f"{root}.") for root in roots)
        return {id(module) for name, module in named if inside(name)}

    wanted, unwanted = covered("only", only), covered("skip", skip)

    def selected(module: nn.Module, name: str) -> bool:
        if (wanted is not None and id(module) not in wanted) or (unwanted is not None and id(module) in unwanted):
            return False
        return filter_fn is None or bool(filter_fn(module, name))

    return selected
