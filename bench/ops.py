"""`python -m bench ops`: every op against what a user would run instead, on the cases that ops declare for the bench.

eager       the original third-party module where there is one (timm's SEModule, equal weights), else the op's equations
inductor    torch.compile of that, and on a CPU once more with layout_optimization=False, which is often the faster one
fused       the op, on the backend that is its default; `fused module` is the third-party module after `fuse_`
clone       x.clone(): one read and one write of the feature map, the roofline
"""

import argparse
import itertools
import math
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fused_attn
from fused_attn import backend, testing
from fused_attn.registry import OPS, Case, Op, case

from . import measure, session
from .measure import MODES, Candidate, Row, Timing
from .support import importable, significant, table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
LAYOUTS = ("nchw", "channels_last")
HOST = case(x=(1, 64, 7, 7), w1=(4, 64), b1=(4,), w2=(64, 4), b2=(64,))  # so small that the host is all the time
SE = "pool_mlp_scale"


def bench_ops() -> list[Op]:
    """The ops that declare cases for the bench."""
    return [op for op in OPS.values() if any("bench" in c.tags for c in op.cases)]


def bench_cases(op: Op) -> list[Case]:
    """An op's cases for the bench."""
    return [c for c in op.cases if "bench" in c.tags]


def label(op: Op, c: Case) -> str:
    """A case in a few words: the shape of its first argument, and the options that it sets."""
    first, *rest = c.args.items()
    words = ["x".join(map(str, first[1]))]
    for name, value in rest:
        if not isinstance(value, tuple):
            words.append(f"{name}={value}")
        elif name in op.maps:
            words.append(name)
    return " ".join(words)


@dataclass
class Subject:
    """One implementation of one case: `function(*args)` for each set of arguments; `wrt`: what has gradients."""

    name: str
    source: str
    function: Callable[..., Any]
    args: list[tuple[Any, ...]]
    wrt: list[list[Tensor]]
    forced: str | None = None

    def candidate(self, mode: str, upstream: list[Tensor]) -> Candidate:
        """Ready to be timed. upstream: the gradients that backward starts from, one per set of arguments."""

        def forward(args: tuple[Any, ...]) -> Callable[[], object]:
            return lambda: self.function(*args)

        def backward(args: tuple[Any, ...], wrt: list[Tensor], dy: Tensor) -> Callable[[], object]:
            return lambda: torch.autograd.grad(_first(self.function(*args)), wrt, dy)

        if mode == "forward+backward":
            calls = [backward(*each) for each in zip(self.args, self.wrt, upstream, strict=True)]
        else:
            calls = [forward(args) for args in self.args]
        return Candidate(self.name, calls, lambda: self._context(mode))

    @contextmanager
    def _context(self, mode: str) -> Iterator[None]:
        with ExitStack() as stack:
            if mode == "forward":
                stack.enter_context(torch.inference_mode())
            if self.forced is not None:
                stack.enter_context(fused_attn.use_backend(self.forced))
            yield


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


_fresh = itertools.count()


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """torch.compile with a cache of its own: Dynamo counts recompilations per code object, so each gets a new one."""

    def call(*args: Any) -> Any:
        return function(*args)

    code = call.__code__.replace(co_name=f"call_{next(_fresh)}")
    alone = types.FunctionType(code, call.__globals__, code.co_name, call.__defaults__, call.__closure__)
    return torch.compile(alone, dynamic=False, options=options or None)


def draw(op: Op, c: Case, dtype: torch.dtype, device: str, layout: str, seed: int) -> tuple[Any, ...]:
    """An op's arguments for a case, drawn as the tests draw them; feature maps for a GPU are drawn there."""
    layout = "contiguous" if layout == "nchw" else layout
    if device == "cpu":
        return testing.draw(c, op, dtype, layout=layout, seed=seed)
    maps = {name: c.args[name] for name in op.maps if isinstance(c.args.get(name), tuple)}
    small = Case({**c.args, **dict.fromkeys(maps, (1, 1, 1))}, c.tags)
    args = list(testing.draw(small, op, dtype, device, layout=layout, seed=seed))
    generator = torch.Generator(device).manual_seed(seed)
    for name, shape in maps.items():
        values = torch.randn(shape, generator=generator, device=device, dtype=dtype)
        args[op.arguments.index(name)] = testing.arrange(values, layout)
    return tuple(args)


