"""The figures beside time: passes, bytes, GB/s, the machine's copy bandwidth, memory, what the host and a graph cost.

Bytes are those that the mechanism must move, by the budgets of the ops that a call launches; that a backend keeps to
its budget is counted by the tests. GB/s above those of a copy mean that a part of them was in a cache.
"""

import ctypes
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fused_attn import backend
from fused_attn.registry import Op

from . import measure
from .measure import Candidate, Row, Timing
from .subjects import INDUCTORS, Subject
from .support import significant, table


@cache
def copy_gbps(device: str) -> float:
    """What this machine's memory does: GB/s, read and written, of a copy into an array that is there.

    On a CPU the better of PyTorch's copy and the C library's, whose stores go past the cache: PyTorch's read what they
    overwrite.
    """
    x = torch.randn((1 << 30) if device == "cuda" else (48 << 20), device=device)
    y = torch.empty_like(x)
    ways = [Candidate("copy_", [lambda: y.copy_(x)])]
    if device == "cpu":
        ways.append(Candidate("memmove", [lambda: ctypes.memmove(y.data_ptr(), x.data_ptr(), x.nbytes)]))
    timings = measure.interleave(ways, 1.0, device).values()
    best = min(t.median_us for t in timings if isinstance(t, Timing))
    return float(f"{2 * x.nbytes / best / 1e3:.4g}")


def saved_bytes(candidate: Candidate, own: Sequence[Tensor]) -> int:
    """What autograd keeps between forward and backward, every storage once, beyond `own` tensors."""
    known = {t.untyped_storage().data_ptr() for t in own}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with candidate.context(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        candidate.calls[0]()
    return sum(kept.values())


def peak_bytes(candidate: Candidate, device: str) -> int:
    """The most that a call has allocated at once, of what PyTorch's allocators hand out."""
    if device == "cuda":
        with candidate.context():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            candidate.calls[0]()
            torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with candidate.context(), torch.autograd.profiler.profile(profile_memory=True, use_kineto=True) as profiler:
        candidate.calls[0]()
    events = profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(0, *itertools.accumulate(nbytes for _, nbytes in changes)) if changes else 0


def replay_us(candidate: Candidate, device: str) -> float | None:
    """Microseconds of a call as a CUDA graph: what a launch-bound shape costs without its host. None elsewhere, or
    where it can't be captured.

    A graph has one set of buffers: unlike every other time of a GPU's, this is with a warm L2 cache."""
    if device != "cuda":
        return None
    try:
        with candidate.context():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    candidate.calls[0]()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                candidate.calls[0]()
        (timing,) = measure.interleave([Candidate("replay", [graph.replay])], 0.05, device).values()
    except Exception:
        return None
    return timing.median_us if isinstance(timing, Timing) else None


def host_us(candidates: Sequence[Candidate], device: str) -> dict[str, float]:
    """Microseconds of the same call on maps so small that there is nothing to move. On a GPU the host's time alone."""
    timings = measure.interleave(candidates, 0.02 * len(candidates), device, (5, 50))
    own = lambda t: t.median_us if device == "cpu" else t.wall_us
    return {name: own(t) for name, t in timings.items() if isinstance(t, Timing)}


@contextmanager
def counting(size: int) -> Iterator[dict[str, Any]]:
    """Counts passes over maps of `size` bytes inside the block, by the budgets of the ops that it launches, and which
    ops and backends those are."""
    seen: dict[str, Any] = {"passes": 0.0, "backends": dict[str, None](), "ops": dict[str, None]()}
    run = backend.run

    def counted(op: Op, args: tuple[Any, ...], *rest: Any) -> Any:
        reads, writes = op.budget(*args) if op.budget is not None else (0, 0)
        seen["passes"] += (reads + writes) * args[0].nbytes / size  # a budget counts maps of the first argument's size
        seen["ops"].setdefault(op.name)
        return run(op, args, *rest)

    backend.run = counted
    try:
        with backend.observe(lambda choice: seen["backends"].setdefault(choice.backend)):
            yield seen
    finally:
        backend.run = run


def traffic(candidate: Candidate, size: int, op: Op | None = None, mode: str = "forward") -> tuple[float, str]:
    """Passes over a map of `size` bytes that one call makes, and the backends that it runs on.

    op: the one that is called, where it is an op
    """
    try:
        with counting(size) as seen, candidate.context():
            candidate.calls[0]()
    except Exception:
        return 0.0, "failed"
    passes = seen["passes"]
    if op is not None and mode in ("forward+backward", "train-step") and op.maps and set(seen["ops"]) == {op.name}:
        passes += 1  # dx was written by no op of ours, as where it is an expanded mean
    return passes, "+".join(seen["backends"])


def rows(
    base: Row, subjects: Sequence[Subject], candidates: Sequence[Candidate], seconds: float, size: int,
    op: Op | None = None, small: Sequence[Candidate] = (),
) -> list[Row]:  # fmt: skip
    """Times the candidates, interleaved, and says everything that is to be said of them.

    base: what all rows have in common; size: bytes of the map that passes are counted in; op: the one that is called,
    where it is an op; small: candidates of the same names on small maps
    """
    device = base.device
    timings = measure.interleave(candidates, seconds, device)
    clone, found = timings.get("clone"), []
    hosts = host_us(small, device) if small else {}
    for s, c in zip(subjects, candidates, strict=True):
        ours = s.name.startswith("fused")
        row = replace(base, impl=s.name, source=s.source)
        timing = timings[s.name]
        if isinstance(timing, str):
            found.append(replace(row, error=timing))
            continue
        passes, backends = traffic(c, size, op, base.mode) if ours else (2.0 if s.name == "clone" else 0.0, "")
        moved = round(passes * size) if passes else None
        gbps = None if moved is None else float(f"{moved / timing.median_us / 1e3:.4g}")
        row = replace(
            row, **vars(timing), backend=backends, passes=passes or None, bytes=moved, gbps=gbps,
            of_clone=round(timing.median_us / clone.median_us, 3) if isinstance(clone, Timing) else None,
            of_copy=None if gbps is None else round(gbps / copy_gbps(device), 3),
            host_us=hosts.get(s.name), graph_us=replay_us(c, device) if ours else None,
        )  # fmt: skip
        with suppress(Exception):  # figures of memory are beside the point where they can't be had
            row = replace(row, peak_bytes=peak_bytes(c, device))
            if base.mode != "forward":
                tensors = [t for t in (*s.args[0], *s.wrt[0]) if isinstance(t, Tensor)]
                row = replace(row, saved_bytes=saved_bytes(c, tensors))
        found.append(row)
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
                "–" if r.of_copy is None else f"{100 * r.of_copy:.0f} %",
                *("–" if v is None else f"{v / 2**20:.3g}" for v in (r.peak_bytes, r.saved_bytes)),
                "–" if r.host_us is None else significant(r.host_us),
            ])  # fmt: skip
    head = ["op", "case", "mode", "dtype", "layout", "ours"]
    head += ["eager µs", "Inductor µs", "ours µs", "clone µs", "vs eager", "vs Inductor", "÷ clone", "passes", "GB/s"]
    head += ["of copy", "peak MiB", "saved MiB", "host µs"]
    return table(head, lines, right=6)
