"""Random calls of every op and block, drawn from what they declare, and the check that each of them must pass.

An op's cases show which of its sizes go together, which tensors it can do without and which values its options take;
its own `check` says whether a mixture of them is a call. A block's cases do the same for its arguments, and its
constructor says whether it takes them. So an op or block is fuzzed from its declaration alone.

    example = draw(op_examples(op))        an `Example`: plain data
    check(example)                         raises with a file for tests/regressions/ that runs `check(example)` again

Truth is the formula, or the module run by its children, in float64. What is allowed is `testing.tolerance`. Where that
isn't met, the problem may be ill posed: a sum that cancels, a ReLU at its corner. So truth is asked how far it moves
where every input moves by the resolution of the arithmetic, and plain autograd how far from truth it is for inputs
beside these. Four times the larger is allowed as well: it is the right result for inputs that nobody can tell from
those given, or PyTorch itself can't tell it better.
"""

import copy
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from fused_attn import BLOCKS, OPS, testing, use_backend
from fused_attn.backend import refusal
from fused_attn.layout import accumulator
from fused_attn.ops import activations
from fused_attn.registry import Block, Op
from tests.support import redraw

SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 17, 24, 31, 32, 33, 48, 64, 65, 67, 127, 128, 130, 257, 1031)
MODES = ("grad", "no_grad", "inference_mode")
SCALES = (1.0, 0.0625, 8.0)
HALF = ("bfloat16", "float16")
HALVES = (torch.bfloat16, torch.float16)


class Strided(NamedTuple):
    """A place in memory: axes from outer to inner, elements left out behind each axis and between its neighbours, an
    offset, and an axis along which one slice stands for all (stride 0), or None."""

    order: tuple[int, ...]
    gaps: tuple[int, ...]
    steps: tuple[int, ...]
    offset: int
    repeated: int | None

    def place(self, values: Tensor) -> Tensor:
        """The values (but repeated ones), lying so; between them NaNs."""
        shape = values.shape
        if self.repeated is not None and shape[self.repeated] > 0:
            values = values.narrow(self.repeated, 0, 1)
        room = [values.shape[a] * self.steps[a] + self.gaps[a] for a in self.order]
        store = torch.full((self.offset + math.prod(room),), math.nan, dtype=values.dtype)
        out = store[self.offset :].view(room)
        for place, axis in enumerate(self.order):
            step = self.steps[axis]
            out = out.narrow(place, 0, values.shape[axis] * step)[(slice(None),) * place + (slice(None, None, step),)]
        out = out.permute([self.order.index(axis) for axis in range(values.dim())])
        return out.copy_(values).expand(shape)


Layout = str | Strided


@dataclass(frozen=True)
class Example:
    """One call. Tensors are given by shape; whatever isn't named here is drawn from `seed`.

    subject: name of an op or block
    args: the op's arguments, or the constructor's; x: shape of a block's input
    dtype: of x and of all feature maps, and of a block; parameters: of an op's other tensors
    layouts: of tensors that don't lie contiguous, by name
    wanted: tensors that want a gradient; a block's parameters all do where `parameters_want` is set
    gradient: how the gradient that comes in lies
    """

    subject: str
    args: dict[str, Any]
    x: tuple[int, ...] | None = None
    dtype: str = "float32"
    parameters: str = "float32"
    layouts: dict[str, Layout] = None  # type: ignore[assignment]
    wanted: tuple[str, ...] = ()
    parameters_want: bool = True
    gradient: str = "contiguous"
    backend: str = "auto"
    mode: str = "grad"
    training: bool = False
    ties: bool = False
    scale: float = 1.0
    seed: int = 0

    def __repr__(self) -> str:
        given = [(f.name, getattr(self, f.name)) for f in fields(self)]
        defaults = {f.name: f.default for f in fields(self)}
        shown = [f"{k}={_source(v)}" for k, v in given if k in ("subject", "args") or v not in (defaults[k], {}, None)]
        return "Example(\n" + "".join(f"    {line},\n" for line in shown) + ")"


