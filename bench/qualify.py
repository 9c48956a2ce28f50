"""`python -m bench qualify`: whether this machine's GPU computes what it should, and how fast. One JSON per part.

    correctness   every op, case, dtype and layout against float64 on the device; NaN, ties, compile, graphs, a model
    kernels       Triton against eager, Inductor and x.clone() at ResNet-50's shapes, CUDA events, cold L2

Needs torch, triton and pytest, and neither network nor installation; what else is missing counts as "not run". The work
is a list of items, most valuable first. Worker processes take them, so that a kernel that kills its process, or hangs,
costs one item; when a part's time is up, its workers are stopped, and what there is gets written.
"""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fused_attn
from fused_attn import backend, ops, testing
from fused_attn.registry import OPS, Case, Op, case

from . import measure
from .labels import SE, bench_ops, label
from .ops import DTYPES, Job
from .support import ROOT, importable, progress, write_json

PARTS = ("correctness", "kernels")
ITEM_SECONDS, CRASHES = 150.0, 8
Payload = dict[str, Any]


class NotRun(Exception):
    """Why an item can't run here."""


class Wrong(AssertionError):
    """An item that found something wrong."""


@dataclass(frozen=True)
class Item:
    """One thing to check or time. `run` returns what to keep; it raises NotRun, or anything else where it fails."""

    name: str
    run: Callable[[], Payload | None]
    prepare: Callable[[], object] | None = None
    seconds: float = ITEM_SECONDS


def kernels_of(device: str) -> str:
    """The backend whose kernels are on trial."""
    if device == "cuda":
        return "triton"
    return "cpp" if backend.extension() is None else "eager"


# ---- correctness


def correctness(device: str) -> list[Item]:
    """All items, most valuable first."""
    small: list[Item] = []
    large: list[Item] = []
    rest: list[Item] = []
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        for layout in ("contiguous", "channels_last", "sliced", "sliced_channels_last"):
            usual = dtype in ("float32", "bfloat16") and not layout.startswith("sliced")
            for op in OPS.values():
                if op.formula is None:
                    continue
                for c in op.cases:
                    if layout != "contiguous" and not op.maps and not layout.startswith("sliced"):
                        continue
                    name = f"{op.name} {label(op, c)} #{op.cases.index(c)} {dtype} {layout}"
                    run = functools.partial(_conforms, op, c, DTYPES[dtype], layout, device)
                    (rest if not usual else large if "bench" in c.tags else small).append(Item(name, run))
    return [
        *small,
        *_special(device),
        *large,
        *rest,
        Item("pytest -m gpu", functools.partial(_pytest, device), seconds=240),
    ]


def _conforms(op: Op, c: Case, dtype: torch.dtype, layout: str, device: str) -> Payload:
    """Outputs and gradients against float64, strides, equal bits run to run: of the kernels and of the eager form."""
    args = testing.draw(c, op, dtype, device, layout=layout)
    worst, wrong = {}, []
    for name in dict.fromkeys((kernels_of(device), "eager")):
        with fused_attn.use_backend(name):
            got = testing.answer(op, args)
            again = testing.answer(op, args)
        found = testing.deviations(
            got, testing.truth(op, args, got), testing.plain(op, args, got), testing.terms(op, args), _names(op, args)
        )
        wrong += [f"{name}: {d}" for d in found if not d.ok]
        worst[name] = max((d.error for d in found), default=0.0)
        if name != "eager" and not testing.same_bits(got, again):
            wrong.append(f"{name}: two runs differ")
        x, y = args[0], got.outs[0]
        if op.maps and y.shape == x.shape and y.stride() != torch.empty_like(x).stride():
            wrong.append(f"{name}: strides {y.stride()} for x of {x.stride()}")
    if wrong:
        raise Wrong("; ".join(wrong))
    return {"error": worst}


def _names(op: Op, args: Sequence[Any]) -> list[str]:
    return [n for n, v in zip(op.arguments, args, strict=True) if isinstance(v, Tensor) and v.is_floating_point()]


