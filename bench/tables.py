"""Markdown tables of what was measured: the newest results of each machine and kind, from bench/results."""

import json
import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .floors import best_of
from .measure import MODES, Row
from .subjects import INDUCTORS
from .support import ROOT, significant

RESULTS = ROOT / "bench" / "results"
BUSY = 1.1  # of the probe's wall clock and CPU time: above it a neighbour had a share of the machine


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in rows)])


def newest(results: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The newest file of each machine and kind of result, oldest first; of mechanisms the newest of each command,
    because one run of all there is takes hours.

    A file of a part (`--quick`, `--match`) never takes the place of a whole one.
    """
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for path in sorted(results.glob("*/*.json")):
        content = json.loads(path.read_text())
        kind = f"{content['kind']}-floors" if content.get("floors") else content["kind"]
        command = content["provenance"]["command"]
        of = found.setdefault((path.parent.name, kind), {})
        parts = any(partial(c["provenance"]["command"]) for c in of.values())  # all of them, or none
        if of and partial(command) and not parts:
            continue
        if parts and not partial(command):
            of.clear()
        command = command if kind in MERGED else ""
        of.pop(command, None)  # a rerun comes last: where files overlap, the last one counts
        of[command] = content | {"path": f"{path.parent.name}/{path.name}"}
    return {key: list(of.values()) for key, of in sorted(found.items())}


def partial(command: str) -> bool:
    """Whether a command measures a part, or less well, of what its other options select."""
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    given = {w.split("=")[0] for w in words if w.startswith("--") and len(w) > 2}
    return any(full.startswith(w) for w in given for full in ("--quick", "--match"))


def _where(content: dict[str, Any], link: str) -> str:
    p = content["provenance"]
    about = [p["device_name"], f"torch {p['torch']}"]
    if p["device"] == "cpu":
        about += [f"{p['threads']} thread{'s' if p['threads'] > 1 else ''}", p["clock"], p["simd"]]
    else:
        about += [f"triton {p['triton']}", p["clock"]]
    commit = (p["git"] or "unknown")[:10] + (" with changes" if p["git_changed"] else "")
    slow = [b["wall_over_cpu"] for b in (p.get("probe"), p.get("probe_after")) if b]
    if max(slow, default=0.0) > BUSY:
        about.append(f"busy: wall ÷ CPU {max(slow):.2f}")
    return f"{', '.join(about)}; `{p['command']}` at {commit}, {p['time'][:10]} ([all figures]({link}))"


def _floors(content: dict[str, Any]) -> str:
    show = lambda v: "" if v is None else f"{v:.2f}"
    lines = [
        [f["name"], show(f["measured"]), show(f["floor"]), show(f["target"]), f["detail"]] for f in content["floors"]
    ]
    runs = 1 + max((r.get("run", 0) for r in content["rows"]), default=0)
    what = {"ops": ("squeeze-and-excitation, float32 NCHW", "per shape"), "blocks": ("8x512x28x28, float32", "per run")}
    title, each = what[content["kind"]]
    return markdown([f"{title}: speed-up", best_of(runs), "floor", "target", each], lines)


def _op_rows(content: dict[str, Any]) -> str:
    """Per op, dtype, layout and mode: the range of speed-ups over all cases."""
    rows = [Row(**r) for r in content["rows"]]
    groups: dict[tuple[str, ...], dict[str, dict[str, Row]]] = {}
    for r in rows:
        groups.setdefault((r.op, r.dtype, r.layout, r.mode), {}).setdefault(r.case, {})[r.impl] = r
    lines = []
    for (name, dtype, layout, mode), cases in groups.items():
        eager, inductor, clone, backends = [], [], [], set()
        for by in cases.values():
            ours = next((by[i] for i in by if i.startswith("fused module")), None)
            ours = ours or next((by[i] for i in by if i.startswith("fused")), None)
            if ours is None or ours.median_us is None:
                continue
            backends.add(ours.backend)
            if by.get("eager") and by["eager"].median_us:
                eager.append(by["eager"].median_us / ours.median_us)
            rivals = [by[i].median_us for i in INDUCTORS if i in by and by[i].median_us]
            if rivals:
                inductor.append(min(rivals) / ours.median_us)  # type: ignore[type-var]
            if ours.of_clone:
                clone.append(ours.of_clone)
        lines.append([
            f"`{name}`", f"{dtype}, {layout}", mode, ", ".join(sorted(backends)), str(len(cases)),
            _span(eager), _span(inductor), _span(clone),
        ])  # fmt: skip
    order = {mode: i for i, mode in enumerate(MODES)}
    lines.sort(key=lambda cells: (cells[0], cells[1], order[cells[2]]))
    head = ["what", "x", "mode", "backend", "cases", "speed-up over eager", "over Inductor", "time ÷ `x.clone()`"]
    return markdown(head, lines)


def _blocks(contents: Sequence[dict[str, Any]]) -> str:
    """Per mechanism and mode: speed-up over eager at each shape, and its range over shapes of what else there is."""
    eager: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    inductor: dict[tuple[str, str], dict[tuple[str, str, str], float]] = {}
    for content in contents:
        groups: dict[tuple[str, ...], dict[str, float]] = {}
        for r in (Row(**r) for r in content["rows"]):
            if r.median_us is not None:
                groups.setdefault((r.op, r.mode, r.case, r.dtype, r.layout), {})[r.impl] = r.median_us
        for (name, mode, case, dtype, layout), by in groups.items():
            if "fused" not in by:
                continue
            n, _, shape = case.partition("x")
            column = shape if (n, dtype, layout) == ("8", "float32", "nchw") else f"N={n}, {dtype}, {layout}"
            if "eager" in by:
                eager.setdefault((name, mode), {}).setdefault(column, {})[shape] = by["eager"] / by["fused"]
            if rivals := [by[i] for i in INDUCTORS if i in by]:
                inductor.setdefault((name, mode), {})[case, dtype, layout] = min(rivals) / by["fused"]
    columns = list(dict.fromkeys(column for of in eager.values() for column in of))
    columns.sort(key=lambda c: (c.startswith("N="), c.startswith("N=1,"), [-int(v) for v in re.findall(r"\d+$", c)], c))
    lines = [
        [
            name,
            mode,
            *(_span(list(of.get(c, {}).values())) for c in columns),
            _span(list(inductor.get(key, {}).values())),
        ]
        for key, of in eager.items()
        for name, mode in [key]
    ]
    return markdown(["speed-up over eager", "mode", *columns, "over Inductor, where measured"], lines)


def _span(values: Sequence[float]) -> str:
    if not values:
        return ""
    low, high = min(values), max(values)
    return significant(low) if low == high else f"{significant(low)} – {significant(high)}"


def _correctness(content: dict[str, Any]) -> str:
    counts = content["counts"]
    said = ", ".join(f"{counts.get(s, 0)} {s}" for s in ("passed", "failed", "not run"))
    what = "Correctness on the device" if content["kind"] == "qualify-correctness" else "Under compute-sanitizer"
    return f"{what} ({content['backend']}): {said}."


def _models(contents: Sequence[dict[str, Any]]) -> str:
    """The attention tax: per network, mode and x, images per second and what attention takes of them."""
    rows = [Row(**r) for content in contents for r in content["rows"]]
    groups: dict[tuple[str, ...], dict[str, Row]] = {}
    for r in rows:
        groups.setdefault((r.op, r.mode, r.case.split("x")[0], r.dtype, r.layout), {})[r.impl] = r
    lines = []
    for (name, mode, n, dtype, layout), by in groups.items():
        for how in ("", *dict.fromkeys(i[len("attention") :] for i in by if "compiled" in i and "fused" not in i)):
            if not how.startswith(", fused") and f"attention{how}" in by:
                pairs = [(f"attention{f}{how}", f"plain{f}{how}") for f in ("", ", fused")]
                rate = lambda i, by=by, n=n: "" if i not in by else _rate(by[i], int(n))
                tax = lambda pair, by=by: "" if any(i not in by for i in pair) else _tax(*(by[i] for i in pair))
                mib = lambda i, by=by: "" if i not in by or not by[i].peak_bytes else f"{by[i].peak_bytes / 2**20:.0f}"
                where = f"N={n}, {dtype}, {layout}{how}"
                cells = [rate(i) for pair in zip(*pairs, strict=True) for i in pair] + [tax(p) for p in pairs]
                lines.append([name, mode, where, *cells, *(mib(i) for i in (pairs[0][0], pairs[1][0], pairs[0][1]))])
    head = ["network", "mode", "x", "images/s", "fused: images/s", "plain: images/s", "plain, fused: images/s"]
    head += ["tax", "tax, fused", "peak MiB", "fused: peak MiB", "plain: peak MiB"]
    plains = dict.fromkeys((r.op, r.source) for r in rows if r.impl == "plain")
    return markdown(head, lines) + "\n\nPlain, without attention: " + "; ".join(f"{n}: {p}" for n, p in plains) + "."


def _rate(row: Row, n: int) -> str:
    return "failed" if not row.median_us else f"{n / row.median_us * 1e6:.1f}"


def _tax(row: Row, plain: Row) -> str:
    return "" if not (row.median_us and plain.median_us) else f"{100 * (row.median_us / plain.median_us - 1):+.1f} %"


def _memory(content: dict[str, Any]) -> str:
    """What a training step keeps and takes."""
    cells = lambda forms: [f"{forms[f][what]:.0f}" for what in ("saved", "peak") for f in ("unfused", "fused")]
    head = [f"a training step, N={content['batch']}", "MiB saved for backward", "fused", "peak MiB", "fused"]
    return markdown(head, [[name, *cells(forms)] for name, forms in content["mib"].items()])


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "ops-floors": _floors,
    "ops": _op_rows,
    "blocks-floors": _floors,
    "qualify-kernels": _op_rows,
    "qualify-correctness": _correctness,
    "qualify-models": lambda content: _models([content]),
    "qualify-sanitizer": _correctness,
    "memory": _memory,
}
MERGED: dict[str, Callable[[Sequence[dict[str, Any]]], str]] = {"blocks": _blocks, "models": _models}


def measured(results: Path = RESULTS) -> str:
    """What was measured, where, and with which command."""
    parts, gpu = [], False
    for (_, kind), contents in newest(results).items():
        if kind not in MERGED and kind not in SECTIONS:
            continue
        gpu |= contents[-1]["provenance"]["device"] != "cpu"
        parts += [_where(content, f"bench/results/{content['path']}") for content in contents]
        parts.append(MERGED[kind](contents) if kind in MERGED else SECTIONS[kind](contents[-1]))
    if not parts:
        parts.append("No result is committed yet.")
    if not gpu:
        parts.append(
            "No GPU result is committed yet: on a machine with an NVIDIA GPU, `python -m bench qualify` makes one."
        )
    return "\n\n".join(parts)
