"""The one place where time is taken.

CPU: one thread, process CPU time (what a busy neighbour takes isn't counted), the heap pinned: glibc hands large
freed buffers back to the kernel, and faulting them in again costs several times what a copy of them does.
GPU: CUDA events around a call that was queued behind a sleeping kernel, so that host time isn't counted, on buffers
that rotate through more than the L2 cache: the next call, whoever makes it, finds none of its own there. A replay of a
CUDA graph has the one set of buffers that it was captured with: it is warm.
Everywhere: all candidates in one process, turn by turn, on the same random data; median, 20th and 80th percentile.
"""

import ctypes
import datetime as dt
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import cache
from statistics import median, quantiles
from typing import Any

import torch

from .support import ROOT

SCHEMA = 1
MODES = ("forward", "recording", "forward+backward", "train-step")
_SHORTEST = 300e-6  # seconds in a CPU sample: 1000 times the clock's own cost
_LONG = 0.05  # seconds
_CYCLES = 2e9  # a second, about, of a GPU
_SLEEPS = (1e-3, 0.05)  # seconds, at least and at most, that a GPU sleeps while the host queues a call
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_HEAP = 512 << 20  # bytes: twenty arrays of the largest case


@dataclass(frozen=True)
class Candidate:
    """One implementation, ready to be called.

    calls: the same call on each set of buffers: one set on a CPU, enough to overflow L2 on a GPU
    context: entered around every sample, outside the clock
    """

    name: str
    calls: Sequence[Callable[[], object]]
    context: Callable[[], AbstractContextManager[object]] = nullcontext


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call. `wall_us` stands beside CPU time: where it is much larger, the machine was busy."""

    median_us: float
    p20_us: float
    p80_us: float
    wall_us: float
    samples: int
    calls_per_sample: int


@dataclass(frozen=True)
class Row:
    """One implementation of one case in one mode. Times are None, and `error` is set, where it failed.

    passes, bytes, gbps   reads and writes of feature maps that it must make, those in bytes, and these per second
    of_clone, of_copy     its time in units of x.clone()'s; gbps in units of this machine's copy bandwidth
    host_us, graph_us     of a call before there is data to move; of a replay as a CUDA graph, with a warm L2 cache
    peak_bytes            memory that a call takes beyond what was there before
    saved_bytes           what autograd keeps for backward beyond arguments and parameters
    largest_batch         that fits; on a GPU
    """

    op: str
    case: str
    mode: str
    dtype: str
    layout: str
    device: str
    impl: str
    backend: str
    source: str
    median_us: float | None = None
    p20_us: float | None = None
    p80_us: float | None = None
    wall_us: float | None = None
    samples: int = 0
    calls_per_sample: int = 0
    passes: float | None = None
    bytes: int | None = None
    gbps: float | None = None
    of_clone: float | None = None
    of_copy: float | None = None
    host_us: float | None = None
    graph_us: float | None = None
    peak_bytes: int | None = None
    saved_bytes: int | None = None
    largest_batch: int | None = None
    error: str | None = None
    run: int = 0

    def dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@cache
def pin_heap() -> bool:
    """Makes glibc keep what it has: no mmap for large buffers, no trimming. False where the C library isn't glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    if not (mallopt(_M_TRIM_THRESHOLD, -1) and mallopt(_M_MMAP_MAX, 0)):
        return False
    # An aligned array needs a hole a little larger than itself, so the one just freed won't do, and each array of the
    # first few would be new pages. Free pages are written here, once, for all of them.
    torch.empty(_HEAP, dtype=torch.uint8).fill_(1)
    return True


def prepare(device: str) -> None:
    """What must hold in a process that measures."""
    if device == "cpu":
        torch.set_num_threads(1)
        pin_heap()


def interleave(
    candidates: Sequence[Candidate], seconds: float, device: str = "cpu", rounds: tuple[int, int] = (5, 200)
) -> dict[str, Timing | str]:
    """Times the candidates turn by turn for about `seconds` in all. One that raises is reported by its error.

    On a CPU an untimed call comes before a sample of short ones: it puts caches and heap into the state that this
    candidate leaves. Where one call takes as long as a whole model's, nothing is left in the caches anyway.
    """
    results: dict[str, Timing | str] = {}
    ready, cost, sleep = [], {}, {}
    for c in candidates:
        try:
            cost[c.name], host = _first_calls(c, device)
            sleep[c.name] = 0.0 if device == "cpu" else min(max(2 * host, _SLEEPS[0]), _SLEEPS[1])
            ready.append(c)
        except Exception as error:
            results[c.name] = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:300]}"
    if not ready:
        return results
    inner = {c.name: max(1, round(_SHORTEST / cost[c.name])) if device == "cpu" else 1 for c in ready}
    warm = {c.name: device == "cpu" and cost[c.name] < _LONG for c in ready}
    per_round = sum(cost[c.name] * (inner[c.name] + warm[c.name]) + sleep[c.name] for c in ready)
    count = min(max(int(seconds / max(per_round, 1e-9)), rounds[0]), rounds[1])
    taken: dict[str, list[tuple[float, float]]] = {c.name: [] for c in ready}
    for i in range(count):
        first = i % len(ready)
        for k, c in enumerate(ready[first:] + ready[:first]):
            turn = i * len(ready) + k  # another set of buffers for each: those of the call before are in the cache
            if device == "cpu":
                taken[c.name].append(_cpu_sample(c, turn, inner[c.name], warm[c.name]))
            else:
                taken[c.name].append(_cuda_sample(c, turn, sleep[c.name]))
    for c in ready:
        times = [t for t, _ in taken[c.name]]
        low, *_, high = quantiles(times, n=5) if len(times) > 1 else times * 2
        walls = median(w for _, w in taken[c.name])
        results[c.name] = Timing(*(round(v * 1e6, 3) for v in (median(times), low, high, walls)), count, inner[c.name])
    return results