def _source(value: Any) -> str:
    """Python source that makes an option again."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {_source(v)}" for k, v in value.items()) + "}"
    if isinstance(value, type | nn.Module):
        return f"nn.{value.__name__}" if isinstance(value, type) else f"nn.{value!r}"
    if isinstance(value, Strided) or not isinstance(value, tuple | list):
        return repr(value)
    inner = ", ".join(map(_source, value))
    return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' * (len(value) == 1)})"


def regression(example: Example, what: str) -> str:
    """A file for tests/regressions/ that shows what went wrong."""
    body = repr(example).replace("\n", "\n    ")
    needs = "from torch import nn\n\n" if "nn." in body else ""
    names = "Example, Strided, check" if "Strided(" in body else "Example, check"
    return (
        f'"""Found by fuzzing: {next(iter(what.splitlines()), "")}\n\nWhat was wrong, in one line.\n"""\n\n{needs}'
        f"from tests.fuzzing import {names}\n\n\ndef test_{example.subject}() -> None:\n    check({body})\n"
    )


def check(example: Example) -> None:
    """Runs the example and compares everything with float64. Raises AssertionError where anything is wrong, with a file
    for tests/regressions/."""
    try:
        (_check_op if example.subject in OPS else _check_block)(example)
    except Exception as problem:
        what = f"{example.subject}: {type(problem).__name__}: {problem}"
        raise AssertionError(f"{what}\n\ntests/regressions/test_….py:\n\n{regression(example, what)}") from problem


# ---- an op


def _place(values: Tensor, layout: Layout) -> Tensor:
    return layout.place(values) if isinstance(layout, Strided) else testing.arrange(values, layout)


def arguments(example: Example) -> tuple[Any, ...]:
    """The tensors and options of an op's example, in order."""
    op, layouts = OPS[example.subject], example.layouts or {}
    dtype, small = getattr(torch, example.dtype), getattr(torch, example.parameters)
    args = testing.draw(testing.Case(example.args), op, dtype, parameters=small, ties=example.ties, seed=example.seed)
    scaled = lambda name, t: t * example.scale if name in op.maps and not example.ties else t
    return tuple(
        _place(scaled(name, value), layouts.get(name, "contiguous")) if isinstance(value, Tensor) else value
        for name, value in zip(op.arguments, args, strict=True)
    )


def _answer(
    run: Callable[..., Any],
    args: Sequence[Any],
    wanted: Sequence[bool],
    extra: Sequence[Tensor] = (),
    cotangents: Sequence[Tensor] | None = None,
    gradient: str = "contiguous",
    seed: int = 1,
    mode: str = "grad",
) -> testing.Answer:
    """Forward and backward, with gradients for what is wanted alone: `testing.answer` wants all of them."""
    leaves = [a.detach().requires_grad_(w) if isinstance(a, Tensor) else a for a, w in zip(args, wanted, strict=True)]
    targets = [a for a in leaves if isinstance(a, Tensor) and a.requires_grad] + [p for p in extra if p.requires_grad]
    with ExitStack() as stack:
        if mode != "grad":
            stack.enter_context(getattr(torch, mode)())
        outs = testing._leaves(run(*leaves))
    roots = [o for o in outs if o.requires_grad]
    if cotangents is None:
        cotangents = [testing.cotangent(o, gradient, seed) for o in roots]
    pairs = [(o.to(c.dtype), c) for o, c in zip(outs, cotangents, strict=False) if o.requires_grad]
    grads = (None,) * len(targets)
    if pairs:
        grads = torch.autograd.grad([o for o, _ in pairs], targets, [c for _, c in pairs], allow_unused=True)
    return testing.Answer(tuple(o.detach() for o in outs), tuple(cotangents), tuple(grads))


