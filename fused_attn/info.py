"""What is here and what works: `python -m fused_attn.info [--json]`.

Versions, devices, what is built, and a self-test of each op on each backend: forward and backward of its smallest case,
against its formula in float64. Paste it into a bug report. Exits with 1 where a self-test fails.
"""

import json
import math
import os
import platform
import sys
from typing import Any

import torch

from . import __version__, backend, testing
from .registry import BLOCKS, OPS, Op

VARIABLES = (
    "FUSED_ATTN_BACKEND",
    "FUSED_ATTN_BUILD",
    "FUSED_ATTN_ISA",
    "FUSED_ATTN_LOG",
    "TRITON_INTERPRET",
    "OMP_NUM_THREADS",
)


def collect() -> dict[str, Any]:
    """Everything as plain data, ready for JSON."""
    built = backend.extension()
    return {
        "versions": {
            "fused_attn": __version__,
            "torch": torch.__version__,
            "triton": _triton(),
            "python": platform.python_version(),
            "system": platform.platform(),
        },
        "devices": {
            "cpu": f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} of {os.cpu_count()} threads",
            **{f"cuda:{i}": _gpu(i) for i in range(torch.cuda.device_count())},
        },
        "extension": "built" + _kernels() if built is None else built,
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "blocks": sorted(BLOCKS),
        "ops": {op.name: self_test(op) for op in OPS.values() if op.formula is not None},
    }


def self_test(op: Op) -> dict[str, str]:
    """For each backend: "ok", what is wrong, or "not available: " and the reason."""
    usable = [c for c in op.cases if "bench" not in c.tags and next(iter(c.args.values()))[0] != 0]
    smallest = min(usable, key=lambda c: math.prod(next(iter(c.args.values()))))
    return {name: _run(op, smallest, name) for name in backend.BACKENDS if name != "auto"}


def _run(op: Op, case: Any, name: str) -> str:
    device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
    args = testing.draw(case, op, device=device)
    try:
        if (why := backend.refusal(op, name, args)) is not None:
            return f"not available: {why}"
        with backend.use_backend(name):
            got = testing.answer(op, args)
        found = testing.deviations(
            got,
            testing.truth(op, args, got),
            testing.plain(op, args, got),
            testing.terms(op, args),
            testing.names(op, args),
        )
    except Exception as problem:  # this is where a user looks when something is broken: say it, and go on
        return f"error: {type(problem).__name__}: {next(iter(str(problem).splitlines()), '')}"
    wrong = [str(d) for d in found if not d.ok]
    return f"wrong: {'; '.join(wrong)}" if wrong else "ok"


def _triton() -> str:
    if (why := backend.triton_missing()) is not None:
        return why
    import triton

    return triton.__version__ + (" (interpreter)" if backend.interpreting() else "")


def _kernels() -> str:
    """Which instruction set the CPU kernels use, where the extension says so."""
    isa = getattr(torch.ops.fused_attn_cpp, "_isa", None)
    return f", CPU kernels for {isa()}" if isa is not None else ""


def _gpu(index: int) -> str:
    p = torch.cuda.get_device_properties(index)
    return f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"


def show(info: dict[str, Any]) -> str:
    """The same as text."""
    lines = []
    for title in ("versions", "devices", "environment"):
        lines.append(title)
        lines += [f"  {name:20} {value}" for name, value in info[title].items()] or [
            f"  (none of {', '.join(VARIABLES)} is set)"
        ]
    lines += ["extension", f"  {info['extension']}", "blocks", f"  {', '.join(info['blocks']) or 'none'}", "self-test"]
    for op, results in info["ops"].items():
        lines += [f"  {op if i == 0 else '':20} {name:8} {text}" for i, (name, text) in enumerate(results.items())]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Prints the report; 1 where a self-test fails."""
    info = collect()
    print(json.dumps(info, indent=2) if "--json" in argv else show(info))
    failed = [t for results in info["ops"].values() for t in results.values() if t.startswith(("error", "wrong"))]
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
