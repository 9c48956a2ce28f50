"""`python -m bench blocks`: every mechanism against what its users run, at the shapes of ResNet-50.

eager        the third-party module (timm, pytorchcv); where no package has the mechanism, its published equations
             (published.py). SK, split attention and PSA without their convolutions, which are the same for both
inductor     torch.compile of that, and on a CPU once more with layout_optimization=False
fused        the same weights after `fuse_`, or in the library's block
clone        x.clone(): one read and one write of the feature map

forward runs in evaluation and inference mode; forward+backward in training, with gradients of x and every parameter.
"""

import argparse
import copy
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fused_attn
from fused_attn import backend, plan
from fused_attn.blocks import normed

from . import measure, published, session
from .measure import Row, Timing
from .ops import DTYPES, INDUCTORS, LAYOUTS, Floor, Subject, compiled, summary
from .support import importable, table

MODES = ("forward", "forward+backward")
WITHOUT = "fused without the gate"
TAIL = "tail with SE"  # BatchNorm, SE, shortcut, ReLU
SHAPES = ((256, 56), (512, 28), (1024, 14), (2048, 7))  # C and H = W of the stages of ResNet-50


class Pair(NamedTuple):
    """The same mechanism twice: as its users have it, and fused. Each takes the tensors of `inputs`.

    beside: something else that is timed with them, where there is something to compare with
    """

    eager: Callable[..., Any]
    fused: Callable[..., Any]
    source: str
    beside: tuple[str, Callable[..., Any]] | None = None


def _converted(module: nn.Module) -> Pair:
    """A third-party module, and a copy after `fuse_`. Raises RuntimeError where it isn't converted."""
    fused = copy.deepcopy(module)
    fused_attn.fuse_(fused, strict=True)
    if not isinstance(fused, plan.Planned):
        raise RuntimeError(f"fuse_ left {type(module).__name__} as it was")
    return Pair(module, fused, f"{type(module).__module__}.{type(module).__name__}")


def _loaded(module: nn.Module, block: nn.Module) -> Pair:
    """Published equations, and the library's block with their weights."""
    block.load_state_dict(module.state_dict())
    return Pair(module, block, "published equations")


class _Pick(nn.Module):
    """Stands for a convolution: the i-th of the branches that are given."""

    def __init__(self, i: int) -> None:
        super().__init__()
        self.i = i

    def forward(self, branches: tuple[Tensor, ...]) -> Tensor:
        return branches[self.i]


class _Together(nn.Module):
    """Hands several tensors to a module as one argument."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *branches: Tensor) -> Any:
        return self.module(branches)


class _Behind(nn.Module):
    """The part of a block behind its convolutions: branches to what its plan makes of them."""

    def __init__(self, block: nn.Module, **how: Any) -> None:
        super().__init__()
        self.block, self.how = block, how

    def forward(self, *branches: Tensor) -> Tensor:
        found: Any = plan.ready(self.block)
        return found.softmax(branches, **self.how)  # type: ignore[no-any-return]


def _sk(c: int) -> Pair:
    from timm.layers import SelectiveKernel

    module = SelectiveKernel(c, c, split_input=False)
    module.paths = nn.ModuleList([_Pick(0), _Pick(1)])
    pair = _converted(module)
    return pair._replace(eager=_Together(module), fused=_Behind(pair.fused))  # type: ignore[arg-type]


def _split(c: int) -> Pair:
    from timm.layers import SplitAttn

    module = SplitAttn(c, norm_layer=nn.BatchNorm2d)
    module.conv, module.bn0, module.act0 = nn.Identity(), nn.Identity(), nn.Identity()
    return _converted(module)


def _psa(c: int) -> Pair:
    module = published.PyramidSqueeze(c)
    block = fused_attn.PyramidSqueezeAttention(c, c)
    block.se.load_state_dict(module.state_dict())
    return Pair(module, _Behind(block, each=True, merge="concat_reversed"), "published equations")


class _Normed(nn.Module):
    """A tail, or an inner gate: the norm with what follows it as in a fused parent, whatever the size of the map."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(module)
        fused_attn.fuse_(self.module)

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        own: Any = self.module
        gate = None if own.gate is None else plan.ready(own.gate).means()  # type: ignore[union-attr]
        norm = normed.read(own.bn)
        assert norm is not None
        if isinstance(own, published.Inner):
            assert gate is not None
            return normed.run_inside(norm, gate, x, "silu")
        return normed.run(norm, gate, x, shortcut, "relu")


