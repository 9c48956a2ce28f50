"""`python -m bench ops`: every op against what a user would run instead, on the cases that ops declare for the bench.

eager       the original third-party module where there is one (timm's SEModule, equal weights), else the op's equations
inductor    torch.compile of that, and on a CPU once more with layout_optimization=False, which is often the faster one
fused       the op, on the backend that is its default; `fused module` is the third-party module after `fuse_`
clone       x.clone(): one read and one write of the feature map, the roofline
"""

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

import fused_attn
from fused_attn import backend, testing
from fused_attn.registry import OPS, Case, Op

from . import figures, measure, session, shapes
from .figures import summary
from .floors import HOST, floor_table, floors
from .labels import SE, bench_cases, bench_ops, label
from .measure import MODES, Candidate, Row
from .subjects import BASELINES, Subject, clones, first, rivals
from .support import importable

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
LAYOUTS = ("nchw", "channels_last")


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
        drawn = draw(op, self.case, DTYPES[self.dtype], self.device, self.layout, seed=0)
        size = sum(t.nbytes for t in drawn if isinstance(t, Tensor))
        count = measure.sets_of_buffers(self.device, size)
        self.sets = [
            drawn, *(draw(op, self.case, DTYPES[self.dtype], self.device, self.layout, seed=i) for i in range(1, count))
        ]  # fmt: skip
        tensors = [[t for t in args if isinstance(t, Tensor) and t.is_floating_point()] for args in self.sets]
        for t in itertools.chain(*tensors):
            t.requires_grad_()
        data = tuple(i for _, i in op.map_indices) or (0,)
        eager = Subject("eager", "the op's equations", op.formula or op.eager, self.sets, tensors, data=data)
        found = [Subject("fused", "the op", op, self.sets, tensors, data=data)]
        if self.backends:
            found = [replace(found[0], name=f"fused:{b}", forced=b) for b in self.backends]
        if (module := third_party(op, drawn)) is not None:
            xs = [(args[0],) for args in self.sets]
            wrt = [[x, *module.parameters()] for (x,) in xs]
            eager = Subject("eager", f"{type(module).__module__}.{type(module).__name__}", module, xs, wrt)
            if (fused := fused_module(op, drawn)) is not None:
                forced = self.backends[0] if self.backends else None
                name = f"fused module:{forced}" if forced else "fused module"
                wrt = [[x, *fused.parameters()] for (x,) in xs]
                found.append(Subject(name, "fuse_ of it", fused, xs, wrt, forced=forced))
        if "eager" in self.baselines:
            found.append(eager)
        found += rivals(eager, self.baselines, self.device)
        if "clone" in self.baselines:
            found.append(clones([args[0] for args in self.sets]))
        return found

    def candidates(self, subjects: Sequence[Subject]) -> list[Candidate]:
        """What is timed. A clone is timed in forward, whatever the mode."""
        with torch.no_grad():
            out = first(self.op(*self.sets[0]))
        upstream = [torch.randn_like(out) for _ in self.sets]
        return [s.candidate("forward" if s.name == "clone" else self.mode, upstream) for s in subjects]

    def small(self) -> list[Candidate]:
        """Ours and eager on so small a map that the host is most of the time. Nothing where the op has no such case."""
        if (c := shapes.small(self.op, self.case)) is None:
            return []
        job = replace(self, case=c, baselines=tuple(b for b in self.baselines if b == "eager"), sets=[])
        return job.candidates(job.subjects())

    def run(self, seconds: float, number: int = 0) -> list[Row]:
        """Times all of it, interleaved."""
        subjects = self.subjects()
        candidates = self.candidates(subjects)
        size = self.sets[0][0].nbytes
        base = Row(self.op.name, self.label, self.mode, self.dtype, self.layout, self.device, "", "", "", run=number)
        return figures.rows(base, subjects, candidates, seconds, size, self.op, self.small())


def fused_module(op: Op, args: tuple[Any, ...]) -> nn.Module | None:
    """What a user has after `fuse_`: the third-party module, fused."""
    module = third_party(op, args)
    if module is None or not fused_attn.fuse_(module).fused:
        return None
    return module


def parser(add: Any) -> argparse.ArgumentParser:
    """The options of `python -m bench ops`."""
    p: argparse.ArgumentParser = add("ops", help="time every op against eager, Inductor and x.clone()")
    p.add_argument("--op", nargs="+", choices=[op.name for op in bench_ops()], metavar="NAME", help="only these ops")
    p.add_argument("--case", default="", help="only cases whose label contains this, such as 8x64x56x56")
    p.add_argument("--backend", nargs="+", default=[], choices=backend.BACKENDS[1:], help="force these (default: auto)")
    session.shape_options(p)
    session.options(p, modes=3, mode=MODES, dtype=DTYPES, layout=LAYOUTS, baseline=BASELINES)
    return p


def cases(op: Op, options: argparse.Namespace, device: str) -> list[Case]:
    """An op's cases: those that it declares, or, of each kind of them, one for each shape of the sets asked for."""
    declared = bench_cases(op)
    if not options.shapes:
        return [declared[0], declared[-1]] if options.quick and len(declared) > 2 else declared
    found = {}
    kind = lambda c: tuple((k, None if isinstance(v, tuple) else v) for k, v in c.args.items())
    for n, (c, s, h) in session.shapes_of(options, device):
        for template in {kind(c): c for c in declared}.values():
            made = shapes.rescaled(op, template, n, c, s, h)
            if made is not None:
                found.setdefault(label(op, made), made)
    return list(found.values())


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
        for c, mode, dtype, layout in itertools.product(
            cases(op, options, device), session.chosen(options.mode, MODES), session.chosen(options.dtype, DTYPES),
            session.chosen(options.layout, LAYOUTS),
        ):  # fmt: skip
            if options.case in label(op, c) and (op.maps or layout == "nchw"):
                found.append(Job(op, c, dtype, layout, mode, **common))
    return found


def main(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Runs `python -m bench ops`."""
    session.refuse_ignored(options, "op", "case", "shapes", "mode", "dtype", "layout")
    selected = jobs(options)
    if not selected:
        measure.log("no case matches the selection")
        return 2
    if options.quick:
        options.seconds = min(options.seconds, 0.3)
    name = "floors" if options.check_floors else "ops"
    rows, found = session.run("ops", selected, options, arguments, floors, name)
    if options.format == "table":
        print(summary(rows))
    session.failures(rows)
    if found:
        print(f"\n{floor_table(found, 1 + max(r.run for r in rows))}")
    return 0 if all(f.met for f in found) else 1
