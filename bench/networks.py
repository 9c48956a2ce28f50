"""The demo's networks: unfused, fused, and without their gates.

A library's network is built by the library and fused by `fuse_`. One of `fused_attn.models` has its blocks run by their
published equations (`published`) until it is fused, since no library has them; both forms share their parameters.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fused_attn

from . import published
from .support import importable, redraw


class Network(NamedTuple):
    """library: that builds it; always: in the demo, not just in the full one; bare: whether it is still a network
    without its gates; compiles: its turn among those that the demo compiles, or None for the full one alone."""

    library: str
    always: bool = False
    bare: bool = True
    compiles: int | None = None


NETWORKS = {
    "seresnet50": Network("timm", True, compiles=2),
    "efficientnet_b0": Network("timm", True, compiles=1),
    "mobilenet_v3_large": Network("torchvision", True, compiles=0),
    "cbam_resnet50": Network("pytorchcv", True),
    "epsanet50": Network("fused_attn", True),
    "bam_resnet50": Network("pytorchcv"),
    "skresnet50": Network("timm", bare=False),
    "resnest50d": Network("timm", bare=False),
    "sa_resnet50": Network("fused_attn"),
    "sge_resnet50": Network("fused_attn"),
    "drsn18": Network("fused_attn"),
    "attention56": Network("fused_attn", bare=False),
}


class _Pyramid(nn.Module):
    """PSA with its convolutions. weighed: whether by its gates, or just joined."""

    def __init__(self, block: fused_attn.PyramidSqueezeAttention, weighed: bool = True) -> None:
        super().__init__()
        self.convs = nn.ModuleList(block.get_submodule(f"conv_{i}") for i in range(1, 5))
        self.gates = published.PyramidSqueeze(4 * block.split_channel) if weighed else None
        if self.gates is not None:
            self.gates.fc1, self.gates.fc2 = block.se.fc1, block.se.fc2

    def forward(self, x: Tensor) -> Tensor:
        branches = [conv(x) for conv in self.convs]
        y: Tensor = torch.cat(branches[::-1], 1) if self.gates is None else self.gates(*branches)
        return y


class _Masked(nn.Module):
    """Residual attention, with its mask and trunk."""

    def __init__(self, block: fused_attn.ResidualAttention) -> None:
        super().__init__()
        self.mask, self.trunk = block.mask, block.trunk

    def forward(self, x: Tensor) -> Tensor:
        trunk = self.trunk(x)
        return published.sigmoid_scale(self.mask(x), trunk)


def _threshold(block: fused_attn.Shrinkage) -> nn.Module:
    twin = published.SoftThreshold(1)
    twin.fc = block.fc
    return twin


def _shuffle(block: fused_attn.ShuffleAttention) -> nn.Module:
    twin = published.Shuffle(2 * block.groups, block.groups)
    twin.cweight, twin.cbias, twin.sweight, twin.sbias = block.cweight, block.cbias, block.sweight, block.sbias
    twin.gn = block.gn
    return twin


def _enhance(block: fused_attn.SpatialGroupEnhance) -> nn.Module:
    twin = published.GroupEnhance(block.groups)
    twin.weight, twin.bias = block.weight, block.bias
    return twin


TWINS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    fused_attn.PyramidSqueezeAttention: _Pyramid,
    fused_attn.ResidualAttention: _Masked,
    fused_attn.Shrinkage: _threshold,
    fused_attn.ShuffleAttention: _shuffle,
    fused_attn.SpatialGroupEnhance: _enhance,
}


class Norm(nn.BatchNorm2d):
    """A BatchNorm that the library's networks don't compute with what follows it, because it is none they know."""


class Plain(nn.Module):
    """A block of the library that runs by its published equations, with the sum and ReLU that the block would fuse."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.twin = block, TWINS[type(block)](block)

    def forward(self, x: Tensor, residual: Tensor | None = None, epilogue: str = "identity") -> Tensor:
        y: Tensor = self.twin(x)
        y = y if residual is None else y + residual
        return F.relu(y, inplace=residual is not None) if epilogue == "relu" else y


def build(name: str, size: int) -> nn.Module:
    """A network, every parameter drawn anew, unfused and ready for inference."""
    library = NETWORKS[name].library
    if not (importable("timm") and importable("torchvision") and importable(library)):
        raise SystemExit(f"the demo needs timm, torchvision and {library}: pip install -r requirements-dev.txt")
    torch.manual_seed(0)
    model: nn.Module
    if library == "timm":
        model = importlib.import_module("timm").create_model(name, pretrained=False)
    elif library == "torchvision":
        model = getattr(importlib.import_module("torchvision").models, name)(weights=None)
    elif library == "pytorchcv":
        model = importlib.import_module("pytorchcv.model_provider").get_model(name)
    else:
        model = getattr(importlib.import_module("fused_attn.models"), name)()
        _replace(model, tuple(TWINS), Plain)
        _become(model, nn.BatchNorm2d, Norm)
    return redraw(model.eval(), torch.randn(4, 3, size, size))


def _replace(model: nn.Module, classes: type | tuple[type, ...], make: Callable[[Any], nn.Module]) -> list[str]:
    """Puts make(m) in place of every module of these classes, and returns their names."""
    names = [name for name, m in model.named_modules() if isinstance(m, classes)]
    for name in names:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(model.get_submodule(name)))
    return names


def _become(model: nn.Module, given: type, wanted: type) -> None:
    """Changes the class of every module of exactly this one."""
    for m in model.modules():
        if type(m) is given:
            m.__class__ = wanted


def fuse(model: nn.Module) -> fused_attn.Report:
    """Makes a network run fused, in place. The report's rows are of what `fuse_` converted, and of the library's own
    blocks."""
    cls = lambda m: f"{type(m).__module__}.{type(m).__name__}"
    names = _replace(model, Plain, lambda plain: plain.block)
    _become(model, Norm, nn.BatchNorm2d)
    report = fused_attn.fuse_(model)
    own = [fused_attn.convert.Row(name, cls(model.get_submodule(name)), "gate") for name in names]
    return fused_attn.Report([*own, *report.rows])


def fuse_norms(model: nn.Module) -> fused_attn.Report:
    """Fuses, in place, what isn't attention: for a network of ours whose gates were taken out."""
    _become(model, Norm, nn.BatchNorm2d)
    return fused_attn.fuse_(model)


def gates(model: nn.Module) -> list[str]:
    """Names of the modules that are gates, in a network that isn't fused. A library's network gets fused by this."""
    names = [f"{name}.twin" for name, m in model.named_modules() if isinstance(m, Plain)]
    return names or [row.name for row in fused_attn.fuse_(model).rows if row.kind == "gate"]


def without(model: nn.Module, names: list[str]) -> nn.Module:
    """Takes the gates out, in place."""
    for name in names:
        parent, _, child = name.rpartition(".")
        gate, owner = model.get_submodule(name), model.get_submodule(parent)
        convs = isinstance(gate, _Pyramid)
        setattr(owner, child, _Pyramid(owner.block, weighed=False) if convs else nn.Identity())  # type: ignore[arg-type]
    return model
