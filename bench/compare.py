"""`python -m bench compare A B`: what got slower between two results of `bench ops`, `blocks` or `models`.

Times of two machines, or of one on two days, aren't compared. What is compared is each file's own ratio of a row to
its reference, which was timed beside it: eager, else x.clone(); of a network the plain one. `--absolute` compares
times after all, for two runs on one idle machine.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from .measure import Row, log
from .support import table

REFERENCES = ("eager", "clone", "plain")
_FIELDS = frozenset(f.name for f in fields(Row))
Key = tuple[str, ...]


class Change(NamedTuple):
    """One row of both files. key: its case, its implementation, and the reference's; before, after: its time in units
    of the reference's, or microseconds."""

    key: Key
    before: float
    after: float

    @property
    def slower(self) -> float:
        """By how much, in per cent."""
        return 100 * (self.after / self.before - 1)


def read(path: Path) -> list[Row]:
    """The rows of a result. Raises ValueError where the file is no result with rows."""
    try:
        content = json.loads(path.read_text())
        return [Row(**{k: v for k, v in r.items() if k in _FIELDS}) for r in content["rows"]]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of ops, blocks or models: {type(error).__name__} {error}") from None


def relative(rows: Sequence[Row], against: str | None, absolute: bool = False) -> dict[Key, float]:
    """Every row's time in units of its reference's: the median over the runs. Rows without one are left out.

    against: the reference; None: the first of `REFERENCES` that stands beside a row. Its name ends the key: a ratio to
    eager isn't compared with one to x.clone()
    """
    groups: dict[Key, dict[int, dict[str, float]]] = {}
    for r in rows:
        if r.median_us:
            groups.setdefault((r.op, r.case, r.mode, r.dtype, r.layout), {}).setdefault(r.run, {})[r.impl] = r.median_us
    found: dict[Key, list[float]] = {}
    for where, runs in groups.items():
        for times in runs.values():
            name = against or next((n for n in REFERENCES if n in times), None)
            for impl, us in times.items():
                if absolute:
                    found.setdefault((*where, impl, "µs"), []).append(us)
                elif name is not None and name in times and impl not in REFERENCES:
                    found.setdefault((*where, impl, name), []).append(us / times[name])
    return {key: median(values) for key, values in found.items()}


def changes(a: Mapping[Key, float], b: Mapping[Key, float]) -> list[Change]:
    """What is in both, worst first."""
    found = [Change(key, a[key], b[key]) for key in a if key in b]
    return sorted(found, key=lambda c: -c.slower)


def broken(a: Sequence[Row], b: Sequence[Row]) -> dict[Key, str]:
    """Ours that were timed in `a` and failed in `b`: the key, without a reference, and the error."""
    key = lambda r: (r.op, r.case, r.mode, r.dtype, r.layout, r.impl)
    timed = {key(r) for r in a if r.median_us and "fused" in r.impl}
    return {key(r): r.error or "no time" for r in b if not r.median_us and key(r) in timed}


def per_cent(text: str) -> float:
    """5 or 5%."""
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = -1.0
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be a percentage such as 5%; got {text!r}")
    return value


def parser(add: Any) -> argparse.ArgumentParser:
    """The options of `python -m bench compare`."""
    p: argparse.ArgumentParser = add(
        "compare", help="what got slower between two results", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    p.add_argument("before", type=Path, metavar="A", help="JSON of a result")
    p.add_argument("after", type=Path, metavar="B", help="another, later one")
    p.add_argument(
        "--fail-if-slower", type=per_cent, metavar="5%", help="status 1 where a row is slower by more, or ours failed"
    )
    p.add_argument("--against", help="the reference (default: eager, else clone, else plain)")
    p.add_argument("--impl", default="", help="only rows whose implementation's name contains this, such as fused")
    p.add_argument("--absolute", action="store_true", help="compare times: right only on one idle machine")
    return p


def main(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Runs `python -m bench compare`."""
    try:
        rows = [read(p) for p in (options.before, options.after)]
    except (OSError, ValueError) as error:
        log(str(error))
        return 2
    sides = [relative(r, options.against, options.absolute) for r in rows]
    found = [c for c in changes(*sides) if options.impl in c.key[-2]]
    failed = {key: error for key, error in broken(*rows).items() if options.impl in key[-1]}
    for key, error in failed.items():
        print(f"failed in B: {' '.join(key)}: {error}")
    limit = options.fail_if_slower
    if not found:
        if failed and limit is not None:
            return 1
        log("the two results have no row in common that has a reference")
        return 2
    lines = [[*c.key, f"{c.before:.3g}", f"{c.after:.3g}", f"{c.slower:+.1f} %"] for c in found]
    head = ["op", "case", "mode", "dtype", "layout", "implementation", "in units of", "A", "B", "slower by"]
    print(table(head, lines, right=7))
    alone = [sum(key not in other and key[:-1] not in failed for key in own) for own, other in (sides, sides[::-1])]
    print(f"\n{len(found)} rows in both; {alone[0]} only in A, {alone[1]} only in B")
    worse = [] if limit is None else [c for c in found if c.slower > limit]
    if worse:
        print(f"{len(worse)} slower by more than {limit:g} %: {', '.join(' '.join(c.key) for c in worse[:5])}")
    return int(bool(worse or (failed and limit is not None)))