def _check_op(example: Example) -> None:
    op = OPS[example.subject]
    args = arguments(example)
    wanted = [name in example.wanted and example.mode == "grad" for name in op.arguments]
    before = [a.clone() if isinstance(a, Tensor) else a for a in args]
    backend = example.backend
    if refusal(op, backend, args) is not None if backend != "auto" else False:
        with use_backend(backend):
            _must_raise(RuntimeError, lambda: op(*args))
        backend = "auto"
    with use_backend(backend):
        got = _answer(op, args, wanted, gradient=example.gradient, mode=example.mode)
    for name, value, old in zip(op.arguments, args, before, strict=True):
        assert not isinstance(value, Tensor) or testing.identical(value, old), f"{name} was written to"
    formula = lambda args, cotangents: _answer(op.formula, args, wanted, cotangents=cotangents)
    true = formula(testing.double(args), testing.double(got.cotangents))
    plain = formula(args, got.cotangents)
    want = [(o.dtype, o.shape) for o in plain.outs]
    assert [(o.dtype, o.shape) for o in got.outs] == want, f"outputs are {[(o.dtype, o.shape) for o in got.outs]}"
    if "x" in op.maps:
        strides = torch.empty_like(args[0]).stride()
        alike = [*got.outs[: _gives_maps(op)], *(g for g in got.grads[:1] if wanted[0] and g is not None)]
        assert all(o.stride() == strides for o in alike), f"strides {[o.stride() for o in alike]}; x's are {strides}"
    names = [n for n, w, a in zip(op.arguments, wanted, args, strict=True) if w and isinstance(a, Tensor)]
    found = _deviations(got, true, plain, testing.terms(op, args), names)
    # A backward that reads the output sees what x's dtype left of it, and so on which side of a corner it lies.
    kinks = args[0].dtype in HALVES and any(a in activations.FROM_OUTPUT for a in args if isinstance(a, str))
    unit = torch.finfo(args[0].dtype if kinks else accumulator(args[0].dtype)).eps
    _judge(found, true, formula, [args, got.cotangents], unit)


@functools.cache
def _gives_maps(op: Op) -> bool:
    """Whether the first output has x's shape, in all cases."""
    first = lambda out: out[0] if isinstance(out, tuple) else out
    pairs = [(args[0], first(op.formula(*args))) for c in op.cases for args in [testing.draw(c, op, device="meta")]]
    return all(y.shape == x.shape for x, y in pairs)


def _must_raise(kind: type[Exception], run: Callable[[], Any]) -> None:
    try:
        run()
    except kind:
        return
    raise AssertionError(f"a backend that can't run it should have raised {kind.__name__}")


def _deviations(
    got: testing.Answer,
    true: testing.Answer,
    plain: testing.Answer,
    terms: int,
    names: Sequence[str],
    layers: bool = False,
) -> list[testing.Deviation]:
    """As `testing.deviations`, but what no dtype of a result holds is none, and float64, where plain autograd is the
    truth itself and so without an error, has the bound of its sums.

    layers: where maps are rounded between layers, so that plain autograd's own error is the only measure
    """
    cut = lambda tensors: tuple(map(_held, tensors, (*got.outs, *got.grads), (*true.outs, *true.grads)))
    count = len(got.outs)
    got, true, plain = (
        a._replace(outs=t[:count], grads=t[count:]) for a in (got, true, plain) for t in [cut((*a.outs, *a.grads))]
    )
    found = testing.deviations(got, true, plain, terms, names)
    wide = any(o.dtype == torch.float64 for o in got.outs)
    least = testing.tolerance(torch.float64, terms) if wide else 0.0
    own = _apart(plain, true) if layers else [0.0] * len(found)
    return [
        d._replace(allowed=max(d.allowed, least, 4 * o)) if d.allowed else d for d, o in zip(found, own, strict=True)
    ]


def _apart(a: testing.Answer, b: testing.Answer) -> list[float]:
    """The error of every tensor of `a`, in the order of `testing.deviations`."""
    largest = max(
        (float(g.abs().nan_to_num(0, 0, 0).max()) for g in b.grads if g is not None and g.numel()), default=0.0
    )
    outs = [testing.error(s, t) if t.is_floating_point() else 0.0 for s, t in zip(a.outs, b.outs, strict=True)]
    pairs = [(s, t) for s, t in zip(a.grads, b.grads, strict=True) if t is not None]
    return outs + [testing.error(torch.zeros_like(t) if s is None else s, t, largest or 1.0) for s, t in pairs]


def _held(t: Tensor | None, got: Tensor | None, true: Tensor | None) -> Tensor | None:
    """`t` with 0 where the truth is beyond the dtype of the result, which must have come near its end there."""
    if t is None or got is None or true is None or got.dtype != torch.float16:
        return t
    beyond = true.abs() > 0.99 * torch.finfo(got.dtype).max
    assert not (got[beyond].abs() < 0.9 * torch.finfo(got.dtype).max).any(), "an overflow was lost"
    return torch.where(beyond, 0, t)