def _first_calls(c: Candidate, device: str) -> tuple[float, float]:
    """Seconds of one call, and of the host in it, after calls that compile, allocate and fill caches. Every set of
    buffers is called once."""
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    with c.context():
        for call in c.calls:
            call()
        spent = host = 0.0
        for _ in range(3):  # the last counts; a call that takes long doesn't get much quicker
            wait()
            start = time.perf_counter()
            c.calls[0]()
            host = time.perf_counter() - start
            wait()
            spent = max(time.perf_counter() - start, 1e-7)
            if spent > _LONG:
                break
    return spent, host


def _cpu_sample(c: Candidate, turn: int, inner: int, warm: bool) -> tuple[float, float]:
    call = c.calls[turn % len(c.calls)]
    with c.context():
        if warm:
            call()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(inner):
            call()
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return cpu / inner, wall / inner


def _cuda_sample(c: Candidate, turn: int, sleep: float) -> tuple[float, float]:
    """sleep: seconds, in which the host queues the whole call; a call that takes it longer is timed in part with it."""
    call = c.calls[turn % len(c.calls)]
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with c.context():
        torch.cuda._sleep(int(sleep * _CYCLES))
        start.record()
        wall = time.perf_counter()
        call()
        wall = time.perf_counter() - wall
        end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3, wall


def sets_of_buffers(device: str, bytes_per_set: int) -> int:
    """How many sets of buffers make a GPU's L2 cache cold. One on a CPU."""
    if device == "cpu":
        return 1
    l2 = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "L2_cache_size", 64 << 20)
    return int(min(max(2, 1 + 3 * l2 // max(bytes_per_set, 1)), 32))


def busy() -> dict[str, float | None]:
    """A contention probe: how much longer than its CPU time a fixed loop takes, and the load average."""
    wall, cpu = time.perf_counter(), time.process_time()
    while time.process_time() - cpu < 0.05:
        sum(range(10_000))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"wall_over_cpu": round(wall / cpu, 3), "load_average": None if load is None else round(load, 2)}


def cpu_model() -> str:
    """The processor's name."""
    try:
        with open("/proc/cpuinfo") as file:
            found = re.search(r"^model name\s*:\s*(.+)$", file.read(), re.M)
        return found[1].strip() if found else platform.machine()
    except OSError:
        return platform.processor() or platform.machine()


def _git(*args: str) -> str | None:
    try:
        run = subprocess.run(["git", "-C", str(ROOT), *args], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def provenance(device: str, command: Sequence[str]) -> dict[str, Any]:
    """Where, with what and when: everything a reader needs to repeat a measurement, and no path of this machine."""
    import fused_attn

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    changed = _git("status", "--porcelain", "--untracked-files=no")
    found: dict[str, Any] = {
        "command": shlex.join(command),
        "time": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "git": _git("rev-parse", "HEAD"),
        "git_changed": None if changed is None else bool(changed),
        "fused_attn": fused_attn.__version__,
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "device": device,
    }
    if device == "cpu":
        found |= {
            "device_name": found["cpu"],
            "threads": torch.get_num_threads(),
            "clock": "process CPU time",
            "simd": torch.backends.cpu.get_cpu_capability(),
            "heap_pinned": pin_heap(),
            "probe": busy(),
        }
    else:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        found |= {
            "device_name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda or torch.version.hip,
            "clock": "CUDA events, cold L2",
            "driver": driver(),
        }
    return found


def driver() -> str | None:
    """The driver's version, the clocks and the power limit as they are now."""
    return _smi("driver_version,clocks.sm,clocks.mem,power.limit")


def clocks() -> str | None:
    """The clocks, the temperature and the power that is drawn, as they are now."""
    return _smi("clocks.sm,clocks.mem,temperature.gpu,power.draw")


def _smi(what: str) -> str | None:
    query = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def command_line(name: str, arguments: Sequence[str]) -> list[str]:
    """The command as a reader would type it: without the folder that results went to."""
    kept, skip = [], False
    for argument in arguments:
        if skip or argument.startswith("--out"):
            skip = argument == "--out"
            continue
        kept.append(argument)
    return ["python", "-m", name, *kept]


def slug(text: str) -> str:
    """A name that any file system takes: that of the folder a machine's results are in."""
    text = re.sub(r"\((R|TM|r|tm)\)|CPU|Processor|@.*", " ", text)
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unknown"


def stamp() -> str:
    """A file name that sorts by time."""
    return dt.datetime.now(dt.timezone.utc).strftime("%Y%m%dT%H%M%SZ")


def default_device() -> str:
    """The GPU if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def log(text: str) -> None:
    """A line beside the progress bar."""
    print(text, file=sys.stderr, flush=True)
