"""Fused kernels for convolutional attention: forward and backward, in Triton and C++, falling back to eager PyTorch."""

import importlib
from types import ModuleType

from . import log, ops
from .backend import use_backend
from .blocks import (
    BAM,
    CBAM,
    ECA,
    EffectiveSE,
    PyramidSqueezeAttention,
    ResidualAttention,
    SelectiveKernel,
    Shrinkage,
    ShuffleAttention,
    SpatialChannelSE,
    SpatialGroupEnhance,
    SplitAttention,
    SqueezeExcite,
)
from .convert import Report, fuse_, unfuse_
from .explain import explain
from .export import decompositions
from .registry import BLOCKS, OPS
from .warmup import warmup

__version__ = "0.1.0"

__all__ = [
    "BAM",
    "BLOCKS",
    "CBAM",
    "ECA",
    "OPS",
    "EffectiveSE",
    "PyramidSqueezeAttention",
    "Report",
    "ResidualAttention",
    "SelectiveKernel",
    "Shrinkage",
    "ShuffleAttention",
    "SpatialChannelSE",
    "SpatialGroupEnhance",
    "SplitAttention",
    "SqueezeExcite",
    "__version__",
    "decompositions",
    "explain",
    "fuse_",
    "ops",
    "unfuse_",
    "use_backend",
    "warmup",
]

if log.enabled():
    log.start()


def __getattr__(name: str) -> ModuleType:
    if name in ("models", "testing"):  # on first use: most programs need neither
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
