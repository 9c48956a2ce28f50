"""Cases, float64 truth and tolerances: what our suites are made of, and `check`, the same for your own module.

    report = fused_attn.testing.check(module_or_op, *inputs)
    print(report)          # one line per property: errors per dtype, gradcheck, strides, determinism, inputs left alone
    assert report          # in a test; report.raise_if_failed() elsewhere

Tolerance. An error is max |got − truth| / max |truth|, over one tensor, truth being float64. Allowed is the
resolution of the dtype that holds the result, plus 4·√terms times that of the arithmetic (float32 for half
precision). `terms` is the length of the longest sum, declared by each op: rounding errors of a sum grow like a random
walk, and in blocks, as every backend sums, slower still. A bound linear in `terms` would hide a lost term of a long
sum. Nothing is allowed more than 4 times the error of plain autograd in that dtype, plus 16 resolutions.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backend as backends
from .layout import accumulator
from .registry import Case, Op

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Those that a compiled backend walks as they are, and those it may refuse: the op then copies, or falls back.
WALKABLE = ("contiguous", "channels_last", "sliced", "sliced_channels_last")
LAYOUTS = (*WALKABLE, "expanded", "spread", "transposed")


def candidates(device: str = "cpu") -> tuple[str, ...]:
    """The backends that may run on a device: Triton on the CPU only in its interpreter."""
    usual = backends.ORDER.get(device, ("eager",))
    return ("triton", *usual) if device == "cpu" and backends.interpreting() else usual


def missing(op: Op, backend: str) -> str | None:
    """Why `backend` can't run `op` on this machine, whatever the arguments; None where it can."""
    found = backends.implementation(op, backend)
    return found if isinstance(found, str) else None


def arrange(values: Tensor, layout: str) -> Tensor:
    """The same values, lying in memory as `layout` says (but "expanded" repeats one of them everywhere).

    layout: "contiguous" | "channels_last" (C innermost, any number of dimensions) | "sliced" and "sliced_channels_last"
        (every second sample and some channels of a larger tensor, at an odd storage offset; between them lie NaNs) |
        "expanded" (all strides 0, as the gradient of a sum) | "spread" (with gaps between neighbours) |
        "transposed" (the last two dimensions swapped in memory)
    """
    if layout == "contiguous" or values.dim() == 0:
        return values.clone(memory_format=torch.contiguous_format)
    if layout == "expanded":
        return values.flatten()[:1].view((1,) * values.dim()).expand(values.shape) if values.numel() else values
    if layout == "spread":
        return torch.stack([values, torch.full_like(values, torch.nan)], -1)[..., 0]
    if layout == "transposed":
        first, last = (-2, -1) if values.dim() > 3 else (0, -1)
        return values.transpose(first, last).clone(memory_format=torch.contiguous_format).transpose(first, last)
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(map(repr, LAYOUTS))}; got {layout!r}")
    pixels = layout.endswith("channels_last") and values.dim() > 2
    inner = values.movedim(1, -1) if pixels else values
    if layout == "channels_last":
        out = torch.empty(inner.shape, dtype=values.dtype, device=values.device)
    else:
        shape = list(inner.shape)
        at = len(shape) - 1 if pixels else min(1, len(shape) - 1)
        shape[0] *= 2
        if at:
            shape[at] += 3
        store = torch.empty(1 + math.prod(shape), dtype=values.dtype, device=values.device)
        if values.is_floating_point():
            store.fill_(math.nan)
        out = store[1:].view(shape)[::2]
        out = out.narrow(at, 2, inner.shape[at]) if at else out
    out = out.movedim(-1, 1) if pixels else out
    return out.copy_(values)


def draw(
    case: Case,
    op: Op,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    layout: str = "contiguous",
    parameters: torch.dtype | None = None,
    ties: bool = False,
    seed: int = 0,
) -> tuple[Any, ...]:
    """The arguments of `op` that `case` describes, all of them, positional; the same values for the same seed.

    dtype: of the first argument and of all feature maps; parameters: of every other tensor (None: dtype)
    layout: of every tensor, as in `arrange`
    ties: small integers as feature maps, so that maxima occur more than once
    """
    generator = torch.Generator().manual_seed(seed)
    out = []
    for name, value in zip(op.arguments, op.bind((), dict(case.args)), strict=True):
        if not isinstance(value, tuple):
            out.append(value)
            continue
        t = torch.randn(value, generator=generator, dtype=torch.float64)
        feature = name in op.maps or name == op.arguments[0]
        if feature and ties:
            t = t.clamp(-1.6, 1.6).round()
        elif name.endswith("_var"):
            t = t.abs() + 0.5
        elif name.startswith("w") and len(value) > 1:  # a dense layer that keeps descriptors O(1)
            t = t / math.sqrt(value[1])
        t = t.to(dtype if feature or parameters is None else parameters).to(device)
        out.append(arrange(t, layout))
    return tuple(out)


