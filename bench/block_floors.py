"""What was asked of the mechanisms' speed, and what was measured."""

import math
from collections.abc import Sequence

from .contests import SHAPES, TAIL, WITHOUT
from .floors import Floor
from .measure import Row
from .subjects import INDUCTORS

MODES = ("forward", "forward+backward")
# At (8, 512, 28, 28), float32, against eager: forward, forward+backward. Targets are half as much again.
AT = (8, 512, 28)
FLOORS = {
    ("CBAM (timm)", "nchw"): (2.3, 2.3),
    ("CBAM (pytorchcv)", "nchw"): (5.0, 3.0),
    ("SK (timm)", "nchw"): (2.5, 1.8),
    ("SK (timm)", "channels_last"): (6.0, None),
    ("PSA", "nchw"): (1.7, 1.7),
    ("DRSN", "nchw"): (3.5, 5.0),
    ("BAM merge", "nchw"): (2.5, 2.0),
    ("split attention (timm)", "nchw"): (1.8, 1.5),
    ("Shuffle Attention", "nchw"): (2.2, 2.2),
    ("SGE", "nchw"): (2.2, 2.2),
    ("f2", "nchw"): (2.2, 2.2),
    ("f3", "nchw"): (2.2, 2.2),
}


def floors(rows: Sequence[Row]) -> list[Floor]:
    """The floors of what was measured, from the rows of one or more runs: the best counts."""
    label = f"{AT[0]}x{AT[1]}x{AT[2]}x{AT[2]}"
    times: dict[tuple[str, str, str, int], dict[str, float]] = {}
    for r in rows:
        if r.case == label and r.dtype == "float32" and r.median_us is not None:
            times.setdefault((r.op, r.layout, r.mode, r.run), {})[r.impl] = r.median_us
    found = []
    asked = {(r.op, r.layout, r.mode) for r in rows}
    rivalled = any(r.impl in INDUCTORS for r in rows)
    for (name, layout), wanted in FLOORS.items():
        for mode, floor in zip(MODES, wanted, strict=True):
            if (name, layout, mode) not in asked:
                continue
            groups = [t for (n, lay, m, _), t in times.items() if (n, lay, m) == (name, layout, mode) and "fused" in t]
            over = [g["eager"] / g["fused"] for g in groups if "eager" in g]
            rivals = [min(g[i] for i in INDUCTORS if i in g) / g["fused"] for g in groups if set(INDUCTORS) & set(g)]
            where = f"{name}, {mode}" + (", channels_last" if layout != "nchw" else "")
            per = "not measured" if not over else " ".join(f"{v:.2f}" for v in over)
            if floor is not None:
                found.append(Floor(where, floor, 1.5 * floor, max(over, default=None), per))
            if not rivalled:
                continue
            per = "not measured" if not rivals else " ".join(f"{v:.2f}" for v in rivals)
            found.append(Floor(f"{where}: the better Inductor", 1.0, None, max(rivals, default=None), per))
    return found + tail_floors(rows)


def tail_floors(rows: Sequence[Row]) -> list[Floor]:
    """A tail's: the geometric means over the shapes, forward+backward, and what the gate costs at the first two."""
    times: dict[tuple[int, str], dict[str, float]] = {}
    for r in rows:
        if (r.op, r.mode, r.dtype, r.layout) == (TAIL, MODES[1], "float32", "nchw") and r.median_us is not None:
            times.setdefault((r.run, r.case), {})[r.impl] = r.median_us
    if not times:
        return []
    per: dict[str, dict[int, list[tuple[str, float]]]] = {"eager": {}, "inductor": {}, WITHOUT: {}}
    for (number, case), t in times.items():
        rivals = [t[i] for i in INDUCTORS if i in t]
        for name, rival in (
            ("eager", t.get("eager")),
            ("inductor", min(rivals, default=None)),
            (WITHOUT, t.get(WITHOUT)),
        ):
            if rival is not None and "fused" in t:
                per[name].setdefault(number, []).append((case, rival / t["fused"]))
    found = []
    for name, title, floor, target in (
        ("eager", f"{TAIL}, {MODES[1]}", 2.0, 2.6), ("inductor", f"{TAIL}, {MODES[1]}: the better Inductor", 1.15, 1.5),
    ):  # fmt: skip
        runs = [each for each in per[name].values() if len(each) == len(SHAPES)]
        means = [math.prod(v for _, v in each) ** (1 / len(each)) for each in runs]
        told = "not measured" if not runs else " ".join(f"{c.split('x', 1)[1]}:{v:.2f}" for c, v in runs[-1])
        if runs or name == "eager":
            found.append(Floor(title, floor, target, max(means, default=None), told))
    for c, s in SHAPES[:2]:
        ratios = [v for each in per[WITHOUT].values() for case, v in each if case.endswith(f"x{c}x{s}x{s}")]
        told = " ".join(f"{1 / v:.3f}" for v in ratios)
        found.append(
            Floor(f"{TAIL}, {MODES[1]}, {c}x{s}: 1.10 of that without", 1 / 1.1, None, max(ratios, default=None), told)
        )
    return found
