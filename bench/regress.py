"""`python -m bench regress`: whether a mechanism moves more than it did, or lost its lead over eager. CI runs it.

Ratios only, on one small map, so that it holds on any machine, a noisy one too. `expected.json` lists for every
mechanism and mode
    passes   over a feature map, by the budgets of the ops that a call launches: exact
    floor    the speed-up over eager that must be there: about half of what an idle machine shows. A miss is measured
             again, a few seconds later, before it counts

It wants a process of its own: the heap is pinned for as long as that lives.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fused_attn import backend

from . import figures, measure
from .blocks import Job
from .contests import CONTESTS
from .measure import Timing
from .support import importable, progress, table

EXPECTED = Path(__file__).with_name("expected.json")
SHAPE = (4, 256, 28)
TRIES, SECONDS, LONGEST = 4, 0.1, 3.0


class Found(NamedTuple):
    """What one mechanism did in one mode, and what is wrong with that."""

    passes: float
    speedup: float
    wrong: str | None


def expected() -> dict[tuple[str, str], dict[str, float]]:
    """(mechanism, mode) -> passes, floor."""
    listed = json.loads(EXPECTED.read_text())
    return {(name, mode): row for name, modes in listed.items() for mode, row in modes.items()}


def missing(name: str) -> str | None:
    """Why a mechanism can't be checked here, or None."""
    needs = CONTESTS[name].needs
    return backend.extension() or (f"{needs} is not installed" if needs and not importable(needs) else None)


def check(name: str, mode: str, row: dict[str, float], tries: int = TRIES, seconds: float = SECONDS) -> Found:
    """Counts, and times until it is as fast as it should be or the tries are over. The best counts.

    What kept a machine busy during one try may be over by the next, so they are 1, 2, and 3 seconds apart.
    """
    job = Job(CONTESTS[name], *SHAPE, "float32", "nchw", mode, "cpu", ("eager",))
    subjects, candidates, y = job.candidates()
    passes, _ = figures.traffic(candidates[0], y.nbytes)
    pair = [c for s, c in zip(subjects, candidates, strict=True) if s.name in ("fused", "eager")]
    best = 0.0
    for i in range(tries):
        if i:
            time.sleep(min(1 << (i - 1), LONGEST))
        timings = measure.interleave(pair, seconds)
        ours, eager = timings["fused"], timings["eager"]
        if not (isinstance(ours, Timing) and isinstance(eager, Timing)):
            return Found(passes, 0.0, f"{name}, {mode}: failed: {ours if isinstance(ours, str) else eager}")
        best = max(best, eager.median_us / ours.median_us)
        if best >= row["floor"]:
            break
    wrong = []
    if passes != row["passes"]:
        wrong.append(f"{passes:g} passes over a feature map, {row['passes']:g} expected")
    if best < row["floor"]:
        wrong.append(f"{best:.2f} times as fast as eager, at least {row['floor']:g} expected")
    return Found(passes, best, f"{name}, {mode}: {'; '.join(wrong)}" if wrong else None)


def parser(add: Any) -> argparse.ArgumentParser:
    """The options of `python -m bench regress`."""
    return add("regress", help="passes and speed-ups against bench/expected.json, in a minute: what CI runs")  # type: ignore[no-any-return]


def main(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Runs `python -m bench regress`."""
    measure.prepare("cpu")
    lines, wrong = [], []
    for (name, mode), row in progress(list(expected().items()), "bench regress"):
        if (why := missing(name)) is not None:
            lines.append([name, mode, "–", "–", "–", "–", f"not run: {why}"])
            continue
        found = check(name, mode, row)
        wrong += [found.wrong] if found.wrong else []
        told = [f"{v:g}" for v in (found.passes, row["passes"])] + [f"{found.speedup:.2f}", f"{row['floor']:g}"]
        lines.append([name, mode, *told, "WRONG" if found.wrong else "ok"])
    print(table(["mechanism", "mode", "passes", "expected", "over eager", "floor", ""], lines, right=2))
    for text in wrong:
        print(text)
    return int(bool(wrong))
