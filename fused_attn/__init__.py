"""Fused kernels for convolutional attention: forward and backward, in Triton and C++, falling back to eager PyTorch."""

from . import ops
from .backend import use_backend
from .blocks import EffectiveSE, SqueezeExcite
from .convert import Report, fuse_, unfuse_
from .explain import explain
from .registry import BLOCKS, OPS

__version__ = "0.1.0"

__all__ = [
    "BLOCKS",
    "OPS",
    "EffectiveSE",
    "Report",
    "SqueezeExcite",
    "__version__",
    "explain",
    "fuse_",
    "ops",
    "unfuse_",
    "use_backend",
]
