"""What `python -m bench ops` and `blocks` share: options, the way through all jobs, the file that results are in."""

import argparse
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from . import measure
from .measure import Row
from .support import progress, write_json


def options(p: argparse.ArgumentParser, **choices: Iterable[str]) -> None:
    """Adds the shared options. choices: what `mode`, `dtype`, `layout` and `baseline` may be; the first dtype and
    layout, all modes and baselines are the defaults."""
    for name, default in (("mode", "all"), ("dtype", None), ("layout", None)):
        every = list(choices[name])
        chosen = [default or every[0]]
        text = f"of {', '.join(every)}, or all (default: {chosen[0]})"
        p.add_argument(f"--{name}", nargs="+", choices=[*every, "all"], metavar="NAME", default=chosen, help=text)
    p.add_argument("--baseline", nargs="*", default=list(choices["baseline"]), choices=list(choices["baseline"]))
    p.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    p.add_argument("--seconds", type=float, default=2.0, help="time for one row of the table (default: 2)")
    p.add_argument("--runs", type=int, help="how often to go through everything (default: 1, with --check-floors 3)")
    p.add_argument("--check-floors", action="store_true", help="only what the speed table asks, and that table")
    p.add_argument("--out", type=Path, help="folder for the JSON; a folder named after the machine is made in it")


def chosen(given: list[str], every: Iterable[str]) -> list[str]:
    """What an option selects."""
    return list(every) if "all" in given else given


def run(
    kind: str,
    selected: Sequence[Any],
    given: argparse.Namespace,
    arguments: Sequence[str],
    floors: Callable[[Sequence[Row]], Sequence[Any]],
    name: str,
) -> tuple[list[Row], Sequence[Any]]:
    """Runs every job, and returns the rows and, where they are asked for, the floors.

    selected: jobs, which have a `title`, a `device` and `run(seconds, number)`
    name: of the file, without time and folder. It is written after every job: what was measured isn't lost.
    """
    device = selected[0].device
    measure.prepare(device)
    runs = given.runs or (3 if given.check_floors else 1)
    source = measure.provenance(device, measure.command_line("bench", arguments))
    path = None
    if given.out:
        path = given.out / measure.slug(source["device_name"]) / f"{name}-{measure.stamp()}.json"
    rows: list[Row] = []
    content: dict[str, Any] = {"schema": measure.SCHEMA, "kind": kind, "provenance": source, "rows": []}
    bar = progress(list(itertools.product(range(runs), selected)), f"bench {kind}")
    for number, job in bar:
        bar.set_postfix_str(job.title)
        made = job.run(given.seconds, number)
        rows += made
        content["rows"] += [r.dict() for r in made]
        if path:
            write_json(path, content)
    found = floors(rows) if given.check_floors else ()
    if given.check_floors:
        content["floors"] = [f._asdict() | {"met": f.met} for f in found]
    if device == "cpu":
        source["probe_after"] = measure.busy()
    if path:
        write_json(path, content)
        measure.log(f"wrote {path}")
    return rows, found


def failures(rows: Sequence[Row]) -> bool:
    """Says what failed, and returns whether anything of ours did."""
    bad = [r for r in rows if r.error is not None]
    for r in bad:
        print(f"failed: {r.impl}, {r.op} {r.case} {r.mode} {r.dtype} {r.layout}: {r.error}")
    return any(r.impl.startswith("fused") for r in bad)
