"""What `python -m bench ops` and `blocks` share: options, the way through all jobs, the file that results are in."""

import argparse
import csv
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from . import figures, measure, shapes
from .measure import Row
from .support import progress, write_json

FORMATS = ("table", "csv", "json")


def options(p: argparse.ArgumentParser, modes: int, seconds: float = 2.0, **choices: Iterable[str]) -> None:
    """Adds the shared options. choices: what `mode`, `dtype`, `layout` and `baseline` may be. The first dtype and
    layout are the defaults, the first `modes` modes, and all baselines but max-autotune."""
    for name, every in ((name, list(choices[name])) for name in ("mode", "dtype", "layout")):
        usual = every[: modes if name == "mode" else 1]
        text = f"of {', '.join(every)}, or all (default: {' '.join(usual)})"
        p.add_argument(f"--{name}", nargs="+", choices=[*every, "all"], metavar="NAME", default=usual, help=text)
    if "baseline" in choices:
        usual = [name for name in choices["baseline"] if name != "max-autotune"]
        text = f"of {', '.join(choices['baseline'])} (default: {' '.join(usual)})"
        p.add_argument(
            "--baseline", nargs="*", default=usual, choices=list(choices["baseline"]), metavar="NAME", help=text
        )
        p.add_argument("--check-floors", action="store_true", help="only what the speed table asks, and that table")
    p.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    text = f"time for one line of the table (default: {seconds:g})"
    p.add_argument("--seconds", type=float, default=seconds, help=text)
    p.add_argument("--quick", action="store_true", help="few cases and little time: a look, not a measurement")
    p.add_argument("--runs", type=int, help="how often to go through everything (default: 1, with --check-floors 3)")
    p.add_argument("--format", choices=FORMATS, default="table", help="of what is printed (default: table)")
    p.add_argument("--out", type=Path, help="folder for the JSON; a folder named after the machine is made in it")
    p.set_defaults(parser=p)


def refuse_ignored(given: argparse.Namespace, *selections: str) -> None:
    """Stops, as the parser does, where an option would be taken and do nothing.

    selections: options that select what `--check-floors` selects by itself
    """
    if given.batch and not given.shapes:
        given.parser.error("--batch is the N of --shapes, which isn't given")
    also = [name for name in selections if getattr(given, name) != given.parser.get_default(name)]
    if given.check_floors and also:
        options = ", ".join(f"--{name}" for name in also)
        given.parser.error(f"--check-floors selects by itself what it measures; without it: {options}")


def shape_options(p: argparse.ArgumentParser, *default: str) -> None:
    """Adds the options that select shapes of networks."""
    text = f"the shapes of these networks at 224 px, of {', '.join(shapes.SETS)}"
    text += f" (default: {', '.join(default)})" if default else ", instead of the ops' own cases"
    p.add_argument(
        "--shapes", nargs="+", choices=list(shapes.SETS), metavar="NETWORK", default=list(default), help=text
    )
    p.add_argument("--batch", nargs="+", type=int, help="N of those (default: 8; on a GPU 1, 8, 64 and 256)")


def shapes_of(options: argparse.Namespace, device: str) -> list[tuple[int, tuple[int, int, int]]]:
    """Batch and shape of everything in the sets that are asked for; with --quick two of them."""
    every = dict.fromkeys(shape for name in options.shapes for shape in shapes.SETS[name])
    found = list(itertools.product(options.batch or shapes.BATCHES[device], every))
    return [found[0], found[-1]] if options.quick else found


def chosen(given: list[str], every: Iterable[str]) -> list[str]:
    """What an option selects."""
    return list(every) if "all" in given else given


def run(
    kind: str,
    selected: Sequence[Any],
    given: argparse.Namespace,
    arguments: Sequence[str],
    floors: Callable[[Sequence[Row]], Sequence[Any]] | None,
    name: str,
) -> tuple[list[Row], Sequence[Any]]:
    """Runs every job, and returns the rows and, where they are asked for, the floors.

    selected: jobs, which have a `title`, a `device` and `run(seconds, number)`
    name: of the file, without time and folder. It is written after every job: what was measured isn't lost.
    """
    device = selected[0].device
    measure.prepare(device)
    asked = floors is not None and given.check_floors
    runs = given.runs or (3 if asked else 1)
    source = measure.provenance(device, measure.command_line("bench", arguments))
    if kind != "models":
        source["copy_gbps"] = figures.copy_gbps(device)
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
    found = floors(rows) if asked and floors is not None else ()
    if asked:
        content["floors"] = [f._asdict() | {"met": f.met} for f in found]
    if device == "cpu":
        source["probe_after"] = measure.busy()
    else:
        source["driver_after"] = measure.driver()
    if path:
        write_json(path, content)
        measure.log(f"wrote {path}")
    if given.format == "json":
        print(json.dumps(content, indent=1, default=str))
    elif given.format == "csv":
        lines = csv.DictWriter(sys.stdout, [f.name for f in fields(Row)], lineterminator="\n")
        lines.writeheader()
        lines.writerows(r.dict() for r in rows)
    return rows, found


def failures(rows: Sequence[Row]) -> bool:
    """Says on stderr what failed, and returns whether anything of ours did."""
    bad = [r for r in rows if r.error is not None]
    for r in bad:
        measure.log(f"failed: {r.impl}, {r.op} {r.case} {r.mode} {r.dtype} {r.layout}: {r.error}")
    return any("fused" in r.impl for r in bad)
