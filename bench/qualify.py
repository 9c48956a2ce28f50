"""`python -m bench qualify`: whether this machine's GPU computes what it should, and how fast. One JSON per part.

    correctness   every op, case, dtype and layout against float64 on the device, every block and tail; NaN, ties, more
                  than 2^31 elements, streams, autocast, compile, graphs, a model
    kernels       every backend's kernels against eager, Inductor and x.clone() at ResNet-50's shapes; CUDA events, cold
                  L2; every mechanism fused against what its users have
    models        the attention tax of whole networks, two of them compiled as well
    sanitizer     the kernels under compute-sanitizer, on small cases

Needs torch, triton and pytest, and neither network nor installation; what else is missing counts as "not run". The work
is a list of items, most valuable first. Worker processes take them, so that a kernel that kills its process, or hangs,
costs one item; when a part's time is up, or it is interrupted, its workers are stopped, and what there is gets written.
`--resume FILE` goes on from there.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fused_attn import backend

from . import figures, measure, trial_correctness, trial_sanitizer, trial_speed
from .support import ROOT, progress, write_json
from .trials import Item, NotRun, end, kernels_of, shares

PARTS: dict[str, Callable[[str], list[Item]]] = {
    "correctness": trial_correctness.items,
    "kernels": trial_speed.kernels,
    "models": trial_speed.whole,
    "sanitizer": trial_sanitizer.items,
}
CRASHES = 8
PATIENCE = 2.0  # seconds that a worker has to end what it started
INTERRUPTED, STOPPED = "it was interrupted", 130


def items_of(part: str, device: str, match: str) -> list[Item]:
    """The items of a part whose name matches a regular expression."""
    return [i for i in PARTS[part](device) if re.search(match, i.name)]


def work(part: str, device: str, match: str, share: str, log: Path, prepare: bool) -> int:
    """A worker: runs its share of the items that the log doesn't have, and appends a line before and after each."""
    number, workers = map(int, share.split("/"))
    measure.prepare(device)
    if part == "correctness":  # what isn't ours to prove must not move the figures
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
    done = {entry["name"] for entry in _entries(log)}
    with log.open("a") as out:
        say = lambda **entry: (out.write(json.dumps(entry, default=str) + "\n"), out.flush())
        for item in shares(items_of(part, device, match), workers)[number]:
            if item.name in done:
                continue
            say(name=item.name, status="begun", limit=item.seconds, at=time.time())
            start, entry = time.perf_counter(), {"status": "passed"}
            try:
                function = item.prepare if prepare else item.run
                entry |= (function() or {}) if function else {}  # type: ignore[operator]
                if device == "cuda" and entry.get("rows"):
                    entry["clocks"] = measure.clocks()  # while it is still warm
            except NotRun as reason:
                entry = {"status": "not run", "reason": str(reason)}
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
                entry = {"status": "failed", "reason": text[:2000]}
                if device == "cuda" and re.search(r"CUDA error|Triton Error \[CUDA\]", text):
                    say(name=item.name, seconds=round(time.perf_counter() - start, 2), **entry)
                    os._exit(3)  # every later call in this process would fail as well
            say(name=item.name, seconds=round(time.perf_counter() - start, 2), **entry)
            if device == "cuda":
                try:
                    torch.cuda.empty_cache()
                except RuntimeError:  # the device was lost after all
                    os._exit(3)
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
            self.process = subprocess.Popen(
                self.command, stdout=subprocess.DEVNULL, stderr=errors, cwd=ROOT, start_new_session=True
            )

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
        """Ends the process and those that it started."""
        if self.process is not None:
            end(self.process, PATIENCE)

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
        end(self.process)  # what it started may live
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
    part: str, device: str, match: str, workers: int, deadline: float, folder: Path, prepare: bool = False,
    done: Sequence[dict[str, Any]] = (),
) -> tuple[list[dict[str, Any]], bool, bool]:  # fmt: skip
    """Runs a part's items in worker processes, until all are done or time is up. Entries, whether all was done, and
    whether it was interrupted.

    done: entries of items that aren't run again
    """
    names = [i.name for i in items_of(part, device, match)]
    crew = []
    for number in range(min(workers, len(names))):
        log = folder / f"{part}-{'prepare' if prepare else 'run'}-{number}.jsonl"
        log.write_text("".join(json.dumps(e) + "\n" for e in done))
        command = [sys.executable, "-m", "bench", "qualify", "--only", part, "--device", device, "--match", match]
        command += ["--worker", f"{number}/{min(workers, len(names))}", "--log", str(log)]
        crew.append(Worker(command + (["--prepare"] if prepare else []), log))
    bar, seen = progress(range(len(names)), f"{part}{' (compiling)' if prepare else ''}", len(names)), 0
    read = lambda: [e for w in crew for e in _entries(w.log) if e["status"] != "begun"]
    why = "the time was up"
    try:
        for w in crew:
            w.start()
        while not all(w.done for w in crew) and time.monotonic() < deadline:
            time.sleep(0.1 if device == "cpu" else 0.5)
            for w in crew:
                if not w.done:
                    w.look()
            count = len({e["name"] for e in read()})
            bar.update(count - seen)
            seen = count
    except KeyboardInterrupt:
        why = INTERRUPTED
    finally:  # they have sessions of their own: nobody else ends them
        for w in crew:
            w.stop()
    bar.close()
    by = {e["name"]: e for e in read()}
    missing = {"status": "not run", "reason": why}
    if all(w.done for w in crew):
        missing = {"status": "not run", "reason": "its worker gave up"}
    entries = [by.get(name, {"name": name, **missing}) for name in names]
    return entries, len(by) == len(names), why == INTERRUPTED