def third_party(op: Op, args: tuple[Any, ...]) -> nn.Module | None:
    """What users have today, with these weights: timm's SEModule, where that is what the op computes."""
    if op.name != SE or not importable("timm"):
        return None
    given = dict(zip(op.arguments, args, strict=True))
    usual = {"act": "relu", "gate": "sigmoid", "norm": "none", "max_weight": 0.0, "epilogue": "identity"}
    if any(given[k] != v for k, v in usual.items()) or given["residual"] is not None:
        return None
    if any(given[k] is None for k in ("b1", "w2", "b2")):
        return None
    from timm.layers import SEModule

    x, w1 = given["x"], given["w1"]
    module = SEModule(x.shape[1], rd_channels=w1.shape[0]).to(x.device, w1.dtype)
    with torch.no_grad():
        for layer, weight, bias in ((module.fc1, given["w1"], given["b1"]), (module.fc2, given["w2"], given["b2"])):
            layer.weight.copy_(weight.view_as(layer.weight))
            layer.bias.copy_(bias)
    return module


@dataclass
class Job:
    """One row of the table: a case of an op in one dtype, layout and mode."""

    op: Op
    case: Case
    dtype: str = "float32"
    layout: str = "nchw"
    mode: str = "forward"
    device: str = "cpu"
    baselines: tuple[str, ...] = ("eager", "inductor", "clone")
    backends: tuple[str, ...] = ()  # empty: the default one
    sets: list[tuple[Any, ...]] = field(default_factory=list, repr=False)

    @property
    def label(self) -> str:
        return label(self.op, self.case)

    @property
    def title(self) -> str:
        """What is said while it runs."""
        return f"{self.op.name} {self.label} {self.mode}"

    def subjects(self) -> list[Subject]:
        """Everything that is timed, with its arguments. What can't be built is there, and raises when it is called."""
        op = self.op
        first = draw(op, self.case, DTYPES[self.dtype], self.device, self.layout, seed=0)
        size = sum(t.nbytes for t in first if isinstance(t, Tensor))
        count = measure.sets_of_buffers(self.device, size)
        self.sets = [
            first, *(draw(op, self.case, DTYPES[self.dtype], self.device, self.layout, seed=i) for i in range(1, count))
        ]  # fmt: skip
        tensors = [[t for t in args if isinstance(t, Tensor) and t.is_floating_point()] for args in self.sets]
        for t in itertools.chain(*tensors):
            t.requires_grad_()
        formula = op.formula or op.eager
        eager = Subject("eager", "the op's equations", formula, self.sets, tensors)
        found = [Subject("fused", "the op", op, self.sets, tensors)]
        if self.backends:
            found = [Subject(f"fused:{b}", "the op", op, self.sets, tensors, forced=b) for b in self.backends]
        if (module := third_party(op, first)) is not None:
            xs = [(args[0],) for args in self.sets]
            wrt = [[x, *module.parameters()] for (x,) in xs]
            eager = Subject("eager", f"{type(module).__module__}.{type(module).__name__}", module, xs, wrt)
            if (fused := fused_module(op, first)) is not None:
                forced = self.backends[0] if self.backends else None
                name = f"fused module:{forced}" if forced else "fused module"
                wrt = [[x, *fused.parameters()] for (x,) in xs]
                found.append(Subject(name, "fuse_ of it", fused, xs, wrt, forced=forced))
        if "eager" in self.baselines:
            found.append(eager)
        if "inductor" in self.baselines:
            found.append(replace(eager, name="inductor", function=compiled(eager.function)))
            if self.device == "cpu":
                plain = compiled(eager.function, layout_optimization=False)
                found.append(replace(eager, name="inductor, no layout", function=plain))
        if "clone" in self.baselines:
            clones = [(args[0],) for args in self.sets]
            found.append(Subject("clone", "x.clone()", lambda x: x.detach().clone(), clones, [[x] for (x,) in clones]))
        return found

    def run(self, seconds: float, number: int = 0) -> list[Row]:
        """Times all of it, interleaved."""
        subjects = self.subjects()
        with torch.no_grad():
            out = _first(self.op(*self.sets[0]))
        upstream = [torch.randn_like(out) for _ in self.sets]
        candidates = [s.candidate("forward" if s.name == "clone" else self.mode, upstream) for s in subjects]
        timings = measure.interleave(candidates, seconds, self.device)
        x = self.sets[0][0]
        passes, ran = traffic(self, candidates[0])
        clone = timings.get("clone")
        rows = []
        for s in subjects:
            row = Row(
                self.op.name, self.label, self.mode, self.dtype, self.layout, self.device, s.name,
                ran if s.name.startswith("fused") else "", s.source, run=number,
            )  # fmt: skip
            timing = timings[s.name]
            if isinstance(timing, str):
                rows.append(replace(row, error=timing))
                continue
            own = 2 if s.name == "clone" else passes if s.name.startswith("fused") else None
            moved = None if not own else round(own * x.nbytes)
            rows.append(
                replace(
                    row,
                    **vars(timing),
                    passes=own,
                    bytes=moved,
                    gbps=None if moved is None else float(f"{moved / timing.median_us / 1e3:.4g}"),
                    of_clone=round(timing.median_us / clone.median_us, 3) if isinstance(clone, Timing) else None,
                )
            )
        return rows


