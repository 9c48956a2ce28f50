"""`python -m bench blocks`: every mechanism against what its users run, at the shapes of ResNet-50 or another network.

eager        the third-party module, or its published equations (contests.py)
inductor     torch.compile of that, and on a CPU once more with layout_optimization=False
fused        the same weights after `fuse_`, or in the library's block
clone        x.clone(): one read and one write of the feature map

forward runs in evaluation and inference mode; the other modes in training, with gradients of x and every parameter:
recording is their forward, train-step has a step of SGD as well.
"""

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fused_attn import backend

from . import figures, measure, session
from .block_floors import AT, FLOORS, MODES, floors
from .contests import CONTESTS, NORMED, SHAPES, TAIL, Contest
from .figures import summary
from .floors import best_of
from .measure import Candidate, Row
from .ops import DTYPES, LAYOUTS
from .subjects import BASELINES, Subject, clones, first, rivals
from .support import importable, table

EVERY = (*MODES, "recording", "train-step")


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
    backend: str | None = None

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

    def subjects(self) -> tuple[list[Subject], list[tuple[Tensor, ...]]]:
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
        forced = lambda name: self.backend if name.startswith("fused") else None
        subject = lambda name, f, source: Subject(
            name, source, f, sets, [[*each, *used(f)] for each in sets], forced(name)
        )
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
        subjects += rivals(subject("eager", pair.eager, pair.source), self.baselines, self.device)
        return subjects, sets

    def candidates(self) -> tuple[list[Subject], list[Candidate], Tensor]:
        """Everything that is timed, ours first, and an output."""
        subjects, sets = self.subjects()
        with torch.no_grad():
            y = first(subjects[0].function(*sets[0]))
        upstream = [torch.randn_like(y) for _ in sets]
        if "clone" in self.baselines:
            subjects.append(clones([torch.randn_like(y) for _ in sets]))
        return (
            subjects, [s.candidate("forward" if s.name == "clone" else self.mode, upstream) for s in subjects], y
        )  # fmt: skip

    def small(self) -> list[Candidate]:
        """Ours and eager on so small a map that the host is most of the time."""
        return replace(self, n=2, s=2, baselines=tuple(b for b in self.baselines if b == "eager")).candidates()[1]

    def run(self, seconds: float, number: int) -> list[Row]:
        """Times all of it, interleaved."""
        base = Row(
            self.contest.name, self.label, self.mode, self.dtype, self.layout, self.device, "fused", "", "", run=number
        )
        if self.contest.needs and not importable(self.contest.needs):
            return [replace(base, error=f"{self.contest.needs} is not installed")]
        try:
            subjects, candidates, y = self.candidates()
            small = self.small()
        except Exception as error:
            return [replace(base, error=f"{type(error).__name__}: {error}")]
        found = figures.rows(base, subjects, candidates, seconds, y.nbytes, small=small)
        torch._dynamo.reset()
        return found


def parser(add: Any) -> argparse.ArgumentParser:
    """The options of `python -m bench blocks`."""
    p: argparse.ArgumentParser = add("blocks", help="time every mechanism against what its users run")
    p.add_argument("--block", nargs="+", choices=list(CONTESTS), metavar="NAME", help=f"of {', '.join(CONTESTS)}")
    p.add_argument("--shape", default="", help="only shapes whose label contains this, such as 512x28")
    p.add_argument("--backend", choices=backend.BACKENDS[1:], help="force this one (default: auto)")
    session.shape_options(p, "resnet50")
    session.options(p, modes=2, mode=EVERY, dtype=DTYPES, layout=LAYOUTS, baseline=BASELINES)
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
    for name, (n, (c, s, _)), mode, dtype, layout in itertools.product(
        names, session.shapes_of(options, device), session.chosen(options.mode, EVERY),
        session.chosen(options.dtype, DTYPES), session.chosen(options.layout, LAYOUTS),
    ):  # fmt: skip
        if c % CONTESTS[name].divides:
            continue
        job = Job(CONTESTS[name], n, c, s, dtype, layout, mode, device, baselines, options.backend)
        trains = mode != "forward" and n == 1  # a BatchNorm of one descriptor per channel has no statistics
        if options.shape in job.label and not (trains and name in NORMED):
            found.append(job)
    return found


def main(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Runs `python -m bench blocks`."""
    session.refuse_ignored(options, "shape", "shapes", "batch", "mode", "dtype", "layout", "backend")
    selected = jobs(options)
    if not selected:
        measure.log("nothing matches the selection")
        return 2
    name = "block-floors" if options.check_floors else "blocks"
    if options.quick:
        options.seconds = min(options.seconds, 0.3)
    rows, found = session.run("blocks", selected, options, arguments, floors, name)
    if options.format == "table":
        print(summary(rows))
    failed = session.failures(rows)
    if found:
        show = lambda v: "–" if v is None else f"{v:.2f}"
        lines = [[f.name, show(f.floor), show(f.target), show(f.measured), "met" if f.met else "MISSED"] for f in found]
        per = best_of(1 + max(r.run for r in rows))
        print("\n" + table(["float32, 8x512x28x28 (tails: all shapes), speed-up", "floor", "target", per, ""], lines))
    return int(failed or not all(f.met for f in found))
