"""`python -m bench dispatch`: writes fused_attn/_dispatch.py, which backend is tried first, from committed GPU results.

For each op, architecture and class of size: the backends in the order of their geometric mean times, over the cases in
which all of them were timed, forward and backward alike. Without a result of a GPU the table is empty, and the order is
that of `fused_attn.backend.ORDER`.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fused_attn import backend
from fused_attn.registry import OPS

from .measure import Row, log
from .ops import DTYPES
from .support import ROOT
from .tables import RESULTS

TARGET = ROOT / "fused_attn" / "_dispatch.py"
Key = tuple[str, str, str]
HEAD = '''"""Which backend runs first on a GPU, as measured: (op, architecture, class of size) -> backends.

Written by `python -m bench dispatch` from bench/results; not to be edited. Empty where no result is committed.
"""

TABLE: dict[tuple[str, str, str], tuple[str, ...]] = {'''


def times(results: Path) -> dict[Key, dict[tuple[str, ...], dict[str, float]]]:
    """(op, architecture, class) -> case -> backend -> microseconds, of every GPU result. A later file counts."""
    found: dict[Key, dict[tuple[str, ...], dict[str, float]]] = {}
    for path in sorted(results.glob("*/*.json")):
        content = json.loads(path.read_text())
        source = content["provenance"]
        if source["device"] != "cuda" or content["kind"] not in ("ops", "qualify-kernels"):
            continue
        for r in (Row(**r) for r in content["rows"]):
            form, _, name = r.impl.partition(":")  # `eager` alone is what users have, not the op on that backend
            if r.op not in OPS or not r.median_us or form != "fused" or name not in backend.BACKENDS[1:]:
                continue
            shape = [int(d) for d in r.case.split()[0].split("x")]
            x = torch.empty(shape, dtype=DTYPES[r.dtype], device="meta")
            key = (r.op, f"sm_{source['capability'].replace('.', '')}", backend.size_class(x))
            where = (r.case, r.mode, r.dtype, r.layout)
            # Where launches bound a call, a device that waits for its host isn't fast.
            host = r.host_us or 0.0 if key[2] == "small" else 0.0
            found.setdefault(key, {}).setdefault(where, {})[name] = max(r.median_us, host)
    return found


def table(results: Path) -> dict[Key, tuple[str, ...]]:
    """The fastest backend first, where at least two were timed on the same cases."""
    found = {}
    for key, cases in sorted(times(results).items()):
        names = {name for by in cases.values() for name in by}
        common = [by for by in cases.values() if set(by) == names]
        if len(names) > 1 and common:
            mean = lambda name, common=common: sum(math.log(by[name]) for by in common)
            found[key] = tuple(sorted(names, key=mean))
    return found


def render(results: Path) -> str:
    """The text of fused_attn/_dispatch.py."""
    quoted = lambda items: ", ".join(f'"{i}"' for i in items)
    lines = [f"    ({quoted(key)}): ({quoted(order)}),\n" for key, order in table(results).items()]
    return HEAD + ("\n" + "".join(lines) if lines else "") + "}\n"


def parser(add: Any) -> argparse.ArgumentParser:
    """The options of `python -m bench dispatch`."""
    p: argparse.ArgumentParser = add("dispatch", help="write the table of measured backends from bench/results")
    p.add_argument("--check", action="store_true", help="write nothing; status 1 where the table is stale")
    return p


def main(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Runs `python -m bench dispatch`."""
    new = render(RESULTS)
    old = TARGET.read_text() if TARGET.exists() else ""
    if options.check:
        if new != old:
            log("fused_attn/_dispatch.py is stale: run `python -m bench dispatch`")
        return int(new != old)
    TARGET.write_text(new)
    return 0