def fused_module(op: Op, args: tuple[Any, ...]) -> nn.Module | None:
    """What a user has after `fuse_`: the third-party module, fused."""
    module = third_party(op, args)
    if module is None or not fused_attn.fuse_(module).fused:
        return None
    return module


def traffic(job: Job, candidate: Candidate) -> tuple[float, str]:
    """Passes over a feature map that one call may make, by the budgets of the ops it launches, and their backends.

    That a backend keeps to its budget is counted by the tests; here it says which bytes have to move.
    """
    size = job.sets[0][0].nbytes
    passes, backends, gradient = 0.0, dict[str, None](), False
    run = backend.run

    def counted(op: Op, args: tuple[Any, ...], *rest: Any) -> Any:
        nonlocal passes, gradient
        reads, writes = op.budget(*args) if op.budget is not None else (0, 0)
        largest = max((args[i].nbytes for _, i in op.map_indices if args[i] is not None), default=0)
        passes += (reads + writes) * largest / size
        gradient |= op.name != job.op.name
        return run(op, args, *rest)

    backend.run = counted
    try:
        with candidate.context(), backend.observe(lambda choice: backends.setdefault(choice.backend)):
            candidate.calls[0]()
    except Exception:
        return 0.0, "failed"
    finally:
        backend.run = run
    if job.mode == "forward+backward" and job.op.maps and not gradient:
        passes += 1  # dx was written by no op of ours, as where it is an expanded mean
    return passes, "+".join(backends)


class Floor(NamedTuple):
    """One line of the speed table: what was asked, what was measured."""

    name: str
    floor: float
    target: float | None
    measured: float | None
    detail: str

    @property
    def met(self) -> bool:
        return self.measured is not None and self.measured >= self.floor


# Squeeze-and-excitation, float32 NCHW, against eager: name, mode, batch (None: the host's case), floor, target.
FLOORS = (
    ("forward (inference), N=8", "forward", 8, 1.65, 2.1),
    ("forward (inference), N=1", "forward", 1, 2.8, 4.0),
    ("forward+backward, N=8", "forward+backward", 8, 1.75, 2.4),
    ("host cost at 1x64x7x7, no gradients", "forward", None, 4.0, 8.0),
    ("host cost at 1x64x7x7, recording", "recording", None, 3.0, 8.0),
)
INDUCTORS = ("inductor", "inductor, no layout")


def floors(rows: Sequence[Row]) -> list[Floor]:
    """The speed table, from the rows of one or more runs: the best counts. Ours is the fused module that users have."""
    host = label(OPS[SE], HOST)
    rows = [r for r in rows if r.op == SE and r.dtype == "float32" and r.layout == "nchw"]
    times: dict[tuple[int, str, str], dict[str, float]] = {}
    for r in rows:
        group = times.setdefault((r.run, r.mode, r.case), {})
        if r.median_us is not None:
            group[r.impl] = r.median_us
    ours = lambda group: group.get("fused module", group.get("fused"))
    runs = sorted({r.run for r in rows})
    found = []
    for name, mode, n, floor, target in FLOORS:
        best, detail = None, "not measured"
        for run in runs:
            groups = {
                c: g for (i, m, c), g in times.items()
                if i == run and m == mode and (c == host if n is None else c != host and c.startswith(f"{n}x"))
            }  # fmt: skip
            if not groups or any("eager" not in g or ours(g) is None for g in groups.values()):
                continue
            ratios = {c: g["eager"] / ours(g) for c, g in groups.items()}
            mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
            if best is None or mean > best:
                best, detail = mean, " ".join(f"{c.split('x', 1)[1]}:{v:.2f}" for c, v in ratios.items())
        found.append(Floor(name, floor, target, best, detail))
    for mode in ("forward", "forward+backward"):
        ratios = {}
        for (_, m, c), g in times.items():
            rivals = [g[i] for i in INDUCTORS if i in g]
            if m == mode and c != host and rivals and ours(g) is not None:
                ratios[c] = max(ratios.get(c, 0.0), min(rivals) / ours(g))
        worst = min(ratios, key=lambda c: ratios[c], default=None)
        detail = "not measured" if worst is None else " ".join(f"{c}:{v:.2f}" for c, v in ratios.items())
        found.append(
            Floor(f"{mode}, every shape: the better Inductor", 1.0, None, ratios[worst] if worst else None, detail)
        )
    return found