class Answer(NamedTuple):
    """What a function gave: its outputs, what was fed to its backward, and a gradient for each floating argument."""

    outs: tuple[Tensor, ...]
    cotangents: tuple[Tensor, ...]
    grads: tuple[Tensor | None, ...]


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _leaves(out: Any) -> tuple[Tensor, ...]:
    return tuple(t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))


def cotangent(out: Tensor, layout: str = "contiguous", seed: int = 1) -> Tensor:
    """A gradient for `out`, drawn in its shape and dtype; "expanded" is that of `out.sum()`."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    values = torch.ones_like(values) if layout == "expanded" else values
    return arrange(values.to(out.dtype).to(out.device), layout)


def answer(
    function: Callable[..., Any],
    args: Sequence[Any],
    *,
    extra: Sequence[Tensor] = (),
    gradient: str = "contiguous",
    cotangents: Sequence[Tensor] | None = None,
    seed: int = 1,
) -> Answer:
    """Runs `function(*args)` forward and backward.

    extra: further leaves that receive a gradient, after the floating arguments: a module's parameters
    gradient: layout of the gradients that are fed in, drawn anew; or given as `cotangents`, for the first outputs
    """
    leaves = [a.detach().requires_grad_() if _floating(a) else a for a in args]
    wanted = [a for a in leaves if isinstance(a, Tensor) and a.requires_grad] + [*extra]
    outs = _leaves(function(*leaves))
    if cotangents is None:
        cotangents = [cotangent(o, gradient, seed) for o in outs if o.requires_grad]
        roots = [o for o in outs if o.requires_grad]
    else:
        roots = [o.to(c.dtype) for o, c in zip(outs, cotangents, strict=False)]
    grads = torch.autograd.grad(roots, wanted, cotangents, allow_unused=True) if roots else (None,) * len(wanted)
    return Answer(tuple(o.detach() for o in outs), tuple(cotangents), grads)


def double(args: Sequence[Any]) -> tuple[Any, ...]:
    """The same values in float64, contiguous."""
    return tuple(a.detach().double().contiguous() if _floating(a) else a for a in args)


def truth(op: Op, args: Sequence[Any], got: Answer) -> Answer:
    """The op's formula in float64, differentiated by autograd, at the same arguments and fed what `got` was fed."""
    assert op.formula is not None
    return answer(op.formula, double(args), cotangents=double(got.cotangents))


def plain(op: Op, args: Sequence[Any], got: Answer) -> Answer:
    """The op's formula in the dtype of its arguments, differentiated by autograd: whose error ours is measured by."""
    assert op.formula is not None
    return answer(op.formula, tuple(args), cotangents=got.cotangents)


def error(got: Tensor, true: Tensor, unit: float = 1.0) -> float:
    """max |got − true| / max |true|; inf where a NaN or an infinity stands in one of them only.

    In units of `unit` where `true` is below 1e-12 of it: that is what float64 leaves of a sum that is 0, such as the
    gradient of a bias that a batch norm takes away again, and no dtype keeps a digit of it.
    """
    got, true = got.detach().double(), true.detach().double()
    if got.shape != true.shape or not torch.equal(got.isnan(), true.isnan()):
        return math.inf
    special = true.isnan() | true.isinf() | got.isinf()
    if not torch.equal(got[special & ~true.isnan()], true[special & ~true.isnan()]):
        return math.inf
    got, true = got[~special], true[~special]
    if not got.numel():
        return 0.0
    scale = float(true.abs().max())
    return float((got - true).abs().max()) / (scale if scale > 1e-12 * unit else unit)


def tolerance(dtype: torch.dtype, terms: int, eager: float = math.inf) -> float:
    """The error that is allowed a result held in `dtype` of sums of `terms` terms, where plain autograd has `eager`."""
    resolution = torch.finfo(dtype).eps
    bound = resolution + 4 * math.sqrt(max(terms, 1)) * torch.finfo(accumulator(dtype)).eps
    return min(bound, 4 * eager + 16 * resolution)


