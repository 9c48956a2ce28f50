"""`python -m bench memory`: what a training step of whole networks keeps and takes, unfused and fused.

saved   bytes that autograd keeps between forward and backward, every storage counted once, parameters left out
peak    on a CPU the process's largest resident memory (Linux) less that before the step, with every large tensor in
        pages of its own, which go back when it is freed; on a GPU what the allocator says

Each network runs in a process of its own, because a peak can't be taken back.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import measure, networks
from .support import ROOT, progress, table, write_json

NAMES = ("seresnet50", "cbam_resnet50", "epsanet50")
SIZE = 224


def saved_bytes(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """The sum of the outputs, and how many bytes autograd keeps for it."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers(), x)}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        total = model(x).sum()
    return total, sum(kept.values())


def step(name: str, fused: bool, batch: int, device: str) -> dict[str, float]:
    """One training step in this process. The first, smaller one loads libraries and allocates gradients."""
    torch.set_num_threads(1)
    model = networks.build(name, SIZE).to(device).train()
    if fused:
        networks.fuse(model)
    model(torch.randn(2, 3, SIZE, SIZE, device=device)).sum().backward()
    x = torch.randn(batch, 3, SIZE, SIZE, device=device)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() // 1024
    total, kept = saved_bytes(model, x)
    total.backward()
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if device == "cuda":
        after = torch.cuda.max_memory_allocated() // 1024
    return {"saved": kept / 2**20, "peak": (after - before) / 1024}


def parser(add: Any) -> argparse.ArgumentParser:
    """The options of `python -m bench memory`."""
    p: argparse.ArgumentParser = add("memory", help="what a training step of whole networks keeps and takes")
    p.add_argument("--network", nargs="+", choices=list(networks.NETWORKS), metavar="NAME", default=list(NAMES))
    p.add_argument("--batch", type=int, default=8, help="N (default: 8)")
    p.add_argument("--device", choices=["cpu", "cuda"], help="default: a GPU if there is one")
    p.add_argument("--out", type=Path, help="folder for the JSON; a folder named after the machine is made in it")
    p.add_argument("--one", choices=["unfused", "fused"], help=argparse.SUPPRESS)  # what the processes are called with
    return p


def main(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """Runs `python -m bench memory`."""
    device = options.device or measure.default_device()
    if options.batch < 4:
        print(f"--batch must be at least 4, twice the first step's; got {options.batch}")
        return 2
    if options.one:
        print(json.dumps(step(options.network[0], options.one == "fused", options.batch, device)))
        return 0
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in progress(options.network, "bench memory"):
        for form in ("unfused", "fused"):
            command = ["memory", "--network", name, "--one", form, "--batch", str(options.batch), "--device", device]
            run = subprocess.run(
                [sys.executable, "-m", "bench", *command], capture_output=True, text=True, cwd=ROOT, check=False,
                env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
            )  # fmt: skip
            if run.returncode:
                print(f"{name}, {form}: {(run.stderr.strip() or 'no message').splitlines()[-1]}")
                return 1
            found.setdefault(name, {})[form] = json.loads(run.stdout.splitlines()[-1])
    head = ["MiB of a training step", "saved", "fused", "peak", "fused"]
    cells = lambda forms: [f"{forms[f][what]:.0f}" for what in ("saved", "peak") for f in ("unfused", "fused")]
    print(table(head, [[name, *cells(forms)] for name, forms in found.items()]))
    if options.out:
        source = measure.provenance(device, measure.command_line("bench", arguments))
        path = options.out / measure.slug(source["device_name"]) / f"memory-{measure.stamp()}.json"
        content = {"schema": measure.SCHEMA, "kind": "memory", "provenance": source, "batch": options.batch}
        write_json(path, {**content, "mib": found})
        measure.log(f"wrote {path}")
    return 0