def summary(rows: Sequence[Row]) -> str:
    """One line per case and mode."""
    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    for r in rows:
        groups.setdefault((r.op, r.case, r.mode, r.dtype, r.layout, r.run), {})[r.impl] = r
    lines = []
    for (name, shape, mode, dtype, layout, _), by in groups.items():
        cell = lambda r: "–" if r is None else "failed" if r.median_us is None else significant(r.median_us)
        eager, clone = by.get("eager"), by.get("clone")
        inductors = [by[i] for i in INDUCTORS if i in by]
        finished = [r for r in inductors if r.median_us is not None]
        inductor = min(finished, key=lambda r: r.median_us or 0.0) if finished else next(iter(inductors), None)
        for r in (r for impl, r in by.items() if impl.startswith("fused")):
            over = lambda other, r=r: (
                f"{other.median_us / r.median_us:.2f}" if other and other.median_us and r.median_us else "–"
            )
            lines.append([
                name, shape, mode, dtype, layout, f"{r.impl} ({r.backend})",
                cell(eager), cell(inductor), cell(r), cell(clone), over(eager), over(inductor),
                *("–" if v is None else f"{v:.3g}" for v in (r.of_clone, r.passes, r.gbps)),
            ])  # fmt: skip
    head = ["op", "case", "mode", "dtype", "layout", "ours"]
    head += ["eager µs", "Inductor µs", "ours µs", "clone µs", "vs eager", "vs Inductor", "÷ clone", "passes", "GB/s"]
    return table(head, lines, right=6)


def floor_table(found: Sequence[Floor]) -> str:
    """The speed table, to be read."""
    show = lambda v: "–" if v is None else f"{v:.2f}"
    rows = [
        [f.name, show(f.floor), show(f.target), show(f.measured), "met" if f.met else "MISSED", f.detail] for f in found
    ]
    head = ["SE, float32 NCHW, speed-up", "floor", "target", "measured", ""]
    return table(head, [r[:5] for r in rows]) + "\n\n" + "\n".join(f"{r[0]}: {r[5]}" for r in rows)


def parser(add: Any) -> argparse.ArgumentParser:
    """The options of `python -m bench ops`."""
    p: argparse.ArgumentParser = add("ops", help="time every op against eager, Inductor and x.clone()")
    p.add_argument("--op", nargs="+", choices=[op.name for op in bench_ops()], help="only these ops")
    p.add_argument("--case", default="", help="only cases whose label contains this, such as 8x64x56x56")
    p.add_argument("--backend", nargs="+", default=[], choices=backend.BACKENDS[1:], help="force these (default: auto)")
    session.options(p, modes=3, mode=MODES, dtype=DTYPES, layout=LAYOUTS, baseline=("eager", "inductor", "clone"))
    return p


def jobs(options: argparse.Namespace) -> list[Job]:
    """What the options select."""
    device = options.device or measure.default_device()
    common = {"device": device, "baselines": tuple(options.baseline), "backends": tuple(options.backend)}
    if options.check_floors:
        modes = ("forward", "forward+backward")
        found = [Job(OPS[SE], c, mode=m, **common) for c in bench_cases(OPS[SE]) for m in modes]
        common["baselines"] = ("eager", "clone")
        return found + [Job(OPS[SE], HOST, mode=m, **common) for m in ("forward", "recording")]
    found = []
    for op in bench_ops():
        if options.op and op.name not in options.op:
            continue
        cases = bench_cases(op)
        if options.quick and len(cases) > 2:
            cases = [cases[0], cases[-1]]
        for c, mode, dtype, layout in itertools.product(
            cases, session.chosen(options.mode, MODES), session.chosen(options.dtype, DTYPES),
            session.chosen(options.layout, LAYOUTS),
        ):  # fmt: skip
            if options.case in label(op, c) and (op.maps or layout == "nchw"):
                found.append(Job(op, c, dtype, layout, mode, **common))
    return found


def main(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Runs `python -m bench ops`."""
    selected = jobs(options)
    if not selected:
        measure.log("no case matches the selection")
        return 2
    if options.quick:
        options.seconds = 0.3
    name = "floors" if options.check_floors else "ops"
    rows, found = session.run("ops", selected, options, arguments, floors, name)
    print(summary(rows))
    session.failures(rows)
    if found:
        print(f"\n{floor_table(found)}")
    return 0 if all(f.met for f in found) else 1
