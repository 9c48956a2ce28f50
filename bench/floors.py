"""The speed table: what was asked of squeeze-and-excitation, and what was measured."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from fused_attn.registry import OPS, case

from .labels import SE, label
from .measure import Row
from .subjects import INDUCTORS
from .support import table

HOST = case(x=(1, 64, 7, 7), w1=(4, 64), b1=(4,), w2=(64, 4), b2=(64,))  # so small that the host is all the time


class Floor(NamedTuple):
    """One line of the speed table: what was asked, what was measured."""

    name: str
    floor: float
    target: float | None
    measured: float | None
    detail: str

    @property
    def met(self) -> bool:
        return self.measured is not None and self.measured >= self.floor


# Squeeze-and-excitation, float32 NCHW, against eager: name, mode, batch (None: the host's case), floor, target.
FLOORS = (
    ("forward (inference), N=8", "forward", 8, 1.65, 2.1),
    ("forward (inference), N=1", "forward", 1, 2.8, 4.0),
    ("forward+backward, N=8", "forward+backward", 8, 1.75, 2.4),
    ("host cost at 1x64x7x7, no gradients", "forward", None, 4.0, 8.0),
    ("host cost at 1x64x7x7, recording", "recording", None, 3.0, 8.0),
)


def floors(rows: Sequence[Row]) -> list[Floor]:
    """The speed table, from the rows of one or more runs: the best counts. Ours is the fused module that users have."""
    host = label(OPS[SE], HOST)
    rows = [r for r in rows if r.op == SE and r.dtype == "float32" and r.layout == "nchw"]
    times: dict[tuple[int, str, str], dict[str, float]] = {}
    for r in rows:
        group = times.setdefault((r.run, r.mode, r.case), {})
        if r.median_us is not None:
            group[r.impl] = r.median_us
    ours = lambda group: group.get("fused module", group.get("fused"))
    runs = sorted({r.run for r in rows})
    found = []
    for name, mode, n, floor, target in FLOORS:
        best, detail = None, "not measured"
        for run in runs:
            groups = {
                c: g for (i, m, c), g in times.items()
                if i == run and m == mode and (c == host if n is None else c != host and c.startswith(f"{n}x"))
            }  # fmt: skip
            if not groups or any("eager" not in g or ours(g) is None for g in groups.values()):
                continue
            ratios = {c: g["eager"] / ours(g) for c, g in groups.items()}
            mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
            if best is None or mean > best:
                best, detail = mean, " ".join(f"{c.split('x', 1)[1]}:{v:.2f}" for c, v in ratios.items())
        found.append(Floor(name, floor, target, best, detail))
    for mode in ("forward", "forward+backward"):
        ratios = {}
        for (_, m, c), g in times.items():
            rivals = [g[i] for i in INDUCTORS if i in g]
            if m == mode and c != host and rivals and ours(g) is not None:
                ratios[c] = max(ratios.get(c, 0.0), min(rivals) / ours(g))
        worst = min(ratios, key=lambda c: ratios[c], default=None)
        detail = "not measured" if worst is None else " ".join(f"{c}:{v:.2f}" for c, v in ratios.items())
        found.append(
            Floor(f"{mode}, every shape: the better Inductor", 1.0, None, ratios[worst] if worst else None, detail)
        )
    return found


def best_of(runs: int) -> str:
    """What a column of floors says of what was measured."""
    return f"best of {runs} runs" if runs > 1 else "measured"


def floor_table(found: Sequence[Floor], runs: int = 1) -> str:
    """The speed table of so many runs, to be read."""
    show = lambda v: "–" if v is None else f"{v:.2f}"
    rows = [
        [f.name, show(f.floor), show(f.target), show(f.measured), "met" if f.met else "MISSED", f.detail] for f in found
    ]
    head = ["SE, float32 NCHW, speed-up", "floor", "target", best_of(runs), ""]
    return table(head, [r[:5] for r in rows]) + "\n\n" + "\n".join(f"{r[0]}: {r[5]}" for r in rows)
