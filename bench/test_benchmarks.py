"""`pytest bench --benchmark-only`: every op and mechanism under pytest-benchmark, from the declarations of the bench.

An op's bench cases run on each backend beside eager, a mechanism at the shapes of ResNet-50 fused beside what its users
have. One group per case and mode: `--benchmark-compare` and `--benchmark-histogram` put side by side what belongs
together. On the CPU the clock is process CPU time; on a GPU it is wall time around a synchronisation.
"""

import time
from dataclasses import replace

import pytest
import torch

from bench import blocks, labels, measure, ops, shapes
from bench.contests import CONTESTS
from bench.support import importable
from fused_attn import backend, testing

DEVICE = measure.default_device()
MODES = ("forward", "forward+backward")
SIZES = [(8, c, s) for c, s, _ in shapes.SETS["resnet50"]]
OPS = [
    pytest.param(op, case, mode, impl, id=f"{op.name}-{labels.label(op, case).replace(' ', ',')}-{mode}-{impl}")
    for op in labels.bench_ops()
    for case in labels.bench_cases(op)
    for mode in MODES
    for impl in ("unfused", *backend.ORDER[DEVICE])
]
BLOCKS = [
    pytest.param(name, size, mode, impl, id=f"{name}-{'x'.join(map(str, (*size, size[2])))}-{mode}-{impl}")
    for name in CONTESTS
    for size in SIZES
    if size[1] % CONTESTS[name].divides == 0
    for mode in MODES
    for impl in ("eager", "fused")
]


def clock() -> float:
    if DEVICE != "cpu":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


timed = pytest.mark.benchmark(timer=clock, min_rounds=5, max_time=0.5, warmup=True, warmup_iterations=3)


def run(benchmark, group, subject, candidate):
    benchmark.group = group
    benchmark.extra_info["source"] = subject.source
    with candidate.context():
        benchmark(candidate.calls[0])


@timed
@pytest.mark.parametrize(("op", "case", "mode", "impl"), OPS)
def test_op(benchmark, op, case, mode, impl):
    args = testing.draw(case, op, device=DEVICE)
    if impl != "unfused" and (why := backend.refusal(op, impl, args)) is not None:
        pytest.skip(f"{impl}: {why}")
    forced = () if impl == "unfused" else (impl,)
    job = replace(ops.Job(op, case, mode=mode, device=DEVICE, baselines=("eager",)), backends=forced)
    wanted = "eager" if impl == "unfused" else f"fused:{impl}"
    subject = next(s for s in job.subjects() if s.name == wanted)
    (candidate,) = job.candidates([subject])
    run(benchmark, f"{op.name} {labels.label(op, case)} {mode}", subject, candidate)


@timed
@pytest.mark.parametrize(("name", "size", "mode", "impl"), BLOCKS)
def test_block(benchmark, name, size, mode, impl):
    contest = CONTESTS[name]
    if contest.needs and not importable(contest.needs):
        pytest.skip(f"{contest.needs} is not installed")
    job = blocks.Job(contest, *size, "float32", "nchw", mode, DEVICE, ("eager",))
    subjects, candidates, _ = job.candidates()
    subject, candidate = next((s, c) for s, c in zip(subjects, candidates, strict=True) if s.name == impl)
    run(benchmark, f"{name} {job.label} {mode}", subject, candidate)
