"""`pytest bench --benchmark-only`: every op's bench cases under pytest-benchmark, each backend beside eager.

One group per case and mode: `--benchmark-compare` and `--benchmark-histogram` put side by side what belongs together.
On the CPU the clock is process CPU time; on a GPU it is wall time around a synchronisation.
"""

import time
from dataclasses import replace

import pytest
import torch

from bench import measure, ops
from fused_attn import backend, testing

DEVICE = measure.default_device()
MODES = ("forward", "forward+backward")
CASES = [
    pytest.param(op, case, mode, impl, id=f"{op.name}-{ops.label(op, case).replace(' ', ',')}-{mode}-{impl}")
    for op in ops.bench_ops()
    for case in ops.bench_cases(op)
    for mode in MODES
    for impl in ("unfused", *backend.ORDER[DEVICE])
]


def clock() -> float:
    if DEVICE != "cpu":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


@pytest.mark.benchmark(timer=clock, min_rounds=5, max_time=0.5, warmup=True, warmup_iterations=3)
@pytest.mark.parametrize(("op", "case", "mode", "impl"), CASES)
def test_op(benchmark, op, case, mode, impl):
    args = testing.draw(case, op, device=DEVICE)
    if impl != "unfused" and (why := backend.refusal(op, impl, args)) is not None:
        pytest.skip(f"{impl}: {why}")
    forced = () if impl == "unfused" else (impl,)
    job = replace(ops.Job(op, case, mode=mode, device=DEVICE, baselines=("eager",)), backends=forced)
    wanted = "eager" if impl == "unfused" else f"fused:{impl}"
    subject = next(s for s in job.subjects() if s.name == wanted)
    with torch.no_grad():
        out = op(*(a.detach() if isinstance(a, torch.Tensor) else a for a in args))
    upstream = [torch.randn_like(out[0] if isinstance(out, tuple) else out) for _ in job.sets]
    candidate = subject.candidate(mode, upstream)
    benchmark.group = f"{op.name} {ops.label(op, case)} {mode}"
    benchmark.extra_info["source"] = subject.source
    with candidate.context():
        benchmark(candidate.calls[0])
