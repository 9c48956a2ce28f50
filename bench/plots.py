"""Pictures of what was measured, as PNG: speed-up per shape, roofline, attention tax; one of each per machine.

Drawn for a README's width. The same results give the same bytes: fonts are matplotlib's own, and no date or version is
written into a picture.
"""

import io
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from .contests import CONTESTS
from .measure import Row
from .tables import newest

WIDTH, DPI = 8.6, 110  # inches and dots per inch: 946 pixels
COLOURS = (
    "#1b6ca8", "#2a9d8f", "#e9a23b", "#c8553d", "#7b5ea7", "#6b705c", "#d68fb8", "#59432e", "#8ecae6", "#222222",
)  # fmt: skip
MODES = {"forward": "forward (inference)", "forward+backward": "forward and backward"}
Contents = Sequence[dict[str, Any]]


class Plan(NamedTuple):
    """One picture. name: of the file; draw: (figure's module, contents) -> figure."""

    name: str
    title: str
    contents: Contents
    draw: Callable[[Any, Contents], Any]


def planned(results: Path) -> list[Plan]:
    """The pictures that these results give."""
    found = []
    for (machine, kind), contents in newest(results).items():
        device = contents[-1]["provenance"]["device_name"]
        if kind in ("blocks", "qualify-kernels") and speedups(contents):
            title = f"Speed-up over eager per mechanism and shape, {device}"
            found.append(Plan(f"speedup-{machine}.png", title, contents, _speedup))
        if kind in ("models", "qualify-models") and taxes(contents):
            found.append(
                Plan(f"tax-{kind}-{machine}.png", f"Attention tax of whole networks, {device}", contents, _tax)
            )
        if kind in ("ops", "blocks", "qualify-kernels") and points(contents):
            title = f"Bandwidth of {'mechanisms' if kind == 'blocks' else 'ops'}, {device}"
            found.append(Plan(f"roofline-{kind}-{machine}.png", title, contents, _roofline))
    return found