class Deviation(NamedTuple):
    """One tensor against its truth."""

    name: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether the error is allowed."""
        return self.error <= self.allowed

    def __str__(self) -> str:
        return f"{self.name}: error {self.error:.1e}, allowed {self.allowed:.1e}"


def deviations(got: Answer, true: Answer, eager: Answer, terms: int, names: Sequence[str]) -> list[Deviation]:
    """Every output and gradient of `got` against `true`, beside what plain autograd (`eager`) has.

    names: of the gradients
    """
    found = []
    for i, (out, want) in enumerate(zip(got.outs, true.outs, strict=True)):
        name = f"output {i}" if len(got.outs) > 1 else "output"
        if out.is_floating_point():
            usual = error(eager.outs[i], want)
            found.append(Deviation(name, error(out, want), tolerance(out.dtype, terms, usual)))
        else:
            found.append(Deviation(name, 0.0 if torch.equal(out, want.to(out.dtype)) else math.inf, 0.0))
    finite = [float(g.nan_to_num(0, 0, 0).abs().max()) for g in true.grads if g is not None and g.numel()]
    unit = max(finite, default=0.0) or 1.0
    for name, mine, theirs, plain in zip(names, got.grads, true.grads, eager.grads, strict=True):
        present = mine if mine is not None else theirs
        if present is None:
            continue
        # No gradient is as good as one that is 0.
        g = torch.zeros_like(present) if mine is None else mine
        t = torch.zeros_like(present) if theirs is None else theirs
        usual = error(plain, t, unit) if plain is not None else math.inf
        allowed = tolerance(g.dtype, terms, usual)
        if t.numel() and float(t.abs().max()) <= 1e-12 * unit:  # all of it is rounding: no more of it than usual
            allowed = max(allowed, 16 * usual)
        found.append(Deviation(f"d{name}", error(g, t, unit), allowed))
    return found


def same_bits(a: Answer, b: Answer) -> bool:
    """Whether two answers agree to the bit; NaNs agree."""
    pairs = [*zip(a.outs, b.outs, strict=True), *zip(a.grads, b.grads, strict=True)]
    return all((s is None and t is None) or identical(s, t) for s, t in pairs)  # type: ignore[arg-type]


def identical(s: Tensor, t: Tensor) -> bool:
    """Equal shape, dtype and values, a NaN being equal to a NaN. +0 and −0 differ."""
    if s.shape != t.shape or s.dtype != t.dtype:
        return False
    if not s.is_floating_point():
        return torch.equal(s, t)
    return torch.equal(s.nan_to_num(), t.nan_to_num()) and all(
        torch.equal(f(s), f(t)) for f in (torch.isnan, torch.isinf, torch.signbit)
    )


def names(op: Op, args: Sequence[Any]) -> list[str]:
    """The arguments that take a gradient, in the order of `Answer.grads`."""
    return [name for name, value in zip(op.arguments, args, strict=True) if _floating(value)]


def terms(op: Op, args: Sequence[Any]) -> int:
    """The declared length of the longest sum of a forward or backward result."""
    x = args[0]
    return int(op.reduces(*args)) + (x.shape[0] if x.dim() else 1)  # gradients of weights also sum over the batch


class Finding(NamedTuple):
    """One property: whether it holds, and what was measured."""

    what: str
    ok: bool
    detail: str


@dataclass
class CheckReport:
    """What `check` found. True where everything holds; `print` shows it; `findings` has it line by line."""

    subject: str
    backend: str
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether every property holds."""
        return all(f.ok for f in self.findings)

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        width = max((len(f.what) for f in self.findings), default=0)
        lines = [f"  {'ok  ' if f.ok else 'FAIL'}  {f.what:{width}}  {f.detail}".rstrip() for f in self.findings]
        failed = sum(not f.ok for f in self.findings)
        verdict = f"{failed} of {len(lines)} FAILED" if failed else f"all {len(lines)} hold"
        return "\n".join([f"{self.subject} on {self.backend}: {verdict}", *lines])

    def __repr__(self) -> str:
        """What pytest shows of `assert check(...)`: the failures first, because it cuts long values."""
        failed = [f"{f.what}: {f.detail}" for f in self.findings if not f.ok]
        return f"<check of {self.subject} on {self.backend}: {'; '.join(failed) or 'ok'}>"

    def raise_if_failed(self) -> "CheckReport":
        """Raises AssertionError with the whole report where a property doesn't hold; else returns it."""
        if not self:
            raise AssertionError(str(self))
        return self


