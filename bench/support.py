"""What bench, demo and qualify share: a torchvision that imports, models whose attention matters, JSON, tables."""

import importlib.util
import json
import math
import os
import sys
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
T = TypeVar("T")


def importable(name: str) -> bool:
    """Whether a package is installed; torchvision, and timm that imports it, are made importable first."""
    if importlib.util.find_spec(name) is None:
        return False
    if name in ("timm", "torchvision") and importlib.util.find_spec("torchvision") is not None:
        _guard_torchvision()
    return True


def _guard_torchvision() -> None:
    """Beside a CPU torch, torchvision's compiled operators don't load, and importing it raises: it registers fakes for
    operators that aren't there. An empty module in place of those registrations is enough for models."""
    if "torchvision" in sys.modules:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")


def redraw(model: nn.Module, x: Tensor, seed: int = 0) -> nn.Module:
    """Draws every parameter and buffer anew, so that each layer, and each gate, has a say in the output.

    Zoo models start with a zero last BatchNorm or skip gain: their attention has no effect until they are trained. Here
    weights keep their inputs' variance, and running statistics are those of `x`, so that activations stay O(1).
    """
    generator = torch.Generator().manual_seed(seed)
    draw = lambda like, low, high: torch.empty(like.shape).uniform_(low, high, generator=generator).to(like)
    momenta = {}
    with torch.no_grad():
        for module in model.modules():
            for name, p in module.named_parameters(recurse=False):
                if p.dim() > 1:
                    fan_in = p[0].numel()
                    normal = torch.empty(p.shape).normal_(generator=generator) * math.sqrt(2.0 / fan_in)
                    p.copy_(normal.to(p))
                elif name.endswith("bias"):
                    p.copy_(draw(p, -0.2, 0.2))
                else:
                    p.copy_(draw(p, 0.5, 1.5))
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                momenta[module] = module.momentum
                module.momentum = 1.0  # the next batch's statistics, whole
        training = model.training
        dropped = [m for m in model.modules() if "Drop" in type(m).__name__]  # Dropout, DropPath, StochasticDepth
        model.train()
        for module in dropped:
            module.eval()
        model(x)
        model.train(training)
    for module, momentum in momenta.items():
        module.momentum = momentum
    return model


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads inside the block. One to measure: a busy neighbour costs every parallel region milliseconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_json(path: Path, content: Any) -> None:
    """Writes the whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1, default=str, allow_nan=False) + "\n")
    os.replace(partial, path)


def progress(items: Iterable[T], describe: str, total: int | None = None) -> Any:
    """A bar on stderr, or plain iteration where tqdm isn't installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return _Plain(items)
    return tqdm(items, desc=describe, total=total, file=sys.stderr, dynamic_ncols=True, leave=False, mininterval=0.5)


class _Plain:
    """The part of tqdm that is used here."""

    def __init__(self, items: Iterable[T]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[T]:
        return iter(self.items)

    def set_postfix_str(self, text: str) -> None:
        print(text, file=sys.stderr)

    def update(self, count: int = 1) -> None:
        pass

    def close(self) -> None:
        pass


def table(head: list[str], rows: list[list[str]], right: int = 1) -> str:
    """Aligned columns; those from number `right` on are flushed right."""
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    line = lambda cells: "  ".join(
        c.ljust(w) if i < right else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
    ).rstrip()
    return "\n".join([line(head), line(["─" * w for w in widths]), *(line(r) for r in rows)])


def significant(value: float, digits: int = 3) -> str:
    """A number for reading: 3 significant digits, no exponent between 0.001 and 10⁶."""
    if value == 0 or not math.isfinite(value):
        return str(value)
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"