def _tail(gate: Callable[[int], nn.Module] | None) -> Callable[[int], Pair]:
    def make(c: int) -> Pair:
        module = published.Tail(c, None if gate is None else gate(c))
        beside = None if gate is None else (WITHOUT, _Normed(published.Tail(c, None)))
        return Pair(module, _Normed(module), "torch.nn and timm", beside)

    return make


def _inner(c: int) -> Pair:
    module = published.Inner(c, _layer("SEModule")(c))
    return Pair(module, _Normed(module), "torch.nn and timm")


def _layer(name: str) -> Callable[[int], nn.Module]:
    def make(c: int) -> nn.Module:
        from timm import layers

        return getattr(layers, name)(c)  # type: ignore[no-any-return]

    return make


def _timm(name: str, **options: Any) -> Callable[[int], Pair]:
    def make(c: int) -> Pair:
        from timm import layers

        return _converted(operator.attrgetter(name)(layers)(c, **options))

    return make


def _pytorchcv(where: str, name: str) -> Callable[[int], Pair]:
    def make(c: int) -> Pair:
        import importlib

        return _converted(getattr(importlib.import_module(f"pytorchcv.models.{where}"), name)(channels=c))

    return make


def _function(eager: Callable[..., Any], fused: Callable[..., Any]) -> Callable[[int], Pair]:
    return lambda c: Pair(eager, fused, "published equations")


def _one(n: int, c: int, s: int) -> list[tuple[int, ...]]:
    return [(n, c, s, s)]


def _two(n: int, c: int, s: int) -> list[tuple[int, ...]]:
    return [(n, c, s, s)] * 2


@dataclass(frozen=True)
class Contest:
    """One mechanism of the table. make: channels -> Pair; inputs: (n, c, s) -> shapes; needs: the package it takes."""

    name: str
    make: Callable[[int], Pair]
    inputs: Callable[[int, int, int], list[tuple[int, ...]]] = _one
    needs: str | None = None


