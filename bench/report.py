"""`python -m bench report`: rewrites what is generated in README.md, between its markers.

support    which op has which backend, which mechanism is there and what it converts: from the registry and the sources
measured   the newest results of each machine and kind: from bench/results
"""

import argparse
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from fused_attn.plan import RULES
from fused_attn.registry import BLOCKS, OPS, Op

from .measure import MODES, Row, log
from .subjects import INDUCTORS
from .support import ROOT, significant

README, RESULTS = ROOT / "README.md", ROOT / "bench" / "results"


def _markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(cells) + " |" for cells in rows)])


def _has_triton(op: Op) -> bool:
    spec = importlib.util.find_spec(op.eager.__module__ + "_triton")
    if spec is None or spec.origin is None:
        return False
    return re.search(rf"^def {op.name}\(|^{op.name}\b.*=", Path(spec.origin).read_text(), re.M) is not None


def _has_cpp(op: Op) -> bool:
    sources = (ROOT / "csrc" / "cpu").glob("*.cpp")
    return any(re.search(rf"^FA_REGISTER\({op.name}\)", s.read_text(), re.M) for s in sources)


def _first_sentence(op: Op) -> str:
    text = " ".join((op.__doc__ or "").split())
    return re.split(r"[:.;] |[.]$", text, maxsplit=1)[0]


def support(root: Path = ROOT) -> str:
    """The support tables. A backend is there where its source is: what this machine has built doesn't matter."""
    yes = lambda there: "yes" if there else ""
    rows = []
    for op in OPS.values():
        if op.formula is None:
            continue
        halves = [op, *([OPS[op.name + "_bwd"]] if op.name + "_bwd" in OPS else [])]
        rows.append([
            f"`{op.name}`", _first_sentence(op), "yes",
            yes(all(map(_has_triton, halves))), yes(all(map(_has_cpp, halves))), "yes" if len(halves) > 1 else "",
        ])  # fmt: skip
    halves = [OPS["pool_scale_reduce"], OPS["pool_scale_apply"], OPS["channel_pool"], OPS["scale"]]
    rows.append([
        "`pool_scale`", "Both ends around any small excite", "yes",
        yes(all(map(_has_triton, halves))), yes(all(map(_has_cpp, halves))), "yes",
    ])  # fmt: skip
    head = ["op", "what it does", "eager PyTorch", "Triton (GPU)", "C++ (CPU)", "backward"]
    parts = [_markdown(head, rows)]
    rows = []
    for block in BLOCKS.values():
        title, _, link = block.paper.rpartition(", ")
        converts = ", ".join(f"`{r.path}`" for r in block.rules)
        rows.append([f"`{block.module.__name__}`", f"[{title}]({link})", converts])
    parts.append(_markdown(["module", "paper", "`fuse_` converts"], rows))
    tails = [f"`{rule.path}`" for rule in RULES.values() if rule.tail is not None]
    if tails:
        parts.append(
            "The residual add and the activation behind a gate, and a BatchNorm right before it, are fused with it in "
            f"{', '.join(tails)}."
        )
    return "\n\n".join(parts)


