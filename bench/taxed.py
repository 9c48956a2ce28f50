"""Networks with attention, and the same networks without it: the pairs of `python -m bench models`.

Without: either the network that a user would have picked instead (timm's resnet50 for seresnet50), or the very network
with its gates taken out, where no library has another. `plain` says which, in words that the tables print.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fused_attn

from . import networks
from .support import importable, redraw

FORMS = ("attention", "attention, fused", "plain", "plain, fused")


class Taxed(NamedTuple):
    """One pair. library: that has the network; plain: what it is without attention, by name or in words; other: the
    name of that network, where it is another; take: takes the attention out, in place, where it isn't."""

    library: str
    plain: str
    other: str | None = None
    take: Callable[[nn.Module], None] | None = None


class _Sum(nn.Module):
    """timm's SelectiveKernel without its attention: the branches, added."""

    def __init__(self, kernel: Any) -> None:
        super().__init__()
        self.paths, self.parts = kernel.paths, len(kernel.paths) if kernel.split_input else 1

    def forward(self, x: Tensor) -> Tensor:
        xs = x.chunk(self.parts, 1) if self.parts > 1 else [x] * len(self.paths)
        first, *more = [path(part) for path, part in zip(self.paths, xs, strict=True)]
        for y in more:
            first = first + y
        return first


def _identity(model: nn.Module) -> None:
    networks.without(model, [name for name, m in model.named_modules() if type(m).__name__ == "SqueezeExcite"])


def _added(model: nn.Module) -> None:
    for name, kernel in [(n, m) for n, m in model.named_modules() if type(m).__name__ == "SelectiveKernel"]:
        model.set_submodule(name, _Sum(kernel))


def _joined(model: nn.Module) -> None:
    networks.without(model, networks.gates(model))


PAIRS = {
    "seresnet50": Taxed("timm", "timm resnet50", other="resnet50"),
    "ecaresnet50d": Taxed("timm", "timm resnet50d", other="resnet50d"),
    "skresnet50": Taxed("timm", "its two branches added, without the softmax over them", take=_added),
    "cbam_resnet50": Taxed("pytorchcv", "pytorchcv resnet50", other="resnet50"),
    "epsanet50": Taxed("fused_attn", "its four convolutions joined, without the gates", take=_joined),
    "efficientnet_b0": Taxed("timm", "Identity for every SE", take=_identity),
    "mobilenetv3_large_100": Taxed("timm", "Identity for every SE", take=_identity),
}


def _library(library: str, name: str) -> nn.Module:
    if library == "timm":
        return importlib.import_module("timm").create_model(name, pretrained=False)  # type: ignore[no-any-return]
    model: Any = importlib.import_module("pytorchcv.model_provider").get_model(name)
    model.features.final_pool = nn.AdaptiveAvgPool2d(1)  # its 7×7 is that at 224 px, and fails where the map is smaller
    return model  # type: ignore[no-any-return]


def missing(name: str) -> str | None:
    """What has to be installed for a pair, or None where it can be built."""
    needed = dict.fromkeys(("timm", "torchvision", PAIRS[name].library))
    found = [library for library in needed if not importable(library)]
    return f"{', '.join(found)}: not installed" if found else None


def build(name: str, form: str, size: int) -> nn.Module:
    """One of the four forms of a pair, every parameter drawn anew, in evaluation.

    Raises RuntimeError where a library is missing, or `fuse_` finds nothing to convert in a network with attention.
    """
    if (why := missing(name)) is not None:
        raise RuntimeError(why)
    pair = PAIRS[name]
    plain = form.startswith("plain")
    torch.manual_seed(0)
    if pair.library == "fused_attn":
        model = networks.build(name, size)
        if plain:
            assert pair.take is not None
            pair.take(model)
            redraw(model, torch.randn(4, 3, size, size))  # the statistics were those with gates
        if form.endswith("fused"):
            (networks.fuse_norms if plain else networks.fuse)(model)
        return model
    model = _library(pair.library, pair.other if plain and pair.other else name)
    if plain and pair.take is not None:
        pair.take(model)
    redraw(model.eval(), torch.randn(4, 3, size, size))
    if form.endswith("fused") and not fused_attn.fuse_(model).fused and not plain:
        raise RuntimeError(f"fuse_ converted nothing in {name}")
    return model