_ops = fused_attn.ops
CONTESTS = {
    c.name: c
    for c in (
        Contest("SE (timm)", _timm("SEModule"), needs="timm"),
        Contest("ECA (timm)", _timm("EcaModule"), needs="timm"),
        Contest("CBAM (timm)", _timm("cbam.CbamModule"), needs="timm"),
        Contest("CBAM (pytorchcv)", _pytorchcv("cbamresnet", "CbamBlock"), needs="pytorchcv"),
        Contest("BAM (pytorchcv)", _pytorchcv("bamresnet", "BamBlock"), needs="pytorchcv"),
        Contest(
            "BAM merge",
            _function(
                published.product_merge, lambda x, a, b: _ops.scale(x, a, pixel=b[:, 0], merge="sigmoid_product")
            ),
            lambda n, c, s: [(n, c, s, s), (n, c), (n, 1, s, s)],
        ),
        Contest("SK (timm)", _sk, _two, "timm"),
        Contest("split attention (timm)", _split, lambda n, c, s: [(n, 2 * c, s, s)], "timm"),
        Contest("PSA", _psa, lambda n, c, s: [(n, c // 4, s, s)] * 4),
        Contest("DRSN", lambda c: _loaded(published.SoftThreshold(c), fused_attn.Shrinkage(c))),
        Contest("Shuffle Attention", lambda c: _loaded(published.Shuffle(c), fused_attn.ShuffleAttention(c))),
        Contest("SGE", lambda c: _loaded(published.GroupEnhance(), fused_attn.SpatialGroupEnhance())),
        Contest(TAIL, _tail(_layer("SEModule")), _two, "timm"),
        Contest("tail with ECA", _tail(_layer("EcaModule")), _two, "timm"),
        Contest("tail without a gate", _tail(None), _two),
        Contest("BatchNorm, SiLU, SE", _inner, needs="timm"),
        Contest("f1", _function(published.sigmoid_scale, lambda z, t: _ops.map_scale(t, z)), _two),
        Contest("f2", _function(published.channel_norm_scale, lambda z, t: _ops.map_scale(t, z, "channels")), _two),
        Contest("f3", _function(published.spatial_norm_scale, lambda z, t: _ops.map_scale(t, z, "positions")), _two),
    )
}

_NORMED = ("BAM (pytorchcv)", "SK (timm)", "split attention (timm)", "DRSN")  # with a BatchNorm of descriptors

# At (8, 512, 28, 28), float32, against eager: forward, forward+backward. Targets are half as much again.
AT = (8, 512, 28)
FLOORS = {
    ("CBAM (timm)", "nchw"): (2.3, 2.3),
    ("CBAM (pytorchcv)", "nchw"): (5.0, 3.0),
    ("SK (timm)", "nchw"): (2.5, 1.8),
    ("SK (timm)", "channels_last"): (6.0, None),
    ("PSA", "nchw"): (1.7, 1.7),
    ("DRSN", "nchw"): (3.5, 5.0),
    ("BAM merge", "nchw"): (2.5, 2.0),
    ("split attention (timm)", "nchw"): (1.8, 1.5),
    ("Shuffle Attention", "nchw"): (2.2, 2.2),
    ("SGE", "nchw"): (2.2, 2.2),
    ("f2", "nchw"): (2.2, 2.2),
    ("f3", "nchw"): (2.2, 2.2),
}


@dataclass
class Job:
    """One row of the table: a mechanism at one shape, in one dtype, layout and mode."""

    contest: Contest
    n: int
    c: int
    s: int
    dtype: str
    layout: str
    mode: str
    device: str
    baselines: tuple[str, ...]

    @property
    def label(self) -> str:
        return f"{self.n}x{self.c}x{self.s}x{self.s}"

    @property
    def title(self) -> str:
        """What is said while it runs."""
        return f"{self.contest.name} {self.label} {self.mode}"

    def _draw(self, seed: int) -> list[Tensor]:
        draw = torch.Generator(self.device).manual_seed(seed)
        found = []
        for shape in self.contest.inputs(self.n, self.c, self.s):
            t = torch.randn(shape, generator=draw, device=self.device, dtype=torch.float32).to(DTYPES[self.dtype])
            if self.layout == "channels_last" and t.dim() == 4:
                t = t.to(memory_format=torch.channels_last)
            found.append(t.requires_grad_())
        return found

    def _subjects(self) -> tuple[list[Subject], list[tuple[Tensor, ...]]]:
        """Everything that is timed but the clone, ours first, and the sets of inputs."""
        torch.manual_seed(0)
        pair = self.contest.make(self.c)
        functions = [pair.eager, pair.fused, *(pair.beside[1:] if pair.beside else ())]
        for function in functions:
            if isinstance(function, nn.Module):
                function.to(self.device, DTYPES[self.dtype]).train(self.mode != "forward")
        first = self._draw(0)
        count = measure.sets_of_buffers(self.device, sum(t.nbytes for t in first))
        sets = [tuple(first), *(tuple(self._draw(i)) for i in range(1, count))]
        weights = lambda f: list(f.parameters()) if isinstance(f, nn.Module) else []
        # What a layer doesn't use in this call (convolutions that were taken out) has no gradient, and wants none.
        used = lambda f: [p for p in weights(f) if not getattr(p, "_unused", False)]
        subject = lambda name, f, source: Subject(name, source, f, sets, [[*each, *used(f)] for each in sets])
        with torch.enable_grad():
            for function in functions:
                y = function(*first)
                ours = weights(function)
                if ours:
                    found = torch.autograd.grad(y.sum(), ours, allow_unused=True)
                    for p, g in zip(ours, found, strict=True):
                        p._unused = g is None
        subjects = [subject("fused", pair.fused, "fused")]
        if pair.beside is not None:
            subjects.append(subject(pair.beside[0], pair.beside[1], "fused"))
        if "eager" in self.baselines:
            subjects.append(subject("eager", pair.eager, pair.source))
        if "inductor" in self.baselines:
            eager = subject("inductor", pair.eager, pair.source)
            subjects.append(replace(eager, function=compiled(pair.eager)))
            if self.device == "cpu":
                plain = compiled(pair.eager, layout_optimization=False)
                subjects.append(replace(eager, name="inductor, no layout", function=plain))
        return subjects, sets

    def run(self, seconds: float, number: int) -> list[Row]:
        """Times all of it, interleaved."""
        base = Row(
            self.contest.name, self.label, self.mode, self.dtype, self.layout, self.device, "fused", "", "", run=number
        )
        if self.contest.needs and not importable(self.contest.needs):
            return [replace(base, error=f"{self.contest.needs} is not installed")]
        seen = dict[str, None]()
        try:
            subjects, sets = self._subjects()
            with backend.observe(lambda choice: seen.setdefault(choice.backend)), torch.no_grad():
                y = subjects[0].function(*sets[0])
        except Exception as error:
            return [replace(base, error=f"{type(error).__name__}: {error}")]
        upstream = [torch.randn_like(y) for _ in sets]
        clones = [(torch.randn_like(y),) for _ in sets]
        subjects.append(Subject("clone", "x.clone()", lambda x: x.clone(), clones, [[x] for (x,) in clones]))
        candidates = [s.candidate("forward" if s.name == "clone" else self.mode, upstream) for s in subjects]
        timings = measure.interleave(candidates, seconds, self.device)
        clone, rows = timings["clone"], []
        for s in subjects:
            timing = timings[s.name]
            row = replace(base, impl=s.name, source=s.source, backend="+".join(seen) if s.name == "fused" else "")
            if isinstance(timing, str):
                rows.append(replace(row, error=timing))
                continue
            of = round(timing.median_us / clone.median_us, 3) if isinstance(clone, Timing) else None
            rows.append(replace(row, **vars(timing), of_clone=of))
        torch._dynamo.reset()
        return rows


def floors(rows: Sequence[Row]) -> list[Floor]:
    """The floors of what was measured, from the rows of one or more runs: the best counts."""
    label = f"{AT[0]}x{AT[1]}x{AT[2]}x{AT[2]}"
    times: dict[tuple[str, str, str, int], dict[str, float]] = {}
    for r in rows:
        if r.case == label and r.dtype == "float32" and r.median_us is not None:
            times.setdefault((r.op, r.layout, r.mode, r.run), {})[r.impl] = r.median_us
    found = []
    asked = {(r.op, r.layout, r.mode) for r in rows}
    rivalled = any(r.impl in INDUCTORS for r in rows)
    for (name, layout), wanted in FLOORS.items():
        for mode, floor in zip(MODES, wanted, strict=True):
            if (name, layout, mode) not in asked:
                continue
            groups = [t for (n, lay, m, _), t in times.items() if (n, lay, m) == (name, layout, mode) and "fused" in t]
            over = [g["eager"] / g["fused"] for g in groups if "eager" in g]
            rivals = [min(g[i] for i in INDUCTORS if i in g) / g["fused"] for g in groups if set(INDUCTORS) & set(g)]
            where = f"{name}, {mode}" + (", channels_last" if layout != "nchw" else "")
            per = "not measured" if not over else " ".join(f"{v:.2f}" for v in over)
            if floor is not None:
                found.append(Floor(where, floor, 1.5 * floor, max(over, default=None), per))
            if not rivalled:
                continue
            per = "not measured" if not rivals else " ".join(f"{v:.2f}" for v in rivals)
            found.append(Floor(f"{where}: the better Inductor", 1.0, None, max(rivals, default=None), per))
    return found + tail_floors(rows)


def tail_floors(rows: Sequence[Row]) -> list[Floor]:
    """A tail's: the geometric means over the shapes, forward+backward, and what the gate costs at the first two."""
    times: dict[tuple[int, str], dict[str, float]] = {}
    for r in rows:
        if (r.op, r.mode, r.dtype, r.layout) == (TAIL, MODES[1], "float32", "nchw") and r.median_us is not None:
            times.setdefault((r.run, r.case), {})[r.impl] = r.median_us
    if not times:
        return []
    per: dict[str, dict[int, list[tuple[str, float]]]] = {"eager": {}, "inductor": {}, WITHOUT: {}}
    for (number, case), t in times.items():
        rivals = [t[i] for i in INDUCTORS if i in t]
        for name, rival in (
            ("eager", t.get("eager")),
            ("inductor", min(rivals, default=None)),
            (WITHOUT, t.get(WITHOUT)),
        ):
            if rival is not None and "fused" in t:
                per[name].setdefault(number, []).append((case, rival / t["fused"]))
    found = []
    for name, title, floor, target in (
        ("eager", f"{TAIL}, {MODES[1]}", 2.0, 2.6), ("inductor", f"{TAIL}, {MODES[1]}: the better Inductor", 1.15, 1.5),
    ):  # fmt: skip
        runs = [each for each in per[name].values() if len(each) == len(SHAPES)]
        means = [math.prod(v for _, v in each) ** (1 / len(each)) for each in runs]
        told = "not measured" if not runs else " ".join(f"{c.split('x', 1)[1]}:{v:.2f}" for c, v in runs[-1])
        if runs or name == "eager":
            found.append(Floor(title, floor, target, max(means, default=None), told))
    for c, s in SHAPES[:2]:
        ratios = [v for each in per[WITHOUT].values() for case, v in each if case.endswith(f"x{c}x{s}x{s}")]
        told = " ".join(f"{1 / v:.3f}" for v in ratios)
        found.append(
            Floor(f"{TAIL}, {MODES[1]}, {c}x{s}: 1.10 of that without", 1 / 1.1, None, max(ratios, default=None), told)
        )
    return found


def parser(add: Any) -> argparse.ArgumentParser:
    """The options of `python -m bench blocks`."""
    p: argparse.ArgumentParser = add("blocks", help="time every mechanism against what its users run")
    p.add_argument("--block", nargs="+", choices=list(CONTESTS), metavar="NAME", help=f"of {', '.join(CONTESTS)}")
    p.add_argument("--shape", default="", help="only shapes whose label contains this, such as 512x28")
    p.add_argument("--batch", nargs="+", type=int, default=[8], help="N (default: 8)")
    session.options(p, modes=2, mode=MODES, dtype=DTYPES, layout=LAYOUTS, baseline=("eager", "inductor"))
    return p


def jobs(options: argparse.Namespace) -> list[Job]:
    """What the options select."""
    device = options.device or measure.default_device()
    names = options.block or list(CONTESTS)
    baselines = tuple(options.baseline)
    if options.check_floors:
        at = [
            Job(CONTESTS[name], *AT, "float32", layout, mode, device, baselines)
            for (name, layout), wanted in FLOORS.items()
            for mode, floor in zip(MODES, wanted, strict=True)
            if name in names and floor is not None
        ]
        tails = [Job(CONTESTS[TAIL], 8, c, s, "float32", "nchw", MODES[1], device, baselines) for c, s in SHAPES]
        return at + (tails if TAIL in names else [])
    found = []
    for name, n, (c, s), mode, dtype, layout in itertools.product(
        names, options.batch, SHAPES, session.chosen(options.mode, MODES), session.chosen(options.dtype, DTYPES),
        session.chosen(options.layout, LAYOUTS),
    ):  # fmt: skip
        job = Job(CONTESTS[name], n, c, s, dtype, layout, mode, device, baselines)
        trains = mode == "forward+backward" and n == 1  # a BatchNorm of one descriptor per channel has no statistics
        if options.shape in job.label and not (trains and name in _NORMED):
            found.append(job)
    return found


def main(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Runs `python -m bench blocks`."""
    selected = jobs(options)
    if not selected:
        measure.log("nothing matches the selection")
        return 2
    name = "block-floors" if options.check_floors else "blocks"
    rows, found = session.run("blocks", selected, options, arguments, floors, name)
    print(summary(rows))
    failed = session.failures(rows)
    if found:
        show = lambda v: "–" if v is None else f"{v:.2f}"
        lines = [[f.name, show(f.floor), show(f.target), show(f.measured), "met" if f.met else "MISSED"] for f in found]
        print(
            "\n"
            + table(["float32, 8x512x28x28 (tails: all shapes), speed-up", "floor", "target", "measured", ""], lines)
        )
    return int(failed or not all(f.met for f in found))