class _Subject:
    """What `check` runs: an op against its formula; a module or another function against itself in float64 on eager."""

    def __init__(self, subject: Any, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        self.subject, self.options = subject, options
        self.op = subject if isinstance(subject, Op) else None
        self.module = subject if isinstance(subject, torch.nn.Module) else None
        if self.op is not None:
            if self.op.formula is None:
                raise ValueError(f"{self.op.name} has no formula of its own: check the op that it is the backward of")
            self.inputs = self.op.bind(inputs, options)
            self.names = names(self.op, self.inputs)
        else:
            self.inputs = inputs
            self.names = [f"input {i}" for i, v in enumerate(inputs) if _floating(v)]
        if self.module is not None:
            self.names += [n for n, p in self.module.named_parameters() if p.requires_grad]
        if not any(_floating(v) for v in self.inputs):
            raise TypeError("inputs must hold at least one floating-point tensor; got none")

    @property
    def title(self) -> str:
        """What the report calls it."""
        return self.op.name if self.op else getattr(self.subject, "__name__", type(self.subject).__name__)

    def cast(self, dtype: torch.dtype, layout: str, parameters: torch.dtype | None = None) -> tuple[Any, ...]:
        """The inputs in a dtype and layout. parameters: the dtype of an op's arguments that are no feature maps."""
        out = []
        for i, v in enumerate(self.inputs):
            if _floating(v):
                small = self.op is not None and i > 0 and self.op.arguments[i] not in self.op.maps
                v = v.detach().to(parameters if small and parameters is not None else dtype)
                v = arrange(v, layout if v.dim() > 2 or layout.startswith("sliced") else "contiguous")
            out.append(v)
        return tuple(out)

    def run(self, args: tuple[Any, ...], dtype: torch.dtype, eager: bool = False, **how: Any) -> Answer:
        """Forward and backward at `args`, with the module, if it is one, in `dtype`. eager: of an op, its formula."""
        if self.module is not None:
            module = copy.deepcopy(self.module).to(dtype)
            return answer(module, args, extra=[p for p in module.parameters() if p.requires_grad], **how)
        if self.op is not None:
            return answer(self.op.formula if eager else self.op, args, **how)  # type: ignore[arg-type]
        return answer(lambda *a: self.subject(*a, **self.options), args, **how)

    def compare(self, args: tuple[Any, ...], dtype: torch.dtype, got: Answer) -> list[Deviation]:
        """Every output and gradient against float64."""
        with backends.use_backend("eager"):
            flat = lambda tensors: tuple(
                t.contiguous() if _floating(t) else t for t in tensors
            )  # what seldom goes wrong
            eager = self.run(flat(args), dtype, True, cotangents=flat(got.cotangents))
            true = self.run(double(args), torch.float64, True, cotangents=double(got.cotangents))
        # What a module sums is not declared: it is held to a multiple of its own error, and to a wide bound.
        length = terms(self.op, self.inputs) if self.op else 64 * max(v.numel() for v in self.inputs if _floating(v))
        return deviations(got, true, eager, length, self.names)


def check(
    subject: Any,
    *inputs: Any,
    backend: str | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    **options: Any,
) -> CheckReport:
    """Checks outputs and gradients of an op, a module or a function in every way that has gone wrong elsewhere.

    subject: an op (truth: its formula), an nn.Module or another function (truth: itself in float64 on
        the eager backend; a module is copied first, and stays as it is)
    inputs: what it is called with; values are kept, dtypes and strides varied
    backend: run on this one ("eager", "triton", "cpp"); None: on the one in force, usually the automatic choice
    dtypes: to measure errors in; None: float32, float64, bfloat16, float16
    options: keyword arguments of an op or function

    Checked: errors against float64 in each dtype; gradcheck; inputs and gradients that are channels_last, sliced,
    expanded, transposed; half-precision inputs beside float32 parameters (ops); equal bits, run to run; inputs.
    """
    dtypes = DTYPES if dtypes is None else tuple(dtypes)
    it = _Subject(subject, inputs, options)
    report = CheckReport(it.title, backend or backends.forced())
    with backends.use_backend(report.backend):
        for dtype in dtypes:
            with _finding(report, f"error, {_short(dtype)}"):
                args = it.cast(dtype, "contiguous")
                _judge(report, f"error, {_short(dtype)}", it.compare(args, dtype, it.run(args, dtype)))
        if it.op is not None and len(it.names) > 1:
            for dtype in (d for d in dtypes if d in (torch.bfloat16, torch.float16)):
                what = f"error, {_short(dtype)} beside float32 parameters"
                with _finding(report, what):
                    args = it.cast(dtype, "contiguous", torch.float32)
                    _judge(report, what, it.compare(args, dtype, it.run(args, dtype)))
        with _finding(report, "gradcheck"):
            report.findings.append(_gradcheck(it))
        main = dtypes[0]
        for layout in (*WALKABLE[1:], "transposed"):
            with _finding(report, f"input {layout}"):
                args = it.cast(main, layout)
                got = it.run(args, main)
                complaint = _strides(got, args) if it.op is not None else ""
                _judge(report, f"input {layout}", it.compare(args, main, got), complaint)
        for layout in LAYOUTS[1:]:
            with _finding(report, f"gradient {layout}"):
                args = it.cast(main, "contiguous")
                _judge(report, f"gradient {layout}", it.compare(args, main, it.run(args, main, gradient=layout)))
        with _finding(report, "determinism"):
            args = it.cast(main, "contiguous")
            same = same_bits(it.run(args, main), it.run(args, main))
            report.findings.append(
                Finding("determinism", same, "equal bits, run to run" if same else "two runs differ")
            )
        with _finding(report, "inputs unmodified"):
            args = it.cast(main, "contiguous")
            before = [a.clone() if isinstance(a, Tensor) else a for a in args]
            it.run(args, main)
            pairs = zip(before, args, strict=True)
            same = all(identical(b, a) for b, a in pairs if isinstance(a, Tensor))
            report.findings.append(Finding("inputs unmodified", same, "" if same else "an input was written to"))
    return report


@contextmanager
def _finding(report: CheckReport, what: str) -> Iterator[None]:
    """An exception is a finding as well: the report goes on."""
    try:
        yield
    except Exception as problem:
        text = next(iter(str(problem).strip().splitlines()), "")
        report.findings.append(Finding(what, False, f"raised {type(problem).__name__}: {text}"))


def _judge(report: CheckReport, what: str, found: list[Deviation], complaint: str = "") -> None:
    worst = max(found, key=lambda d: d.error / d.allowed if d.allowed else d.error)
    bad = [str(d) for d in found if not d.ok] + ([complaint] if complaint else [])
    report.findings.append(Finding(what, not bad, "; ".join(bad) or f"worst of {len(found)}: {worst}"))


def _strides(got: Answer, args: tuple[Any, ...]) -> str:
    """What is wrong with the strides of outputs that have the first input's shape, and of its gradient; or nothing."""
    x = next(a for a in args if _floating(a))
    want = torch.empty_like(x).stride()
    pairs = [("output", o) for o in got.outs if o.shape == x.shape] + [("its gradient", got.grads[0])]
    wrong = [f"{n} has {tuple(t.stride())}" for n, t in pairs if t is not None and t.stride() != want]
    return f"strides should be {want}: {', '.join(wrong)}" if wrong and x.dim() > 2 else ""


def _gradcheck(it: _Subject) -> Finding:
    args = it.cast(torch.float64, "contiguous")
    leaves = [a.requires_grad_() if _floating(a) else a for a in args]
    small = sum(a.numel() for a in leaves if _floating(a)) <= 400
    count, function = len(leaves), it.subject
    extra: tuple[Tensor, ...] = ()
    if it.module is not None:
        module = copy.deepcopy(it.module).double()
        named = {n: p for n, p in module.named_parameters() if p.requires_grad}
        extra = tuple(p.detach().clone().requires_grad_() for p in named.values())
        function = lambda *a: torch.func.functional_call(
            module, dict(zip(named, a[count:], strict=True)), tuple(a[:count])
        )
    elif it.op is None:
        function = lambda *a: it.subject(*a, **it.options)
    first = lambda *a: tuple(o for o in _leaves(function(*a)) if o.requires_grad)
    torch.autograd.gradcheck(first, (*leaves, *extra), fast_mode=not small)
    return Finding("gradcheck", True, "float64, every entry" if small else "float64, random projections")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


__all__ = [
    "DTYPES",
    "LAYOUTS",
    "WALKABLE",
    "Answer",
    "CheckReport",
    "Deviation",
    "Finding",
    "answer",
    "arrange",
    "candidates",
    "check",
    "cotangent",
    "deviations",
    "double",
    "draw",
    "error",
    "identical",
    "missing",
    "names",
    "plain",
    "same_bits",
    "terms",
    "tolerance",
    "truth",
]
