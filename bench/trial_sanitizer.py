"""Items of `qualify --only sanitizer`: kernels under NVIDIA's compute-sanitizer, on the smallest cases of every op.

memcheck finds accesses outside of what was allocated, racecheck threads that meet in shared memory, initcheck reads of
what nobody wrote. PyTorch's caching allocator is switched off, so that every tensor has borders of its own.
"""

import functools
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from fused_attn.registry import OPS

from .support import ROOT
from .trials import Item, NotRun, Payload, Wrong, output

TOOLS = ("memcheck", "racecheck", "initcheck")
KINDS = r"(float32|bfloat16) (contiguous|channels_last)$"  # of the items of `correctness`


def items(device: str) -> list[Item]:
    """Every op under the first tool, then under the next."""
    names = [op.name for op in OPS.values() if op.formula is not None]
    return [
        Item(f"{tool} {name}", functools.partial(_sanitized, tool, name, device), seconds=240)
        for tool in TOOLS
        for name in names
    ]


def program() -> str | None:
    """Where compute-sanitizer is, if it is."""
    usual = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "compute-sanitizer"
    return shutil.which("compute-sanitizer") or (str(usual) if usual.exists() else None)


def _sanitized(tool: str, name: str, device: str) -> Payload:
    if (found := program()) is None:
        raise NotRun("compute-sanitizer is not installed")
    with tempfile.TemporaryDirectory(prefix="fused_attn_") as folder:
        log = Path(folder) / "log.jsonl"
        match = rf"^{name} (?!.*(8x\d{{3,}}|64x64x)).*{KINDS}"
        own = [sys.executable, "-m", "bench", "qualify", "--only", "correctness", "--device", device]
        command = [found, "--tool", tool, *own, "--match", match, "--worker", "0/1", "--log", str(log)]
        status, text = output(command, 230, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
        checked = len(re.findall(r'"status": "passed"', log.read_text())) if log.exists() else 0
    if "Device not supported" in text:
        raise NotRun("compute-sanitizer doesn't support this device")
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", text)
    if summary is None:
        raise Wrong(f"no summary; status {status}: {text[-800:].replace(str(ROOT), '.')}")
    if int(summary[1]) or not checked:
        raise Wrong(f"{summary[1]} errors in {checked} cases: {text[:1500].replace(str(ROOT), '.')}")
    return {"cases": checked}