def resumed(part: str, path: Path | None) -> list[dict[str, Any]]:
    """What an earlier result of this part settled, with its rows; items that it hadn't time for are left out.

    Raises ValueError where the file is none.
    """
    if path is None:
        return []
    content = json.loads(path.read_text())
    if content.get("kind") != f"qualify-{part}":
        raise ValueError(f"{path} is no result of `qualify --only {part}`")
    settled = [e for e in content["items"] if e["status"] in ("passed", "failed")]
    if settled and content["rows"]:
        settled[0]["rows"] = content["rows"]
    return settled


def qualify(part: str, options: argparse.Namespace, device: str, arguments: Sequence[str]) -> int:
    """One part: runs it, writes its JSON, says what was found."""
    deadline = time.monotonic() + options.minutes * 60 - 15
    start = time.monotonic()
    cores = os.cpu_count() or 1
    before = resumed(part, options.resume)
    workers = options.workers or (max(1, min(14, cores - 2)) if device == "cuda" else 1)
    measure.prepare(device)
    source = measure.provenance(device, measure.command_line("bench", arguments))  # as long as the device answers
    with tempfile.TemporaryDirectory(prefix="fused_attn_") as temporary:
        folder = Path(temporary)
        if part == "kernels" and device == "cuda" and not before:
            until = time.monotonic() + 0.4 * (deadline - time.monotonic())
            *_, interrupted = drive(part, device, options.match, workers, until, folder, prepare=True)
            if interrupted:
                print(f"{part}: interrupted before anything was measured")
                return STOPPED
        entries, finished, interrupted = drive(
            part, device, options.match, workers if part == "correctness" else 1, deadline, folder, done=before
        )
    counts = Counter(e["status"] for e in entries)
    result = {
        "schema": measure.SCHEMA,
        "kind": f"qualify-{part}",
        "provenance": source,
        "backend": kernels_of(device),
        "finished": finished,
        "seconds": round(time.monotonic() - start, 1),
        "counts": dict(counts),
        "rows": [row for e in entries for row in e.pop("rows", [])],
        "items": entries,
    }
    path = options.out / measure.slug(source["device_name"]) / f"{part}-{measure.stamp()}.json"
    write_json(path, result)
    try:
        with suppress(Exception):  # what was measured is on disk; a device that no longer answers takes nothing away
            if device == "cuda":
                source["driver_after"] = measure.driver()
            if part == "kernels":
                source["copy_gbps"] = figures.copy_gbps(device)
            write_json(path, result)
    except KeyboardInterrupt:
        interrupted = True
    said = ", ".join(f"{counts[s]} {s}" for s in ("passed", "failed", "not run"))
    print(f"{part} on {source['device_name']} in {result['seconds']:.0f} s: {said}")
    for text, several in _grouped(e for e in entries if e["status"] != "passed"):
        print(f"  {text}" + (f" (and {several - 1} more like it)" if several > 1 else ""))
    print(f"  wrote {path.name}")
    if interrupted:
        return STOPPED
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
    p.add_argument("--only", choices=list(PARTS), help="one part (default: all, one after the other)")
    p.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder for the JSON")
    p.add_argument("--resume", type=Path, metavar="JSON", help="go on from this result of the same part (--only)")
    p.add_argument("--match", default="", help="only items whose name matches this regular expression")
    p.add_argument("--minutes", type=float, default=9.0, help="time for one part (default: 9)")
    p.add_argument("--workers", type=int, help="processes that share the GPU (default: all cores but two, at most 14)")
    for hidden in ("--worker", "--log"):
        p.add_argument(hidden, help=argparse.SUPPRESS)
    p.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help=argparse.SUPPRESS)  # cpu: for the tests
    return p


def main(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Runs `python -m bench qualify`."""
    if options.worker:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # an item may have processes to end
        return work(options.only, options.device, options.match, options.worker, Path(options.log), options.prepare)
    if options.device == "cuda":
        if not torch.cuda.is_available():
            print("bench qualify: this machine has no GPU that torch can use; nothing was run")
            return 2
        if (why := backend.triton_missing()) is not None:
            print(f"bench qualify: {why}; nothing was run")
            return 2
    if options.resume and not options.only:
        print("bench qualify: --resume takes --only, the part that the file is of")
        return 2
    # What stops it lets it write what it has, and its workers, which a terminal doesn't reach, end with it.
    before = {s: signal.signal(s, signal.default_int_handler) for s in (signal.SIGTERM, signal.SIGHUP)}
    try:
        worst = 0
        for part in [options.only] if options.only else list(PARTS):
            status = qualify(part, options, options.device, arguments)
            worst = max(worst, status)
            if status == STOPPED:
                break
        return worst
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