forgiven: list[str] = []  # what `_judge` let pass as ill posed, for the tests to count


def _nudged(values: Sequence[Any], unit: float | None, generator: torch.Generator) -> tuple[Any, ...]:
    """Every number moved by up to `unit` of itself, in float64; None: by its dtype's resolution, in its dtype."""

    def move(t: Any) -> Any:
        if not (isinstance(t, Tensor) and t.is_floating_point()):
            return t
        noise = 2 * torch.rand(t.shape, generator=generator, dtype=torch.float64) - 1
        moved = t.double() * (1 + (torch.finfo(t.dtype).eps if unit is None else unit) * noise)
        return moved.to(t.dtype) if unit is None else moved

    return tuple(map(move, values))


def _judge(
    found: Sequence[testing.Deviation],
    true: testing.Answer,
    run: Callable[[Sequence[Any], Sequence[Tensor]], testing.Answer],
    inputs: Sequence[Sequence[Any]],
    unit: float,
) -> None:
    """Raises where a deviation is larger than allowed, and than what the arithmetic can know (see the file's head).

    run: (values, cotangents) -> the answer, in the dtype of what it is given; inputs: these two
    """
    if all(d.ok for d in found):
        return
    known = [0.0] * len(found)
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        moved = run(*(_nudged(part, unit, generator) for part in inputs))
        near = [_nudged(part, None, generator) for part in inputs]
        rounded, exact = run(*near), run(*map(testing.double, near))
        known = list(map(max, known, _apart(moved, true), _apart(rounded, exact)))
    bad = [f"{d}, ill posed by {m:.1e}" for d, m in zip(found, known, strict=True) if d.error > d.allowed + 4 * m]
    assert not bad, "; ".join(bad)
    forgiven.append("; ".join(str(d) for d in found if not d.ok))


# ---- a block


def module_of(example: Example) -> nn.Module:
    """The block's module, all its parameters and buffers drawn."""
    torch.manual_seed(example.seed)
    return redraw(BLOCKS[example.subject].module(**copy.deepcopy(example.args)), example.seed).train(example.training)


class _HardSigmoid(nn.Module):
    """PyTorch's own rounds its constants to float32 in backward, in float64 too; times x for a hard swish."""

    def __init__(self, swish: bool) -> None:
        super().__init__()
        self.swish = swish

    def forward(self, x: Tensor) -> Tensor:
        gate = (x + 3).clamp(0, 6) / 6
        return x * gate if self.swish else gate


def _exact(module: nn.Module) -> nn.Module:
    """The module, its hard sigmoids replaced by exact ones."""
    for name, child in module.named_children():
        if isinstance(child, nn.Hardsigmoid | nn.Hardswish):
            setattr(module, name, _HardSigmoid(isinstance(child, nn.Hardswish)))
        else:
            _exact(child)
    return module


@contextmanager
def by_its_children() -> Iterator[None]:
    """Every module runs unfused: a hook on all of them wants to see them called."""
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: None)
    try:
        with use_backend("eager"):
            yield
    finally:
        handle.remove()


def _step(
    module: nn.Module, x: Tensor, example: Example, cotangents: Sequence[Tensor] | None = None, mode: str = "grad"
) -> testing.Answer:
    """Forward and backward; the buffers that training moved stand behind the output."""
    module = copy.deepcopy(module)
    for p in module.parameters():
        p.requires_grad_(example.parameters_want and mode == "grad")
    wanted = ["x" in example.wanted and mode == "grad"]
    got = _answer(
        module, [x], wanted, [*module.parameters()], cotangents=cotangents, gradient=example.gradient, mode=mode
    )
    moved = tuple(b.clone() for b in module.buffers() if example.training and b.is_floating_point())
    return got._replace(outs=(*got.outs, *moved))


def _input(example: Example) -> Tensor:
    generator = torch.Generator().manual_seed(example.seed)
    x = torch.randn(example.x, generator=generator, dtype=torch.float64)
    x = x.clamp(-1.6, 1.6).round() if example.ties else x * example.scale
    return _place(x.to(getattr(torch, example.dtype)), (example.layouts or {}).get("x", "contiguous"))