def draw(results: Path) -> dict[str, bytes]:
    """File name -> PNG, of all pictures."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    made = {}
    style = {"font.family": "DejaVu Sans", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with plt.style.context("default"), plt.rc_context(style):
        for plan in planned(results):
            figure = plan.draw(plt, plan.contents)
            figure.suptitle(plan.title, fontsize=11)
            out = io.BytesIO()
            figure.savefig(out, format="png", dpi=DPI, metadata={"Software": None})
            plt.close(figure)
            made[plan.name] = out.getvalue()
    return made


def legend(figure: Any, axes: Any, **more: Any) -> None:
    """What any of the axes shows, each label once, below all of them."""
    found: dict[str, Any] = {}
    for ax in axes:
        for handle, label in zip(*ax.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(found.values(), found, loc="outside lower center", frameon=False, **more)


def rows_of(contents: Contents) -> list[Row]:
    """All rows of several files."""
    return [Row(**r) for content in contents for r in content["rows"]]


def usual(contents: Contents) -> tuple[str, str, str]:
    """Which batch, dtype and layout a picture is of: 8 samples in float32 NCHW, or what most rows have."""
    count = Counter((r.case.split("x")[0], r.dtype, r.layout) for r in rows_of(contents) if r.impl == "fused")
    first = ("8", "float32", "nchw")
    return first if first in count or not count else count.most_common(1)[0][0]


def speedups(contents: Contents) -> dict[tuple[str, str], dict[str, float]]:
    """(mechanism, mode) -> shape -> speed-up over eager, of the usual batch, dtype and layout. A later file counts."""
    groups: dict[tuple[str, str, str], dict[str, float]] = {}
    wanted = usual(contents)
    for r in rows_of(contents):
        n, _, shape = r.case.partition("x")
        if (n, r.dtype, r.layout) == wanted and r.op in CONTESTS and r.median_us and r.mode in MODES:
            groups.setdefault((r.op, r.mode, shape), {})[r.impl] = r.median_us
    found: dict[tuple[str, str], dict[str, float]] = {}
    for (name, mode, shape), by in groups.items():
        if "fused" in by and "eager" in by:
            found.setdefault((name, mode), {})[shape] = by["eager"] / by["fused"]
    return found


def _largest(shape: str) -> int:
    return -int(shape.split("x")[-1])


def _speedup(plt: Any, contents: Contents) -> Any:
    found, (n, dtype, layout) = speedups(contents), usual(contents)
    names = list(dict.fromkeys(name for name, _ in found))
    shapes = sorted({s for by in found.values() for s in by}, key=_largest)
    modes = [mode for mode in MODES if any(m == mode for _, m in found)]
    figure, grid = plt.subplots(
        1, len(modes), figsize=(WIDTH, 1.5 + 0.25 * len(names)), sharey=True, sharex=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    axes = grid[0]
    for ax, mode in zip(axes, modes, strict=True):
        for i, shape in enumerate(shapes):
            at = [(v[shape], y) for y, n in enumerate(names) if shape in (v := found.get((n, mode), {}))]
            label = shape.replace("x", "×")
            if at:
                ax.scatter(*zip(*at, strict=True), s=28, color=COLOURS[i % len(COLOURS)], label=label, zorder=3)
        ax.axvline(1, color="#444444", linewidth=1)
        ax.set_xscale("log")
        ticks = [t for t in (0.5, 1, 2, 4, 8, 16, 32, 64) if t <= 1.3 * max(max(by.values()) for by in found.values())]
        ax.set_xticks(ticks, [f"{t:g}×" for t in ticks])
        ax.minorticks_off()
        ax.grid(axis="both", color="#e3e3e3", zorder=0)
        ax.set_title(MODES[mode], fontsize=9)
        ax.set_xlabel("times as fast as eager, log scale")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    legend(figure, axes, ncols=min(len(shapes), 5), title=f"C×H×W, {n} samples, {dtype}, {layout}")
    return figure


def points(contents: Contents) -> list[tuple[str, float, float]]:
    """(whose, MiB that have to move, GB/s of them) of ours and of eager, where the copy bandwidth was measured."""
    found = []
    for content in contents:
        if content["provenance"].get("copy_gbps"):
            groups: dict[tuple[Any, ...], dict[str, Row]] = {}
            for r in rows_of([content]):
                if r.median_us and r.mode in MODES:
                    groups.setdefault((r.op, r.case, r.mode, r.dtype, r.layout, r.run), {})[r.impl] = r
            for by in groups.values():
                ours = next((by[i] for i in by if i.startswith("fused") and by[i].bytes), None)
                for whose, row in (("fused", ours), ("eager", by.get("eager"))):
                    if ours is not None and ours.bytes and row is not None and row.median_us:
                        found.append((whose, ours.bytes / 2**20, ours.bytes / row.median_us / 1e3))
    return found


def _roofline(plt: Any, contents: Contents) -> Any:
    found = points(contents)
    ceiling = median(c["provenance"]["copy_gbps"] for c in contents if c["provenance"].get("copy_gbps"))
    figure, ax = plt.subplots(figsize=(WIDTH, 4.2), layout="constrained")
    for whose, colour, marker in (("eager", COLOURS[3], "x"), ("fused", COLOURS[0], "o")):
        at = [(x, y) for w, x, y in found if w == whose]
        if at:
            ax.scatter(*zip(*at, strict=True), s=20, color=colour, marker=marker, alpha=0.75, label=whose, zorder=3)
    ax.axhline(
        ceiling,
        color="#444444",
        linewidth=1.2,
        label=f"a copy in this machine's memory, {ceiling:.3g} GB/s (above: from caches)",
    )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    import matplotlib.ticker as ticker

    plain = ticker.FuncFormatter(lambda v, _: f"{v:g}")
    ax.xaxis.set_major_formatter(plain)
    ax.yaxis.set_major_locator(ticker.LogLocator(base=10, subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(plain)
    ax.yaxis.set_minor_locator(ticker.NullLocator())
    ax.grid(color="#e3e3e3", zorder=0)
    ax.set_xlabel("MiB that the mechanism has to move in a call, log scale")
    ax.set_ylabel("GB/s of those, log scale")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def taxes(contents: Contents) -> dict[tuple[str, str], dict[str, float]]:
    """(mode and x, network) -> form -> tax in per cent."""
    from .models import taxes as of

    found: dict[tuple[str, str], dict[str, float]] = {}
    for (name, case, mode, dtype, layout, _, _, impl), tax in of(rows_of(contents)).items():
        title = f"{mode}, N={case.split('x')[0]}, {dtype}, {layout}"
        found.setdefault((title, name), {})[impl] = tax
    return found


def _tax(plt: Any, contents: Contents) -> Any:
    found = taxes(contents)
    panels = list(dict.fromkeys(title for title, _ in found))
    measured = {title: [name for other, name in found if other == title] for title in panels}  # not each in each mode
    forms = sorted({form for by in found.values() for form in by}, key=lambda f: (f.count("compiled"), len(f)))
    heights = [0.5 + 0.17 * len(names) * max(2, len(forms)) for names in measured.values()]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(WIDTH, 1.1 + sum(heights)), sharex=True, squeeze=False, layout="constrained",
        height_ratios=heights,
    )  # fmt: skip
    thick = 0.8 / len(forms)
    colours = [COLOURS[i] for i in (3, 0, 2, 1)] + list(COLOURS[4:])
    for ax, (title, names) in zip(axes[:, 0], measured.items(), strict=True):
        for i, form in enumerate(forms):
            at = [(y, by[form]) for y, n in enumerate(names) if form in (by := found.get((title, n), {}))]
            if not at:
                continue
            label = form.replace("attention", "unfused", 1).replace("unfused, fused", "fused")
            where = [y - 0.4 + thick * (i + 0.5) for y, _ in at]
            bars = ax.barh(where, [v for _, v in at], thick * 0.92, color=colours[i % len(colours)], label=label)
            ax.bar_label(bars, [f"{v:+.0f} %" for _, v in at], padding=3, fontsize=7.5)
        ax.axvline(0, color="#444444", linewidth=1)
        ax.set_yticks(range(len(names)), names)
        ax.invert_yaxis()
        ax.margins(x=0.12)
        ax.grid(axis="x", color="#e3e3e3", zorder=0)
        ax.set_axisbelow(True)
        ax.set_title(title, fontsize=9)
    axes[-1, 0].set_xlabel("how much longer than the network without attention in the same form, %")
    legend(figure, axes[:, 0], ncols=4)
    return figure
