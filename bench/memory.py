"""`python -m bench memory`: what a training step of whole networks keeps and takes, unfused and fused.

saved   bytes that autograd keeps between forward and backward, every storage counted once, parameters left out
peak    on a CPU the process's largest resident memory (Linux) less that before the step, with every large tensor in
        pages of its own, which go back when it is freed; on a GPU what the allocator says

Each network runs in a process of its own, because a peak can't be taken back.
"""

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
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


def used(
    model: nn.Module, batch: int, size: int, device: str, train: bool = True, cast: Callable[[], Any] = nullcontext,
    shape: Callable[[Tensor], Tensor] = lambda x: x,
) -> dict[str, float]:  # fmt: skip
    """MiB of one training step, or of one inference, in this process. The first, smaller one loads libraries and
    allocates gradients.

    cast: the context of the forward, such as autocast; shape: what gives the input its dtype and layout
    """
    torch.set_num_threads(1)

    def call(x: Tensor) -> int:
        if not train:
            with torch.inference_mode(), cast():
                model(x)
            return 0
        with cast():
            total, kept = saved_bytes(model, x)
        total.backward()
        return kept

    model.train(train)
    call(shape(torch.randn(2, 3, size, size, device=device)))
    x = shape(torch.randn(batch, 3, size, size, device=device))
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
        kept = call(x)
        return {"saved": kept / 2**20, "peak": torch.cuda.max_memory_allocated() / 2**20 - before}
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the largest resident memory starts anew
    before = _resident("VmRSS")
    kept = call(x)
    return {"saved": kept / 2**20, "peak": _resident("VmHWM") - before}


def _resident(field: str) -> float:
    """MiB that the system counts. Not getrusage's: that starts with what the parent process had."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found is not None, field
    return int(found[1]) / 1024


def step(name: str, fused: bool, batch: int, device: str) -> dict[str, float]:
    """One training step of a network."""
    model = networks.build(name, SIZE).to(device)
    if fused:
        networks.fuse(model)
    return used(model, batch, SIZE, device)


def alone(arguments: Sequence[str]) -> dict[str, Any]:
    """What `python -m bench` with these arguments prints as its last line, from a process of its own in which freed
    memory goes back. Raises RuntimeError with the last line of its complaint."""
    run = subprocess.run(
        [sys.executable, "-m", "bench", *arguments], capture_output=True, text=True, cwd=ROOT, check=False,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
    )  # fmt: skip
    if run.returncode:
        raise RuntimeError((run.stderr.strip() or run.stdout.strip() or "no message").splitlines()[-1])
    return json.loads(run.stdout.splitlines()[-1])  # type: ignore[no-any-return]


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
            try:
                found.setdefault(name, {})[form] = alone(command)
            except RuntimeError as error:
                print(f"{name}, {form}: {error}")
                return 1
    head = ["MiB of a training step", "saved", "fused", "peak", "fused"]
    cells = lambda forms: [f"{forms[f][what]:.0f}" for what in ("saved", "peak") for f in ("unfused", "fused")]
    print(table(head, [[name, *cells(forms)] for name, forms in found.items()]))
    if options.out:
        torch.set_num_threads(1)  # as in the processes that measured, where freed memory went back
        source = measure.provenance(device, measure.command_line("bench", arguments)) | {"heap_pinned": False}
        path = options.out / measure.slug(source["device_name"]) / f"memory-{measure.stamp()}.json"
        content = {"schema": measure.SCHEMA, "kind": "memory", "provenance": source, "batch": options.batch}
        write_json(path, {**content, "mib": found})
        measure.log(f"wrote {path}")
    return 0