def _check_block(example: Example) -> None:
    dtype = getattr(torch, example.dtype)
    x, module = _input(example), module_of(example).to(dtype)
    before = x.clone()

    def run(values: Sequence[Any], cotangents: Sequence[Tensor]) -> testing.Answer:
        """By its children. values: x, parameters, buffers, whose dtype decides."""
        twin = _exact(copy.deepcopy(module)).to(values[0].dtype)
        with torch.no_grad():
            for t, value in zip([*twin.parameters(), *twin.buffers()], values[1:], strict=True):
                t.copy_(value)
        with by_its_children():
            return _step(twin, values[0].contiguous(), example, cotangents, example.mode)

    numbers = [x, *module.parameters(), *module.buffers()]
    try:
        with by_its_children():
            plain = _step(module, x.contiguous(), example, mode=example.mode)
    except (RuntimeError, ValueError) as problem:  # what the children refuse (one value to normalise), so do we
        with use_backend(example.backend):
            _must_raise(Exception, lambda: _step(module, x, example, mode=example.mode))
        _expected(problem)
        return
    with use_backend(example.backend if example.backend != "cpp" else "auto"):
        got = _step(module, x, example, mode=example.mode)
    assert testing.identical(x, before), "x was written to"
    plain = run(numbers, got.cotangents)
    true = run(testing.double(numbers), testing.double(got.cotangents))
    want = [(o.dtype, o.shape) for o in plain.outs]
    assert [(o.dtype, o.shape) for o in got.outs] == want, f"outputs are {[(o.dtype, o.shape) for o in got.outs]}"
    names = ["x"] * ("x" in example.wanted and example.mode == "grad")
    if example.parameters_want and example.mode == "grad":
        names += [name for name, _ in module.named_parameters()]
    largest = max(t.numel() for t in numbers)
    found = _deviations(got, true, plain, 64 * max(largest, 1), names, layers=True)
    _judge(found, true, run, [numbers, got.cotangents], torch.finfo(dtype).eps)


def _expected(problem: Exception) -> None:
    """Raises a complaint of the module's children again, unless it is about the input and not about the code."""
    known = ("more than 1 value", "Kernel size", "must have", "must be", "Expected", "expected", "stride")
    if not any(word in str(problem) for word in known):
        raise problem


# ---- strategies


def _meta(op: Op, args: dict[str, Any]) -> bool:
    """Whether the op's own check takes these arguments."""
    try:
        bound = op.bind((), args)
        op.check(*(torch.empty(v, device="meta") if isinstance(v, tuple) else v for v in bound))
    except (ValueError, TypeError):
        return False
    return True


@functools.cache
def _families(op: Op) -> tuple[tuple[tuple[str, int], ...], ...]:
    """The sizes (argument, axis) of all tensors, those together that are equal in all cases."""
    shapes = [{k: v for k, v in case.args.items() if isinstance(v, tuple)} for case in op.cases]
    slots = list(dict.fromkeys((k, i) for s in shapes for k, v in s.items() for i in range(len(v))))
    families: list[list[tuple[str, int]]] = []
    for slot in slots:
        for family in families:
            one = family[0]
            pairs = [
                (s[slot[0]][slot[1]], s[one[0]][one[1]])
                for s in shapes
                if slot[0] in s and one[0] in s and len(s[slot[0]]) > slot[1] and len(s[one[0]]) > one[1]
            ]
            if slot[0] != one[0] and pairs and all(a == b for a, b in pairs):
                family.append(slot)
                break
        else:
            families.append([slot])
    return tuple(map(tuple, families))


def _sized(args: dict[str, Any], sizes: dict[tuple[str, int], int]) -> dict[str, Any]:
    change = lambda k, v: tuple(sizes.get((k, i), n) for i, n in enumerate(v)) if isinstance(v, tuple) else v
    return {k: change(k, v) for k, v in args.items()}