def _special(device: str) -> list[Item]:
    """What the cases of the ops don't show."""
    se = lambda n, c, s: case(x=(n, c, s, s), w1=(c // 16, c), b1=(c // 16,), w2=(c, c // 16), b2=(c,))
    made: list[Item] = []

    def item(name: str, run: Callable[[], Payload | None], seconds: float = ITEM_SECONDS) -> None:
        made.append(Item(name, run, seconds=seconds))

    for op in (o for o in OPS.values() if o.formula is not None and o.maps):
        for value in ("nan", "inf", "-inf"):
            item(f"{value} in {op.name}", functools.partial(_special_value, op, float(value), device))
    for op, c in ((o, c) for o in OPS.values() if o.formula is not None for c in o.cases if _maximum(c)):
        item(f"ties in {op.name} {label(op, c)} #{op.cases.index(c)}", functools.partial(_ties, op, c, device))
    item("pool_scale, checked", functools.partial(_pool_scale, device))
    big = se(64, 256, 56) if device == "cuda" else se(2, 64, 7)
    for layout in ("contiguous", "channels_last"):
        item(f"equal bits over 20 runs, {layout}", functools.partial(_deterministic, big, layout, device))
        item(f"more than 2^31 elements, {layout}", functools.partial(_huge, layout, device))
        item(f"torch.compile fullgraph, {layout}", functools.partial(_compiles, se(4, 64, 14), layout, device))
        item(f"CUDA graph, capture and replay, {layout}", functools.partial(_graph, se(8, 64, 28), layout, device))
    for dtype in ("float32", "bfloat16"):
        item(f"timm seresnet50, fused, {dtype}", functools.partial(_model, dtype, device), seconds=240)
    return made


def _maximum(c: Case) -> bool:
    return "max" in str(c.args.get("pool", "")) or c.args.get("max_weight", 0) != 0


def _special_value(op: Op, value: float, device: str) -> Payload:
    """Where the float64 formula has NaN or an infinity the kernel has it too, and nowhere else."""
    c = next(c for c in op.cases if "bench" not in c.tags and 0 not in c.args[op.arguments[0]])
    args = testing.draw(c, op, torch.float32, device)
    args[0].view(-1)[args[0].numel() // 2] = value
    with fused_attn.use_backend(kernels_of(device)), torch.no_grad():
        got = op(*args)
    with torch.no_grad():
        true = op.formula(*testing.double(args))  # type: ignore[misc]
    error = testing.error(_first(got), _first(true).float())
    if not error < 1e-4:
        raise Wrong(f"error {error:.1e}")
    return {"error": error}


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _ties(op: Op, c: Case, device: str) -> Payload:
    """The gradient of a maximum that occurs more than once."""
    args = testing.draw(c, op, torch.float32, device, ties=True)
    with fused_attn.use_backend(kernels_of(device)):
        got = testing.answer(op, args)
    true, plain = testing.truth(op, args, got), testing.plain(op, args, got)
    found = testing.deviations(got, true, plain, testing.terms(op, args), _names(op, args))
    if wrong := [str(d) for d in found if not d.ok]:
        raise Wrong("; ".join(wrong))
    return {"error": max((d.error for d in found), default=0.0)}


def _pool_scale(device: str) -> Payload:
    """The op that takes any excite, in every way that `testing.check` knows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 7, 7, generator=generator).to(device)
    w = torch.randn(16, 16, generator=generator).to(device) / 4

    def gated(x: Tensor, w: Tensor) -> Tensor:
        return ops.pool_scale(x, lambda p, w: torch.sigmoid(p @ w.to(p.dtype)), w)

    report = testing.check(gated, x, w)  # by choice: a forced backend would refuse the strides that no kernel walks
    if not report:
        raise Wrong(str(report))
    return {"findings": len(report.findings)}


def _deterministic(c: Case, layout: str, device: str) -> Payload:
    args = testing.draw(c, OPS[SE], torch.float32, device, layout=layout)
    with fused_attn.use_backend(kernels_of(device)):
        first = testing.answer(OPS[SE], args)
        for i in range(20):
            if not testing.same_bits(first, testing.answer(OPS[SE], args)):
                raise Wrong(f"run {i + 2} differs from run 1")
    return {"runs": 21}


def _huge(layout: str, device: str) -> Payload:
    """Offsets beyond 2^31. Samples don't depend on one another, so the first and the last are enough to compare."""
    if device != "cuda":
        raise NotRun("needs a GPU")
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        raise NotRun("needs 40 GiB of free GPU memory")
    n, c, s, dtype = 43, 1024, 224, torch.bfloat16
    small = case(x=(1, c, 1, 1), w1=(c // 16, c), b1=(c // 16,), w2=(c, c // 16), b2=(c,))
    args = list(testing.draw(small, OPS[SE], dtype, device))
    order = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x, dy = (torch.empty(n, c, s, s, dtype=dtype, device=device).to(memory_format=order) for _ in range(2))
    x.normal_()
    dy.normal_()
    args[0] = x.requires_grad_()
    with fused_attn.use_backend(kernels_of(device)):
        y = OPS[SE](*args)
        (dx,) = torch.autograd.grad(y, x, dy)
    errors = {}
    for i in (0, n - 1):
        part = [x[i : i + 1].detach(), *args[1:]]
        true = testing.double(part)
        leaf = true[0].requires_grad_()
        want = OPS[SE].formula(*true)  # type: ignore[misc]
        (dwant,) = torch.autograd.grad(want, leaf, dy[i : i + 1].double())
        errors |= {f"y[{i}]": testing.error(y[i : i + 1], want), f"dx[{i}]": testing.error(dx[i : i + 1], dwant)}
    if max(errors.values()) > 0.02:
        raise Wrong(f"errors {errors}")
    return {"elements": x.numel(), "error": errors}


def _compiles(c: Case, layout: str, device: str) -> Payload:
    """One graph, forward and backward, with the values of the uncompiled op."""
    op, errors = OPS[SE], {}
    for dtype in (torch.float32, torch.bfloat16):
        args = testing.draw(c, op, dtype, device, layout=layout)
        torch._dynamo.reset()
        compiled = torch.compile(lambda *a: op(*a) * 2, fullgraph=True)
        got, want = testing.answer(compiled, args), testing.answer(lambda *a: op(*a) * 2, args)
        pairs = zip((*got.outs, *got.grads), (*want.outs, *want.grads), strict=True)
        errors[str(dtype)] = max(testing.error(a, b) for a, b in pairs if a is not None and b is not None)
        if errors[str(dtype)] > 8 * torch.finfo(dtype).eps:
            raise Wrong(f"{dtype}: error {errors[str(dtype)]:.1e} against the uncompiled op")
    return {"error": errors}


def _graph(c: Case, layout: str, device: str) -> Payload:
    """Captured once, replayed on other values, equal to a plain call to the bit."""
    if device != "cuda":
        raise NotRun("needs a GPU")
    op = OPS[SE]
    args = [
        a.requires_grad_() if isinstance(a, Tensor) else a for a in testing.draw(c, op, device=device, layout=layout)
    ]
    leaves = [a for a in args if isinstance(a, Tensor)]
    dy = torch.randn_like(args[0])
    step = lambda: (y := op(*args), *torch.autograd.grad(y, leaves, dy))
    with fused_attn.use_backend(kernels_of(device)):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        with torch.no_grad():
            for i, t in enumerate(leaves):
                t.copy_(torch.roll(t, 1 + i))
        graph.replay()
        torch.cuda.synchronize()
        kept, plain = [t.detach().clone() for t in captured], step()
    if wrong := [i for i, (a, b) in enumerate(zip(kept, plain, strict=True)) if not testing.identical(a, b.detach())]:
        raise Wrong(f"results {wrong} of the replay differ from a plain call")
    return {"results": len(kept)}


def _model(dtype: str, device: str) -> Payload:
    """A whole network, fused, against itself in float64."""
    if not importable("timm"):
        raise NotRun("timm is not installed")
    from . import demo

    size = 224 if device == "cuda" else 64
    found = demo.errors(demo.build("seresnet50", size), size, device, DTYPES[dtype])
    if wrong := demo.too_far(found):
        raise Wrong("; ".join(wrong))
    return found


def _pytest(device: str) -> Payload:
    """The tests that ask for a GPU."""
    if device != "cuda":
        raise NotRun("needs a GPU")
    if not importable("pytest") or not (ROOT / "tests").exists():
        raise NotRun("pytest or the tests are not here")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests",
        "-m",
        "gpu",
        "-q",
        "-x",
        "--no-header",
        "-p",
        "no:cacheprovider",
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=220, check=False)
    last = (run.stdout.strip().splitlines() or [""])[-1]
    if run.returncode == 5:
        raise NotRun("no test is marked gpu")
    if run.returncode:
        raise Wrong(run.stdout[-1500:] + run.stderr[-500:])
    return {"pytest": last}


# ---- kernels


def kernels(device: str) -> list[Item]:
    """Timings, most valuable first."""
    shapes = ((256, 56), (512, 28), (1024, 14), (2048, 7))
    batches = (64, 8, 256) if device == "cuda" else (2,)
    found = []
    for n in batches:
        for dtype, layout in (
            ("bfloat16", "channels_last"), ("float32", "nchw"), ("bfloat16", "nchw"), ("float32", "channels_last"),
        ):  # fmt: skip
            for mode in ("forward", "forward+backward"):
                for channels, s in shapes:
                    h = channels // 16
                    c = case(x=(n, channels, s, s), w1=(h, channels), b1=(h,), w2=(channels, h), b2=(channels,))
                    found.append(_timing(Job(OPS[SE], c, dtype, layout, mode, device, backends=(kernels_of(device),))))
    for op in bench_ops():
        for c in (c for c in op.cases if "bench" in c.tags and op.name != SE):
            for mode in ("forward", "forward+backward"):
                found.append(_timing(Job(op, c, "bfloat16", "nchw", mode, device, backends=(kernels_of(device),))))
    return found


def _timing(job: Job) -> Item:
    def run() -> Payload:
        rows = [row.dict() for row in job.run(0.4)]
        ours = [row for row in rows if row["impl"].startswith("fused") and row["error"]]
        if ours:
            raise Wrong(ours[0]["error"])
        return {"rows": rows}

    def prepare() -> None:
        """Compiles everything into the caches on disk."""
        subjects = job.subjects()[: None if job.device == "cuda" else 1]
        out = _first(job.op(*(a.detach() if isinstance(a, Tensor) else a for a in job.sets[0])))
        for s in subjects:
            candidate = s.candidate(
                job.mode if s.name != "clone" else "forward", [torch.ones_like(out)] * len(job.sets)
            )
            with candidate.context():
                candidate.calls[0]()

    return Item(f"{job.op.name} {job.label} {job.dtype} {job.layout} {job.mode}", run, prepare)


# ---- worker and parent


def items_of(part: str, device: str, match: str) -> list[Item]:
    """The items of a part whose name matches a regular expression."""
    return [i for i in {"correctness": correctness, "kernels": kernels}[part](device) if re.search(match, i.name)]


def work(part: str, device: str, match: str, share: str, log: Path, prepare: bool) -> int:
    """A worker: runs its share of the items that the log doesn't have, and appends a line before and after each."""
    number, workers = map(int, share.split("/"))
    measure.prepare(device)
    done = {entry["name"] for entry in _entries(log)}
    with log.open("a") as out:
        say = lambda **entry: (out.write(json.dumps(entry, default=str) + "\n"), out.flush())
        for item in items_of(part, device, match)[number::workers]:
            if item.name in done:
                continue
            say(name=item.name, status="begun", limit=item.seconds, at=time.time())
            start, entry = time.perf_counter(), {"status": "passed"}
            try:
                function = item.prepare if prepare else item.run
                entry |= (function() or {}) if function else {}  # type: ignore[operator]
            except NotRun as reason:
                entry = {"status": "not run", "reason": str(reason)}
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
                entry = {"status": "failed", "reason": text[:2000]}
                if device == "cuda" and "CUDA error" in text:
                    say(name=item.name, seconds=round(time.perf_counter() - start, 2), **entry)
                    os._exit(3)  # every later call in this process would fail as well
            say(name=item.name, seconds=round(time.perf_counter() - start, 2), **entry)
            if device == "cuda":
                torch.cuda.empty_cache()
    return 0


def _entries(log: Path) -> Iterator[dict[str, Any]]:
    if log.exists():
        for line in log.read_text().splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


@dataclass
class Worker:
    """A process, its log, and what it died of."""

    command: list[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    crashes: int = 0
    done: bool = False
    errors: Path = field(init=False)

    def __post_init__(self) -> None:
        self.errors = self.log.with_suffix(".stderr")

    def start(self) -> None:
        """Starts, or starts again behind the item that killed it."""
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=errors, cwd=ROOT)

    def open_item(self) -> dict[str, Any] | None:
        """What it is at."""
        *_, last = [None, *_entries(self.log)]
        return last if last is not None and last["status"] == "begun" else None

    def close_item(self, reason: str) -> None:
        """Writes down what became of the item in the worker's stead."""
        if (item := self.open_item()) is not None:
            with self.log.open("a") as out:
                out.write(json.dumps({"name": item["name"], "status": "failed", "reason": reason}) + "\n")

    def stop(self) -> None:
        """Ends the process."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def look(self) -> None:
        """Restarts a worker that died, stops an item that takes too long."""
        assert self.process is not None
        code, item = self.process.poll(), self.open_item()
        if code is None:
            if item is not None and time.time() - item["at"] > item["limit"]:
                self.stop()
                self.close_item(f"stopped after {item['limit']:.0f} s")
                self.start()
            return
        if code == 0:
            self.done = True
            return
        tail = self.errors.read_text(errors="replace")[-1500:].replace(str(ROOT), ".")
        self.close_item(f"the process died with status {code}: {tail}")
        self.crashes += 1
        if self.crashes > CRASHES or (item is None and code != 3):
            self.done = True
            measure.log(f"a worker gave up after status {code}: {tail}")
        else:
            self.start()


def drive(
    part: str, device: str, match: str, workers: int, deadline: float, folder: Path, prepare: bool = False
) -> tuple[list[dict[str, Any]], bool]:
    """Runs a part's items in worker processes, until all are done or time is up. Entries, and whether all was done."""
    names = [i.name for i in items_of(part, device, match)]
    crew = []
    for number in range(min(workers, len(names))):
        log = folder / f"{part}-{'prepare' if prepare else 'run'}-{number}.jsonl"
        command = [sys.executable, "-m", "bench", "qualify", "--only", part, "--device", device, "--match", match]
        command += ["--worker", f"{number}/{min(workers, len(names))}", "--log", str(log)]
        crew.append(Worker(command + (["--prepare"] if prepare else []), log))
    for w in crew:
        w.start()
    bar, seen = progress(range(len(names)), f"{part}{' (compiling)' if prepare else ''}", len(names)), 0
    read = lambda: [e for w in crew for e in _entries(w.log) if e["status"] != "begun"]
    while not all(w.done for w in crew) and time.monotonic() < deadline:
        time.sleep(0.1 if device == "cpu" else 0.5)
        for w in crew:
            if not w.done:
                w.look()
        bar.update(len(read()) - seen)
        seen = len(read())
    for w in crew:
        w.stop()
    bar.close()
    by = {e["name"]: e for e in read()}
    missing = {"status": "not run", "reason": "the time was up"}
    if all(w.done for w in crew):
        missing = {"status": "not run", "reason": "its worker gave up"}
    entries = [by.get(name, {"name": name, **missing}) for name in names]
    return entries, len(by) == len(names)


def qualify(part: str, options: argparse.Namespace, device: str, arguments: Sequence[str]) -> int:
    """One part: runs it, writes its JSON, says what was found."""
    deadline = time.monotonic() + options.minutes * 60 - 15
    start = time.monotonic()
    cores = os.cpu_count() or 1
    workers = options.workers or (max(1, min(6, cores // 2)) if device == "cuda" else 1)
    with tempfile.TemporaryDirectory(prefix="fused_attn_") as temporary:
        folder = Path(temporary)
        if part == "kernels" and device == "cuda":
            until = time.monotonic() + 0.4 * (deadline - time.monotonic())
            drive(part, device, options.match, workers, until, folder, prepare=True)
        entries, finished = drive(
            part, device, options.match, workers if part == "correctness" else 1, deadline, folder
        )
    counts = Counter(e["status"] for e in entries)
    result = {
        "schema": measure.SCHEMA,
        "kind": f"qualify-{part}",
        "provenance": measure.provenance(device, measure.command_line("bench", arguments)),
        "backend": kernels_of(device),
        "finished": finished,
        "seconds": round(time.monotonic() - start, 1),
        "counts": dict(counts),
        "rows": [row for e in entries for row in e.pop("rows", [])],
        "items": entries,
    }
    path = options.out / measure.slug(result["provenance"]["device_name"]) / f"{part}-{measure.stamp()}.json"
    write_json(path, result)
    said = ", ".join(f"{counts[s]} {s}" for s in ("passed", "failed", "not run"))
    print(f"{part} on {result['provenance']['device_name']} in {result['seconds']:.0f} s: {said}")
    for text, several in _grouped(e for e in entries if e["status"] != "passed"):
        print(f"  {text}" + (f" (and {several - 1} more like it)" if several > 1 else ""))
    print(f"  wrote {path.name}")
    return 1 if counts["failed"] else 0


def _grouped(entries: Iterable[dict[str, Any]]) -> list[tuple[str, int]]:
    """One line for all entries of one status and reason; every failure has its own."""
    found: dict[tuple[str, str], list[str]] = {}
    for e in entries:
        key = e["name"] if e["status"] == "failed" else e.get("reason", "")
        found.setdefault((e["status"], key), []).append(f"{e['status']}: {e['name']}: {e.get('reason', '')}")
    return [(lines[0][:400], len(lines)) for lines in found.values()]


def parser(add: Any) -> argparse.ArgumentParser:
    """The options of `python -m bench qualify`."""
    p: argparse.ArgumentParser = add(
        "qualify",
        help="correctness and speed on this machine's NVIDIA GPU, as JSON (status 2 where there is none)",
        description=(__doc__ or "").replace("`", ""),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--only", choices=PARTS, help="one part (default: both)")
    p.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder for the JSON")
    p.add_argument("--match", default="", help="only items whose name matches this regular expression")
    p.add_argument("--minutes", type=float, default=9.0, help="time for one part (default: 9)")
    p.add_argument("--workers", type=int, help="processes that share the GPU (default: half the cores, at most 6)")
    for hidden in ("--worker", "--log"):
        p.add_argument(hidden, help=argparse.SUPPRESS)
    p.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help=argparse.SUPPRESS)  # cpu: for the tests
    return p


def main(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Runs `python -m bench qualify`."""
    if options.worker:
        return work(options.only, options.device, options.match, options.worker, Path(options.log), options.prepare)
    if options.device == "cuda":
        if not torch.cuda.is_available():
            print("bench qualify: this machine has no GPU that torch can use; nothing was run")
            return 2
        if (why := backend.triton_missing()) is not None:
            print(f"bench qualify: {why}; nothing was run")
            return 2
    parts = [options.only] if options.only else PARTS
    return max(qualify(part, options, options.device, arguments) for part in parts)