def _newest(results: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The newest file of each machine and kind of result, in the order of their names; of mechanisms the newest of each
    command, because one run of all there is takes hours."""
    found: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for path in sorted(results.glob("*/*.json")):
        content = json.loads(path.read_text())
        kind = f"{content['kind']}-floors" if content.get("floors") else content["kind"]
        command = content["provenance"]["command"] if kind == "blocks" else ""
        found.setdefault((path.parent.name, kind), {})[command] = content | {"path": f"{path.parent.name}/{path.name}"}
    return {key: list(of.values()) for key, of in sorted(found.items())}


def _where(content: dict[str, Any], link: str) -> str:
    p = content["provenance"]
    about = [p["device_name"], f"torch {p['torch']}"]
    if p["device"] == "cpu":
        about += [f"{p['threads']} thread{'s' if p['threads'] > 1 else ''}", p["clock"], p["simd"]]
    else:
        about += [f"triton {p['triton']}", p["clock"]]
    commit = (p["git"] or "unknown")[:10] + (" with changes" if p["git_changed"] else "")
    return f"{', '.join(about)}; `{p['command']}` at {commit}, {p['time'][:10]} ([all figures]({link}))"


def _floors(content: dict[str, Any]) -> str:
    show = lambda v: "" if v is None else f"{v:.2f}"
    lines = [
        [f["name"], show(f["measured"]), show(f["floor"]), show(f["target"]), f["detail"]] for f in content["floors"]
    ]
    what = {"ops": ("squeeze-and-excitation, float32 NCHW", "per shape"), "blocks": ("8x512x28x28, float32", "per run")}
    title, each = what[content["kind"]]
    return _markdown([f"{title}: speed-up", "measured", "floor", "target", each], lines)


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
    return _markdown(head, lines)


def _blocks(contents: Sequence[dict[str, Any]]) -> str:
    """Per mechanism and mode: speed-up over eager at each shape, and its range over shapes of what else there is."""
    eager: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    inductor: dict[tuple[str, str], dict[str, float]] = {}
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
                inductor.setdefault((name, mode), {})[case] = min(rivals) / by["fused"]
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
    return _markdown(["speed-up over eager", "mode", *columns, "over Inductor, where measured"], lines)


def _span(values: Sequence[float]) -> str:
    if not values:
        return ""
    low, high = min(values), max(values)
    return significant(low) if low == high else f"{significant(low)} – {significant(high)}"


def _correctness(content: dict[str, Any]) -> str:
    counts = content["counts"]
    said = ", ".join(f"{counts.get(s, 0)} {s}" for s in ("passed", "failed", "not run"))
    return f"Correctness on the device ({content['backend']}): {said}."


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "ops-floors": _floors,
    "ops": _op_rows,
    "blocks-floors": _floors,
    "qualify-kernels": _op_rows,
    "qualify-correctness": _correctness,
}


def measured(results: Path = RESULTS) -> str:
    """What was measured, where, and with which command."""
    parts, gpu = [], False
    for (_, kind), contents in _newest(results).items():
        if kind != "blocks" and kind not in SECTIONS:
            continue
        gpu |= contents[-1]["provenance"]["device"] != "cpu"
        parts += [_where(content, f"bench/results/{content['path']}") for content in contents]
        parts.append(_blocks(contents) if kind == "blocks" else SECTIONS[kind](contents[-1]))
    if not parts:
        parts.append("No result is committed yet.")
    if not gpu:
        parts.append(
            "No GPU result is committed yet: on a machine with an NVIDIA GPU, `python -m bench qualify` makes one."
        )
    return "\n\n".join(parts)


BLOCKS_OF_README: dict[str, Callable[[], str]] = {"support": support, "measured": measured}


def render(text: str) -> str:
    """README's text with its generated parts made anew. Raises ValueError where a marker is missing."""
    for name, make in BLOCKS_OF_README.items():
        begin, end = f"<!-- {name}: generated by `python -m bench report` -->", f"<!-- end of {name} -->"
        if begin not in text or end not in text:
            raise ValueError(f"README.md has no markers for {name!r}: {begin} … {end}")
        head, _, rest = text.partition(begin)
        text = f"{head}{begin}\n\n{make()}\n\n{end}{rest.partition(end)[2]}"
    return text


def parser(add: Any) -> argparse.ArgumentParser:
    """The options of `python -m bench report`."""
    p: argparse.ArgumentParser = add("report", help="write the tables of README.md from the registry and bench/results")
    p.add_argument("--check", action="store_true", help="write nothing; status 1 where README.md is stale")
    return p


def main(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Runs `python -m bench report`."""
    old = README.read_text()
    new = render(old)
    if options.check:
        if new != old:
            log("README.md is stale: run `python -m bench report`")
        return int(new != old)
    README.write_text(new)
    return 0