def _resized(op: Op, args: dict[str, Any], family: Sequence[tuple[str, int]], to: int) -> dict[str, Any]:
    """The arguments with one family of sizes changed, and with it what must follow; unchanged where that isn't found.

    Tried in turn: that family alone; all sizes that are equal to it here; all that are multiples or divisors of it.
    """
    slots = {(k, i): n for k, v in args.items() if isinstance(v, tuple) for i, n in enumerate(v)}
    here = [s for s in family if s in slots]
    if not here or slots[here[0]] == to:
        return args
    now = slots[here[0]]
    alone = dict.fromkeys(here, to)
    equal = {s: to for s, n in slots.items() if n == now}
    others = [f for f in _families(op) if set(f) & set(slots) and f is not family]
    tries = [alone, equal]
    for other in others:  # a size that is a fixed multiple, or divides
        at = [s for s in other if s in slots]
        n = slots[at[0]]
        if now and n % now == 0 and n // now > 1:
            tries.append({**alone, **dict.fromkeys(at, to * (n // now))})
        if n:
            tries.append({**alone, **dict.fromkeys(at, max(1, (n // max(now, 1)) * to or to))})
            tries.append({**alone, **dict.fromkeys(at, 1)})
    for sizes in tries:
        if _meta(op, changed := _sized(args, sizes)):
            return changed
    return args


def _options(op: Op) -> dict[str, list[Any]]:
    """The values that cases give to each option, its default first."""
    found: dict[str, list[Any]] = {}
    for name, default in zip(op.arguments[op.count :], op._defaults[op.count :], strict=True):
        values = [default, *(case.args[name] for case in op.cases if name in case.args)]
        found[name] = list(dict.fromkeys(values))
    return found


def _number(values: Sequence[Any]) -> st.SearchStrategy[Any]:
    """One of the values, or, of numbers, one between them."""
    if len(values) > 1 and all(isinstance(v, float) for v in values):
        between = st.floats(min(values), max(values), allow_nan=False)
        return st.sampled_from(list(values)) | between
    return st.sampled_from(list(values))


def _elements(args: dict[str, Any]) -> int:
    return max((math.prod(v) for v in args.values() if isinstance(v, tuple)), default=0)


@st.composite
def layouts(draw: Any, dims: int) -> Layout:
    """Where a tensor lies."""
    kind = draw(st.sampled_from((*testing.LAYOUTS, "any")))
    if kind != "any":
        return kind
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(dims))
    order = tuple(draw(st.permutations(range(dims))))
    repeated = draw(st.sampled_from((None, *range(dims)))) if dims else None
    return Strided(order, each(0, 2), each(1, 2), draw(st.integers(0, 3)), repeated)


@st.composite
def op_examples(draw: Any, op: Op, backends: Sequence[str], most: int = 30_000) -> Example:
    """A call of `op` that its check accepts. most: elements of the largest tensor."""
    args = dict(draw(st.sampled_from([c for c in op.cases if "bench" not in c.tags])).args)
    for name, values in _options(op).items():
        if len(values) > 1 and draw(st.booleans()):
            changed = {**args, name: draw(_number(values))}
            args = changed if _meta(op, changed) else args
    for name in op.arguments[1 : op.count]:
        if draw(st.integers(0, 3)) == 3:
            if name in args:
                changed = {k: v for k, v in args.items() if k != name}
            else:
                donors = [c.args[name] for c in op.cases if name in c.args]
                if not donors:
                    continue
                changed = _fitted(op, args, name, draw(st.sampled_from(donors)))
            args = changed if _meta(op, changed) else args
    for family in _families(op):
        if draw(st.booleans()):
            changed = _resized(op, args, family, draw(st.sampled_from((*SIZES, 0))))
            args = changed if _elements(changed) <= most else args
    dtype = draw(st.sampled_from(("float32", "float64", *HALF)))
    tensors = [n for n in op.arguments[: op.count] if isinstance(args.get(n), tuple)]
    return Example(
        op.name,
        args,
        dtype=dtype,
        parameters=draw(st.sampled_from((dtype, "float32"))) if dtype in HALF else dtype,
        layouts={n: place for n in tensors if (place := draw(layouts(len(args[n])))) != "contiguous"},
        wanted=tuple(n for n in tensors if draw(st.integers(0, 3)) < 3),
        gradient=draw(st.sampled_from(testing.LAYOUTS)),
        backend=draw(st.sampled_from(backends)),
        mode=draw(st.sampled_from((*MODES[:1] * 4, *MODES))),
        ties=draw(st.booleans()) if "ties" in op.arguments else False,
        scale=draw(st.sampled_from(SCALES)),
        seed=draw(st.integers(0, 99)),
    )


def _fitted(op: Op, args: dict[str, Any], name: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """The arguments with a tensor more, in the sizes that its family has here."""
    if name in op.maps and op.maps[0] in args and op.maps[0] != name:
        return {**args, name: args[op.maps[0]]}
    sizes = list(shape)
    for i in range(len(shape)):
        family = next(f for f in _families(op) if (name, i) in f)
        here = [args[k][j] for k, j in family if k != name and k in args and len(args[k]) > j]
        sizes[i] = here[0] if here else sizes[i]
    return {**args, name: tuple(sizes)}


@functools.cache
def _channels(name: str) -> tuple[str, ...]:
    """The constructor's arguments that are always the number of channels of x."""
    block = BLOCKS[name]
    keys = dict.fromkeys(k for c in block.cases for k in c.args["args"])
    same = lambda k: all(c.args["args"].get(k, c.args["x"][1]) == c.args["x"][1] for c in block.cases)
    return tuple(k for k in keys if same(k) and any(isinstance(c.args["args"].get(k), int) for c in block.cases))


def _constructs(block: Block, args: dict[str, Any], x: tuple[int, ...]) -> bool:
    """Whether the constructor takes these arguments, and the module, run by its children, an x of this shape."""
    try:
        module = block.module(**copy.deepcopy(args)).eval()
        with torch.no_grad(), by_its_children():
            module(torch.zeros(x))
    except (ValueError, TypeError, RuntimeError, AssertionError, ZeroDivisionError):
        return False
    return True


@st.composite
def block_examples(draw: Any, block: Block, backends: Sequence[str], most: int = 20_000) -> Example:
    """A module of `block` whose children accept what is asked of them, and an x. most: elements of x."""
    start = draw(st.sampled_from(list(block.cases))).args
    args, x = dict(start["args"]), tuple(start["x"])
    options: dict[str, list[Any]] = {}
    for case in block.cases:
        for key, value in case.args["args"].items():
            if key not in _channels(block.name) and value not in options.setdefault(key, []):
                options[key].append(value)
    take = lambda args, x: (args, x) if math.prod(x) <= most and _constructs(block, args, x) else None
    for key, values in options.items():
        chance = draw(st.integers(0, 3))
        if chance == 3:
            args, x = take({**args, key: draw(st.sampled_from(values))}, x) or (args, x)
        elif chance == 2 and key in args:
            args, x = take({k: v for k, v in args.items() if k != key}, x) or (args, x)
    if draw(st.booleans()):
        c = draw(st.sampled_from(SIZES[:20]))
        args, x = take({k: c if k in _channels(block.name) else v for k, v in args.items()}, (x[0], c, *x[2:])) or (
            args,
            x,
        )
    for axis in (0, *range(2, len(x))):
        if draw(st.booleans()):
            size = draw(st.sampled_from((*SIZES[:5], 0) if axis == 0 else SIZES[:20]))
            args, x = take(args, (*x[:axis], size, *x[axis + 1 :])) or (args, x)
    place = draw(layouts(len(x)))
    return Example(
        block.name,
        args,
        x=x,
        dtype=draw(st.sampled_from(("float32", "float32", "float64", "bfloat16"))),
        layouts={} if place == "contiguous" else {"x": place},
        wanted=("x",) if draw(st.integers(0, 3)) < 3 else (),
        parameters_want=draw(st.integers(0, 3)) < 3,
        gradient=draw(st.sampled_from(testing.LAYOUTS)),
        backend=draw(st.sampled_from(backends)),
        mode=draw(st.sampled_from((*MODES[:1] * 4, *MODES))),
        training=draw(st.booleans()),
        ties=draw(st.booleans()),
        scale=draw(st.sampled_from(SCALES)),
        seed=draw(st.integers(0, 99)),
    )


def examples(name: str, backends: Sequence[str], most: int = 30_000) -> st.SearchStrategy[Example]:
    """Calls of the op or block of this name."""
    return op_examples(OPS[name], backends, most) if name in OPS else block_examples(BLOCKS[name], backends, most)


SUBJECTS = tuple(sorted([op.name for op in OPS.values() if op.formula is not None] + list(BLOCKS)))
